/* Decoding of any codebook with AVX-512 (VBMI): each byte of the 256 float32 values is looked up in
   four registers. One permutation of two registers looks up 128 entries, and the top bit of the code
   selects one of two permutations. */

typedef struct {
  __m512i byte[4][4];
} tables;

static inline tables tables_of(const matrix *w) {
  tables found;
  uint8_t bytes[256];
  for (int place = 0; place < 4; place++) {
    for (int k = 0; k < 256; k++) bytes[k] = (uint8_t)(as_bits(w->codebook[k]) >> (8 * place));
    for (int part = 0; part < 4; part++)
      found.byte[place][part] = _mm512_loadu_si512(bytes + 64 * part);
  }
  return found;
}

/* Decode 64 codes; value[q] holds codes 16 q to 16 q + 15. */
ALWAYS_INLINE void decode(const uint8_t *codes, const tables *with, vector *value) {
  /* Unpacking works within 128-bit lanes and interleaves twice: lane j of the result q holds the
     codes 4 q to 4 q + 3 of lane j, so lane j gets codes 4 j to 4 j + 3 of each group of 16. */
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i plane[4];
  for (int place = 0; place < 4; place++) {
    const __m512i *table = with->byte[place];
    plane[place] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], code, table[1]),
                                          _mm512_permutex2var_epi8(table[2], code, table[3]));
  }
  __m512i low = _mm512_unpacklo_epi8(plane[0], plane[1]);
  __m512i low_high = _mm512_unpackhi_epi8(plane[0], plane[1]);
  __m512i high = _mm512_unpacklo_epi8(plane[2], plane[3]);
  __m512i high_high = _mm512_unpackhi_epi8(plane[2], plane[3]);
  value[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  value[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
  value[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low_high, high_high));
  value[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low_high, high_high));
}
#define DECODED_UNIT 1.0f

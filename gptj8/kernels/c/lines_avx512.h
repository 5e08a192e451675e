/* Decoding of a codebook of lines with AVX-512 (BW), as vectors_avx2.h does with AVX2. */

#include "lines.h"

typedef line_tables tables;

ALWAYS_INLINE tables tables_of(const matrix *w) { return line_tables_of(&w->lines, 0); }

/* Decode 64 codes; value[q] holds codes 16 q to 16 q + 15, in units of 1 / LINE_UNIT. */
ALWAYS_INLINE void decode(const uint8_t *codes, const tables *with, vector *value) {
  const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
  /* Unpacking works within 128-bit lanes: this order of the codes compensates for it. */
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes));
  __m512i l = _mm512_and_si512(code, nibble);
  __m512i h = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
  __m512i low = _mm512_shuffle_epi8(with->start_low, h);
  __m512i high = _mm512_shuffle_epi8(with->start_high, h);
  __m512i slope = _mm512_shuffle_epi8(with->slope, h);
  __m512i first = _mm512_add_epi16(
      _mm512_unpacklo_epi8(low, high),
      _mm512_maddubs_epi16(_mm512_unpacklo_epi8(slope, zero), _mm512_unpacklo_epi8(l, zero)));
  __m512i second = _mm512_add_epi16(
      _mm512_unpackhi_epi8(low, high),
      _mm512_maddubs_epi16(_mm512_unpackhi_epi8(slope, zero), _mm512_unpackhi_epi8(l, zero)));
#define HALF(of, half) _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(of, half)))
  value[0] = HALF(first, 0), value[1] = HALF(first, 1);
  value[2] = HALF(second, 0), value[3] = HALF(second, 1);
#undef HALF
}
#define DECODED_UNIT (1.0f / LINE_UNIT)

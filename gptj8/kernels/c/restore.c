/* Restoring weights: codebook[codes] * scale, rounded to float32, float16 or bfloat16. */

#include "common.h"

/* From this block size on, a table of all 256 products is made for each block. */
#define TABLE_BLOCK 1024

/* Look up each code in a table of 256 16-bit values. */
static void look_up_16(const uint8_t *codes, int64_t length, const uint16_t *table, uint16_t *out) {
  for (int64_t i = 0; i < length; i++) out[i] = table[codes[i]];
}

#if defined(ON_X86)
#include <immintrin.h>

/* Look up 64 codes per iteration. The low and high bytes of the table fill four registers each. One
   permutation of two registers looks up 128 entries, and the top bit of the code selects one of two
   permutations. */
#define WITH_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))

WITH_VBMI ALWAYS_INLINE void look_up_16_vbmi(const uint8_t *codes, int64_t length,
                                             const uint16_t *table, uint16_t *out, int streams) {
  uint8_t low_bytes[256], high_bytes[256];
  for (int k = 0; k < 256; k++) {
    low_bytes[k] = (uint8_t)table[k];
    high_bytes[k] = (uint8_t)(table[k] >> 8);
  }
  __m512i low[4], high[4];
  for (int part = 0; part < 4; part++) {
    low[part] = _mm512_loadu_si512(low_bytes + 64 * part);
    high[part] = _mm512_loadu_si512(high_bytes + 64 * part);
  }
  /* unpacklo and unpackhi work within 128-bit lanes; this order of the codes compensates for it. */
  const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 64 <= length; i += 64) {
    _mm_prefetch((const char *)(codes + i + AHEAD), _MM_HINT_T0);
    __m512i code = _mm512_permutexvar_epi64(lanes, _mm512_loadu_si512(codes + i));
    __mmask64 upper = _mm512_movepi8_mask(code);
    __m512i low_byte =
        _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low[0], code, low[1]),
                               _mm512_permutex2var_epi8(low[2], code, low[3]));
    __m512i high_byte =
        _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(high[0], code, high[1]),
                               _mm512_permutex2var_epi8(high[2], code, high[3]));
    __m512i first = _mm512_unpacklo_epi8(low_byte, high_byte);
    __m512i second = _mm512_unpackhi_epi8(low_byte, high_byte);
    if (streams) {
      _mm512_stream_si512((void *)(out + i), first);
      _mm512_stream_si512((void *)(out + i + 32), second);
    } else {
      _mm512_storeu_si512(out + i, first);
      _mm512_storeu_si512(out + i + 32, second);
    }
  }
  look_up_16(codes + i, length - i, table, out + i);
}

WITH_VBMI static void look_up_16_stored(const uint8_t *codes, int64_t length, const uint16_t *table,
                                        uint16_t *out) {
  look_up_16_vbmi(codes, length, table, out, 0);
}

/* Bypass the caches, which are too small for the output anyway. This avoids reading memory that is
   about to be overwritten. `out` must be aligned to 64 bytes. */
WITH_VBMI static void look_up_16_streamed(const uint8_t *codes, int64_t length,
                                          const uint16_t *table, uint16_t *out) {
  look_up_16_vbmi(codes, length, table, out, 1);
  _mm_sfence();
}
#endif

FOR_EACH_MACHINE
static void narrow(const float *values, int64_t length, int dtype, uint16_t *out) {
  if (dtype == BFLOAT16)
    for (int64_t i = 0; i < length; i++) out[i] = to_bfloat16(values[i]);
  else
    for (int64_t i = 0; i < length; i++) out[i] = to_half(values[i]);
}

/* Restore the codes `from` to `to` with plain C. */
FOR_EACH_MACHINE
static void restore_plainly(const matrix *w, int64_t from, int64_t to, void *out, int dtype) {
  for (int64_t at = from, end; at < to; at = end) {
    float restored[TABLE_BLOCK], scale = scale_at(&w->scale, at >> w->shift);
    end = ((at >> w->shift) + 1) << w->shift;
    end = end < to ? end : to;
    end = end - at < TABLE_BLOCK ? end : at + TABLE_BLOCK;
    float *place = dtype == FLOAT32 ? (float *)out + at : restored;
    for (int64_t i = at; i < end; i++) place[i - at] = w->codebook[w->codes[i]] * scale;
    if (dtype != FLOAT32) narrow(restored, end - at, dtype, (uint16_t *)out + at);
  }
}

/* Restore blocks `from` to `to` to 16 bits by looking up products. */
static void restore_from_products(const matrix *w, int64_t from, int64_t to, int64_t n,
                                  uint16_t *out, int dtype, int streams) {
  void (*look_up)(const uint8_t *, int64_t, const uint16_t *, uint16_t *) = look_up_16;
#if defined(ON_X86)
  if (has_byte_permutations())
    look_up = streams ? look_up_16_streamed : look_up_16_stored;
#else
  (void)streams;
#endif
  for (int64_t block = from; block < to; block++) {
    float products[256], scale = scale_at(&w->scale, block);
    uint16_t table[256];
    int64_t start = block * w->block_size;
    for (int k = 0; k < 256; k++) products[k] = w->codebook[k] * scale;
    narrow(products, 256, dtype, table);
    look_up(w->codes + start, length_of(block, n, w->block_size), table, out + start);
  }
}

/* `absmax` is float32, or uint8 codes of `levels`, which is null otherwise. */
void gptj8_dequantize(const uint8_t *codes, int64_t n, int64_t block_size, const void *absmax,
                      const float *levels, const float *codebook, void *out, int64_t dtype,
                      int64_t threads) {
  const matrix w = matrix_of(codes, 1, n, block_size, absmax, levels, codebook);
  const machine *with = restorer_for(&w);
  int streams = n >= STREAMED && (uintptr_t)out % 64 == 0;
  if (dtype != FLOAT32 && block_size >= TABLE_BLOCK) {
    int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
      restore_from_products(&w, blocks * thread / threads, blocks * (thread + 1) / threads, n, out,
                            (int)dtype, streams);
    return;
  }
  int64_t step = with ? with->step : 64, steps = n / step;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++) {
    int64_t from = steps * thread / threads * step, to = steps * (thread + 1) / threads * step;
    if (with)
      with->restore(&w, from, to, out, (int)dtype, streams);
    else
      restore_plainly(&w, from, to, out, (int)dtype);
  }
  restore_plainly(&w, steps * step, n, out, (int)dtype);
}

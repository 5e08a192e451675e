/* Products with one to eight rows in bfloat16, for machines whose AVX-512 multiplies it.

   The codebook is rounded to bfloat16 and the sum of each block is multiplied by its scale. A product
   with few rows is limited by memory bandwidth; this one reads one byte per weight. */

#include "common.h"

#define MAX_ROWS 8

static inline int64_t segment_end(int64_t at, int64_t row_end, int64_t block_size) {
  int64_t end = (at / block_size + 1) * block_size;
  return end < row_end ? end : row_end;
}

#if defined(ON_X86)
#include <immintrin.h>

#define WITH_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")))

/* Look up 64 codes as bfloat16 values, in the order that results from unpacking bytes. `x` is
   reordered in the same way once, so dot products do not change. */
typedef struct {
  __m512i low[4], high[4];
} byte_tables;

WITH_BFLOAT16 static inline void look_up_64(const uint8_t *codes, const byte_tables *tables,
                                            __m512bh *first, __m512bh *second) {
  __m512i code = _mm512_loadu_si512(codes);
  __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i low = _mm512_mask_blend_epi8(
      upper, _mm512_permutex2var_epi8(tables->low[0], code, tables->low[1]),
      _mm512_permutex2var_epi8(tables->low[2], code, tables->low[3]));
  __m512i high = _mm512_mask_blend_epi8(
      upper, _mm512_permutex2var_epi8(tables->high[0], code, tables->high[1]),
      _mm512_permutex2var_epi8(tables->high[2], code, tables->high[3]));
  *first = (__m512bh)_mm512_unpacklo_epi8(low, high);
  *second = (__m512bh)_mm512_unpackhi_epi8(low, high);
}

/* Multiply one row of codes by ROWS rows of x. ROWS is a constant, so the sums stay in registers. */
#define DEFINE_ROW(ROWS)                                                                          \
  WITH_BFLOAT16 static void row_##ROWS(const uint8_t *codes, int64_t row, int64_t in,             \
                                       int64_t block_size, const scales *from,                    \
                                       const byte_tables *tables, const uint16_t *x, float *sums) { \
    __m512 totals[ROWS];                                                                          \
    for (int t = 0; t < ROWS; t++) totals[t] = _mm512_setzero_ps();                               \
    for (int64_t at = row; at < row + in;) {                                                      \
      int64_t end = segment_end(at, row + in, block_size);                                        \
      __m512 scale = _mm512_set1_ps(scale_at(from, at / block_size));                             \
      if (block_size == 32) { /* the lower half of each sum belongs to the first block of two */ \
        __m512 second = _mm512_set1_ps(scale_at(from, at / 32 + 1));                              \
        scale = _mm512_mask_blend_ps(0xff00, scale, second);                                      \
        end = at + 64;                                                                            \
      }                                                                                           \
      __m512 part[ROWS];                                                                          \
      for (int t = 0; t < ROWS; t++) part[t] = _mm512_setzero_ps();                               \
      for (; at < end; at += 64) {                                                                \
        __m512bh first, second;                                                                   \
        _mm_prefetch((const char *)(codes + at + AHEAD), _MM_HINT_T0);                            \
        look_up_64(codes + at, tables, &first, &second);                                          \
        for (int t = 0; t < ROWS; t++) {                                                          \
          const uint16_t *values = x + t * in + (at - row);                                       \
          part[t] = _mm512_dpbf16_ps(part[t], first, (__m512bh)_mm512_loadu_si512(values));       \
          part[t] = _mm512_dpbf16_ps(part[t], second, (__m512bh)_mm512_loadu_si512(values + 32)); \
        }                                                                                         \
      }                                                                                           \
      for (int t = 0; t < ROWS; t++) totals[t] = _mm512_fmadd_ps(part[t], scale, totals[t]);      \
    }                                                                                             \
    for (int t = 0; t < ROWS; t++) sums[t] = _mm512_reduce_add_ps(totals[t]);                     \
  }

DEFINE_ROW(1)
DEFINE_ROW(2)
DEFINE_ROW(3)
DEFINE_ROW(4)
DEFINE_ROW(5)
DEFINE_ROW(6)
DEFINE_ROW(7)
DEFINE_ROW(8)

WITH_BFLOAT16 static void linear_bfloat16(const uint16_t *x, int64_t rows, const uint8_t *codes,
                                          int64_t out, int64_t in, int64_t block_size,
                                          const scales *scale, const float *codebook, uint16_t *y,
                                          uint16_t *ordered, int64_t threads) {
  static void (*const kernels[])(const uint8_t *, int64_t, int64_t, int64_t, const scales *,
                                 const byte_tables *, const uint16_t *, float *) = {
      row_1, row_2, row_3, row_4, row_5, row_6, row_7, row_8};
  uint8_t low_bytes[256], high_bytes[256];
  for (int k = 0; k < 256; k++) {
    uint16_t value = to_bfloat16(codebook[k]);
    low_bytes[k] = (uint8_t)value;
    high_bytes[k] = (uint8_t)(value >> 8);
  }
  byte_tables tables;
  for (int part = 0; part < 4; part++) {
    tables.low[part] = _mm512_loadu_si512(low_bytes + 64 * part);
    tables.high[part] = _mm512_loadu_si512(high_bytes + 64 * part);
  }
  for (int64_t at = 0; at < rows * in; at += 64)
    for (int eight = 0; eight < 8; eight++) /* groups 0 2 4 6, then 1 3 5 7 */
      memcpy(ordered + at + 8 * eight, x + at + 8 * (eight < 4 ? 2 * eight : 2 * eight - 7),
             8 * sizeof *x);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < out; r++) {
    float sums[MAX_ROWS];
    kernels[rows - 1](codes, r * in, in, block_size, scale, &tables, ordered, sums);
    for (int64_t t = 0; t < rows; t++) y[t * out + r] = to_bfloat16(sums[t]);
  }
}
#endif

/* x and y are bfloat16; `in` is a multiple of 64; `ordered` has room for a copy of x. */
void gptj8_linear_bfloat16(const uint16_t *x, int64_t rows, const uint8_t *codes, int64_t out,
                           int64_t in, int64_t block_size, const void *absmax, const float *levels,
                           const float *codebook, uint16_t *y, uint16_t *ordered, int64_t threads) {
#if defined(ON_X86)
  scales scale = scales_of(absmax, levels);
  linear_bfloat16(x, rows, codes, out, in, block_size, &scale, codebook, y, ordered, threads);
#else
  (void)x, (void)rows, (void)codes, (void)out, (void)in, (void)block_size, (void)absmax;
  (void)levels, (void)codebook, (void)y, (void)ordered, (void)threads;
#endif
}

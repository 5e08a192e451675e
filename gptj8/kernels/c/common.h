/* What the CPU kernels share: number formats, scales, and functions for an instruction set.

   Results are bit-identical to gptj8/kernels/reference.py, except for the order of sums. Every file
   must be compiled without contraction into fused multiply-adds and without relaxed math: division,
   multiplication and rounding then follow IEEE 754. gptj8/kernels/cpu.py loads the library and
   documents the arguments. */

#ifndef GPTJ8_COMMON_H
#define GPTJ8_COMMON_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Codes are prefetched one page ahead. The hardware prefetcher stops at the end of each 4 KB page,
   and its restarts took half the time of a product with one row. */
#define AHEAD 4096
/* Number of weights from which the restored tensor (32 MB) no longer fits into the caches. */
#define STREAMED (1 << 24)

#if defined(__x86_64__) && defined(__GNUC__)
#define ON_X86 1
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define ON_ARM 1
#endif

/* Plain C that is compiled for several instruction sets; one is selected when the library is
   loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

static inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* Valid for finite values only; infinity would become 65536. */
static inline float from_half(uint16_t half) {
  float magnitude = as_float((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
  return as_float(as_bits(magnitude) | (uint32_t)(half & 0x8000) << 16);
}

/* Round to nearest, ties to even. */
static inline uint16_t to_bfloat16(float value) {
  uint32_t bits = as_bits(value);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Round to nearest, ties to even; values that are too large become infinite. */
static inline uint16_t to_half(float value) {
  uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) /* subnormal: the addition does the rounding */
    return (uint16_t)(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

/* Scales are float32, or codes of 256 float32 levels. */
typedef struct {
  const float *absmax;
  const uint8_t *codes;
  const float *levels;
} scales;

static inline scales scales_of(const void *absmax, const float *levels) {
  scales found = {levels ? 0 : (const float *)absmax, levels ? (const uint8_t *)absmax : 0, levels};
  return found;
}

static inline float scale_at(const scales *from, int64_t block) {
  return from->levels ? from->levels[from->codes[block]] : from->absmax[block];
}

static inline int64_t length_of(int64_t block, int64_t n, int64_t block_size) {
  int64_t left = n - block * block_size;
  return left < block_size ? left : block_size;
}

/* A codebook of 16 lines: value[16 h + l] = (start[h] + slope[h] * l) / LINE_UNIT, the format that
   gptj8/quantization/codebooks.py fits for short blocks. A code is decoded by 16-entry byte shuffles
   and exact integers instead of a lookup in memory. */
#define LINE_UNIT 8192
typedef struct {
  int16_t start[16];
  uint8_t slope[16];
} lines;

/* A matrix of codes (rows, columns), and how to restore it. */
typedef struct {
  const uint8_t *codes;
  int64_t rows, columns, block_size, shift; /* block_size = 1 << shift */
  scales scale;
  const float *codebook;
  int has_lines; /* whether the codebook consists of `lines` */
  lines lines;
} matrix;

#if defined(__GNUC__)
#pragma GCC visibility push(hidden) /* names that are not for cpu.py */
#endif

matrix matrix_of(const uint8_t *codes, int64_t rows, int64_t columns, int64_t block_size,
                 const void *absmax, const float *levels, const float *codebook);

/* Functions for one instruction set (see products.h), for matrices whose columns are a multiple of
   `step`, and runs of codes whose ends are. */
typedef struct {
  int64_t step;
  /* Restore the codes `from` to `to` of a flat matrix to `dtype`. */
  void (*restore)(const matrix *w, int64_t from, int64_t to, void *out, int dtype, int streams);
  /* y (count, rows) = x (count, columns) W^T, for rows `from` to `to` of W. */
  void (*product)(const matrix *w, const float *x, int64_t count, int64_t from, int64_t to, float *y);
  /* x (count, columns) = y (count, rows) W, for columns `from` to `to` of W. */
  void (*transposed)(const matrix *w, const float *y, int64_t count, int64_t from, int64_t to,
                     float *x);
} machine;

#if defined(ON_X86)
extern const machine gptj8_avx2, gptj8_avx512, gptj8_avx512_vbmi, gptj8_avx512_bf16;
#elif defined(ON_ARM)
extern const machine gptj8_neon;
#endif

/* Return the functions of this machine that multiply by, or restore, a matrix fastest; or null. */
const machine *multiplier_for(const matrix *w);
const machine *restorer_for(const matrix *w);

/* Return whether AVX-512 VBMI may be used. */
int has_byte_permutations(void);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif

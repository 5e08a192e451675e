/* Runs the kernels on what it reads and writes what they return, for machines that run no Python:
   test_neon.py compiles it for another processor and starts it in an emulator.

   Input: out, columns, block_size, has_levels, rows, threads (int64 each), codes, scales, levels (if
   any), codebook, x (rows, columns), y (rows, out). Output: the instruction set (int64), restored
   weights in float32, float16 and bfloat16, x W^T, y W. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void gptj8_dequantize(const uint8_t *, int64_t, int64_t, const void *, const float *, const float *,
                      void *, int64_t, int64_t);
void gptj8_product(const float *, int64_t, const uint8_t *, int64_t, int64_t, int64_t, const void *,
                   const float *, const float *, float *, int64_t);
void gptj8_product_transposed(const float *, int64_t, const uint8_t *, int64_t, int64_t, int64_t,
                              const void *, const float *, const float *, float *, int64_t);
int64_t gptj8_multiplies(int64_t, const float *);
int64_t gptj8_instruction_set(void);

static void *take(size_t bytes) {
  void *place = malloc(bytes ? bytes : 1);
  if (!place || fread(place, 1, bytes, stdin) != bytes) exit(3);
  return place;
}

static void give(const void *place, size_t bytes) {
  if (fwrite(place, 1, bytes, stdout) != bytes) exit(4);
}

int main(void) {
  int64_t *size = take(6 * sizeof(int64_t));
  int64_t out = size[0], columns = size[1], block_size = size[2], rows = size[4], threads = size[5];
  int64_t n = out * columns, blocks = (n + block_size - 1) / block_size;
  uint8_t *codes = take((size_t)n);
  void *scales = take((size_t)blocks * (size[3] ? 1 : 4));
  float *levels = size[3] ? take(256 * 4) : NULL, *codebook = take(256 * 4);
  float *x = take((size_t)(rows * columns) * 4), *y = take((size_t)(rows * out) * 4);
  int64_t isa = gptj8_instruction_set();
  give(&isa, sizeof isa);
  void *restored = malloc((size_t)n * 4);
  for (int64_t dtype = 0; dtype < 3; dtype++) {
    gptj8_dequantize(codes, n, block_size, scales, levels, codebook, restored, dtype, threads);
    give(restored, (size_t)n * (dtype ? 2 : 4));
  }
  if (!gptj8_multiplies(columns, codebook)) return 0;
  float *made = malloc((size_t)(rows * (out > columns ? out : columns)) * 4);
  gptj8_product(x, rows, codes, out, columns, block_size, scales, levels, codebook, made, threads);
  give(made, (size_t)(rows * out) * 4);
  gptj8_product_transposed(y, rows, codes, out, columns, block_size, scales, levels, codebook, made,
                           threads);
  give(made, (size_t)(rows * columns) * 4);
  return 0;
}

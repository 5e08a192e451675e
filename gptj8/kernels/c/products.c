/* Products with a matrix of codes in float32, without a restored matrix in memory.

   y[t][r] = sum of codebook[codes[r][c]] * scale of the block * x[t][c], and its transpose. */

#include "common.h"

#define MAX_ROWS 8
#define CHUNK 256

static inline int64_t segment_end(int64_t at, int64_t row_end, int64_t block_size) {
  int64_t end = (at / block_size + 1) * block_size;
  return end < row_end ? end : row_end;
}

/* Restore the codes from `at` to `at + count`, which may begin and end inside a block. */
FOR_EACH_MACHINE
static void restore_any(const uint8_t *codes, int64_t at, int64_t count, int64_t block_size,
                        const scales *scale, const float *codebook, float *restored) {
  for (int64_t end, stop = at + count; at < stop; at = end) {
    end = segment_end(at, stop, block_size);
    float factor = scale_at(scale, at / block_size);
    for (int64_t i = at; i < end; i++) *restored++ = codebook[codes[i]] * factor;
  }
}

/* sums[t] += sum of restored[i] * x[t][i], using 16 partial sums per row. */
FOR_EACH_MACHINE
static void multiply_add(const float *restored, int64_t count, const float *x, int64_t stride,
                         int64_t rows, float *sums) {
  for (int64_t t = 0; t < rows; t++) {
    const float *values = x + t * stride;
    float lanes[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
      for (int lane = 0; lane < 16; lane++) lanes[lane] += restored[i + lane] * values[i + lane];
    for (; i < count; i++) lanes[0] += restored[i] * values[i];
    for (int lane = 0; lane < 16; lane++) sum += lanes[lane];
    sums[t] += sum;
  }
}

/* Return whether gptj8_product and gptj8_product_transposed have kernels for a matrix: 2 if its
   codebook consists of lines, which are fastest, 1 for others, 0 if there are none. */
int64_t gptj8_multiplies(int64_t columns, const float *codebook) {
  const matrix w = matrix_of(0, 0, columns, 1, 0, 0, codebook);
  const machine *with = multiplier_for(&w);
  if (!with || columns % with->step) return 0;
  return w.has_lines ? 2 : 1;
}

/* y (count, rows) = x (count, columns) W^T, for a matrix that gptj8_multiplies accepts. */
void gptj8_product(const float *x, int64_t count, const uint8_t *codes, int64_t rows,
                   int64_t columns, int64_t block_size, const void *absmax, const float *levels,
                   const float *codebook, float *y, int64_t threads) {
  const matrix w = matrix_of(codes, rows, columns, block_size, absmax, levels, codebook);
  const machine *with = multiplier_for(&w);
  int64_t groups = (rows + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++) {
    int64_t from = groups * thread / threads * 4, to = groups * (thread + 1) / threads * 4;
    with->product(&w, x, count, from, to < rows ? to : rows, y);
  }
}

/* x (count, columns) = y (count, rows) W, likewise. */
void gptj8_product_transposed(const float *y, int64_t count, const uint8_t *codes, int64_t rows,
                              int64_t columns, int64_t block_size, const void *absmax,
                              const float *levels, const float *codebook, float *x,
                              int64_t threads) {
  const matrix w = matrix_of(codes, rows, columns, block_size, absmax, levels, codebook);
  const machine *with = multiplier_for(&w);
  int64_t steps = columns / with->step;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++)
    with->transposed(&w, y, count, steps * thread / threads * with->step,
                     steps * (thread + 1) / threads * with->step, x);
}

/* The same as gptj8_product for any matrix and at most MAX_ROWS rows of x, in plain C. */
void gptj8_product_plain(const float *x, int64_t count, const uint8_t *codes, int64_t rows,
                         int64_t columns, int64_t block_size, const void *absmax,
                         const float *levels, const float *codebook, float *y, int64_t threads) {
  scales scale = scales_of(absmax, levels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float sums[MAX_ROWS] = {0}, restored[CHUNK];
    for (int64_t start = 0; start < columns; start += CHUNK) {
      int64_t length = columns - start < CHUNK ? columns - start : CHUNK;
      restore_any(codes, r * columns + start, length, block_size, &scale, codebook, restored);
      multiply_add(restored, length, x + start, columns, count, sums);
    }
    for (int64_t t = 0; t < count; t++) y[t * rows + r] = sums[t];
  }
}

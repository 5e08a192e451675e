/* Quantization of a tensor: absmax, histogram, codes, scales and errors, byte for byte like
   gptj8/kernels/reference.py.

   Each function takes a complete tensor as a flat row of `n` numbers in blocks of `block_size` (the
   last block may be shorter) and distributes the blocks over `threads`. */

#include "common.h"

#define MAX_BLOCK 4096
#define CELLS 4096
/* Of search_levels; see reference.py. */
#define SEARCH_CELLS 4096
#define SEARCH_UNIT 65536.0f
#define SEARCH_LIMIT 4095

/* Return a block as float32, converted in `buffer` unless it is float32 already. */
FOR_EACH_MACHINE
static const float *widen(const void *source, int dtype, int64_t start, int64_t length,
                          float *buffer) {
  if (dtype == FLOAT32) return (const float *)source + start;
  const uint16_t *bits = (const uint16_t *)source + start;
  if (dtype == FLOAT16)
    for (int64_t i = 0; i < length; i++) buffer[i] = from_half(bits[i]);
  else
    for (int64_t i = 0; i < length; i++) buffer[i] = as_float((uint32_t)bits[i] << 16);
  return buffer;
}

/* Return the largest magnitude of a block; NaN or infinite if any weight in it is.
   Magnitudes are compared as integers, which have the same order as the floats, with NaN last. */
FOR_EACH_MACHINE
static float absmax_of(const void *weight, int dtype, int64_t start, int64_t length) {
  if (dtype == FLOAT32) {
    const uint32_t *bits = (const uint32_t *)weight + start;
    uint32_t largest = 0;
    for (int64_t i = 0; i < length; i++) {
      uint32_t magnitude = bits[i] & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    return as_float(largest);
  }
  const uint16_t *bits = (const uint16_t *)weight + start;
  uint16_t largest = 0;
  for (int64_t i = 0; i < length; i++) {
    uint16_t magnitude = bits[i] & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (dtype == BFLOAT16) return as_float((uint32_t)largest << 16);
  if (largest >= 0x7c00) return largest == 0x7c00 ? INFINITY : NAN;
  return from_half(largest);
}

void gptj8_absmax(const void *weight, int64_t dtype, int64_t n, int64_t block_size, float *absmax,
                  int64_t threads) {
  int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++)
    absmax[block] =
        absmax_of(weight, dtype, block * block_size, length_of(block, n, block_size));
}

/* Compute the histogram bins over [-1, 1] of the weights of a block divided by its absmax. */
FOR_EACH_MACHINE
static void bins_of(const float *values, int64_t length, float absmax, float half_bins, int32_t *bin) {
  float divisor = absmax > 0 ? absmax : 1.0f;
  for (int64_t i = 0; i < length; i++) bin[i] = (int32_t)((values[i] / divisor + 1.0f) * half_bins);
}

/* mass[bin] += block_mass[block] for each weight. The masses are integers whose sums stay below 2^53,
   so the order of addition does not change the result. `mass` has `threads` rows of `bins` zeros; the
   sum of the rows is the histogram. */
void gptj8_histogram(const void *weight, int64_t dtype, int64_t n, int64_t block_size,
                     const float *absmax, const double *block_mass, double *mass, int64_t bins,
                     int64_t threads) {
  int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++) {
    double *row = mass + thread * bins;
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
      float buffer[MAX_BLOCK];
      int32_t bin[MAX_BLOCK];
      int64_t length = length_of(block, n, block_size);
      const float *values = widen(weight, dtype, block * block_size, length, buffer);
      bins_of(values, length, absmax[block], (float)bins / 2, bin);
      for (int64_t i = 0; i < length; i++) row[bin[i] < bins ? bin[i] : bins - 1] += block_mass[block];
    }
  }
}

/* codes[i] = number of boundaries below values[i] / absmax.
   The search starts at first[cell], the number of boundaries in lower cells of [-1, 1]. Most cells
   hold at most one boundary, so every weight takes one step, and a second loop runs only if a weight
   needs more. */
FOR_EACH_MACHINE
static void encode_block(const float *values, int64_t length, float absmax, const float *boundaries,
                         const int32_t *first, uint8_t *codes) {
  float divisor = absmax > 0 ? absmax : 1.0f;
  for (int64_t start = 0; start < length; start += 256) {
    float normalized[256];
    int32_t code[256], missed = 0;
    int64_t count = length - start < 256 ? length - start : 256;
    for (int64_t i = 0; i < count; i++) {
      float x = values[start + i] / divisor;
      int32_t at = first[(int32_t)((x + 1.0f) * (CELLS / 2))];
      at += boundaries[at] < x;
      missed |= boundaries[at] < x;
      normalized[i] = x;
      code[i] = at;
    }
    if (missed)
      for (int64_t i = 0; i < count; i++)
        while (boundaries[code[i]] < normalized[i]) code[i]++;
    for (int64_t i = 0; i < count; i++) codes[start + i] = (uint8_t)code[i];
  }
}

/* `boundaries` has 256 values, the last of which is infinite; `first` has CELLS + 1. */
void gptj8_encode(const void *weight, int64_t dtype, int64_t n, int64_t block_size, const float *absmax,
                  const float *boundaries, const int32_t *first, uint8_t *codes, int64_t threads) {
  int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float buffer[MAX_BLOCK];
    int64_t start = block * block_size, length = length_of(block, n, block_size);
    const float *values = widen(weight, dtype, start, length, buffer);
    encode_block(values, length, absmax[block], boundaries, first, codes + start);
  }
}

/* Sum the squared errors of a block divided by `scale`, in units of 1 / SEARCH_UNIT^2. */
FOR_EACH_MACHINE
static int64_t search_error(const float *values, int64_t length, float scale, const float *nearest) {
  float divisor = scale > 0 ? scale : 1.0f;
  int64_t sum = 0;
  for (int64_t start = 0; start < length; start += 128) { /* as many squares fit into 32 bits */
    int64_t count = length - start < 128 ? length - start : 128;
    int32_t part = 0;
    for (int64_t i = 0; i < count; i++) {
      float x = values[start + i] / divisor;
      int32_t cell = (int32_t)((x + 1.0f) * (SEARCH_CELLS / 2));
      cell = cell < 0 ? 0 : cell < SEARCH_CELLS ? cell : SEARCH_CELLS - 1;
      int32_t error = (int32_t)((x - nearest[cell]) * SEARCH_UNIT);
      error = error < SEARCH_LIMIT ? error : SEARCH_LIMIT;
      error = error > -SEARCH_LIMIT ? error : -SEARCH_LIMIT;
      part += error * error;
    }
    sum += part;
  }
  return sum;
}

/* best[block] = the level with the smallest squared error, of `candidates` levels from absmax[block]
   on. */
void gptj8_search_levels(const void *weight, int64_t dtype, int64_t n, int64_t block_size,
                         const uint8_t *absmax, const float *levels, const float *nearest,
                         int64_t candidates, uint8_t *best, int64_t threads) {
  int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float buffer[MAX_BLOCK];
    int64_t length = length_of(block, n, block_size);
    const float *values = widen(weight, dtype, block * block_size, length, buffer);
    double lowest = INFINITY;
    best[block] = absmax[block];
    for (int64_t level = absmax[block]; level < absmax[block] + candidates && level < 256; level++) {
      double scale = levels[level], total = (double)search_error(values, length, levels[level], nearest);
      double squared = total * (scale * scale);
      if (squared < lowest) lowest = squared, best[block] = (uint8_t)level;
    }
  }
}

FOR_EACH_MACHINE
static void restore_block(const uint8_t *codes, int64_t length, float absmax, const float *codebook,
                          float *restored) {
  for (int64_t i = 0; i < length; i++) restored[i] = codebook[codes[i]] * absmax;
}

/* Sum the squares of a block and of its errors in double. */
FOR_EACH_MACHINE
static void squares_of(const float *values, const float *restored, int64_t length, double *error,
                       double *norm) {
  double errors[8] = {0}, norms[8] = {0};
  int64_t i = 0;
  for (; i + 8 <= length; i += 8)
    for (int lane = 0; lane < 8; lane++) {
      double value = values[i + lane], difference = restored[i + lane] - values[i + lane];
      errors[lane] += difference * difference;
      norms[lane] += value * value;
    }
  for (; i < length; i++) {
    double value = values[i], difference = restored[i] - values[i];
    errors[0] += difference * difference;
    norms[0] += value * value;
  }
  *error = *norm = 0;
  for (int lane = 0; lane < 8; lane++) *error += errors[lane], *norm += norms[lane];
}

/* `error` and `norm` receive one sum per block. */
void gptj8_squared_errors(const void *weight, int64_t dtype, int64_t n, int64_t block_size,
                          const uint8_t *codes, const float *absmax, const float *codebook,
                          double *error, double *norm, int64_t threads) {
  int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float buffer[MAX_BLOCK], restored[MAX_BLOCK];
    int64_t start = block * block_size, length = length_of(block, n, block_size);
    const float *values = widen(weight, dtype, start, length, buffer);
    restore_block(codes + start, length, absmax[block], codebook, restored);
    squares_of(values, restored, length, error + block, norm + block);
  }
}


/* Products of one or two rows with a matrix of lines, in integers.

   One row is limited by decoding. Here a code stays an integer of 16 bits, even and odd codes apart,
   and is multiplied by two integers that make up a number of x, so that nothing is unpacked or
   converted to float32. 64 numbers of x share a power of two as their unit: the upper integer has 15
   bits, the lower one 14 more. That is finer than float32 for the largest of the 64 and at least as
   fine as the rounding of their sum for the others; the integer sums themselves are exact. */

#define INPUT_BLOCK 64 /* 64 products of 13 and 14 bits in 8 sums fit 32 bits */
#define LOWER_BITS 14
#define DECODED_LINE (1.0f / LINE_UNIT)

/* Decode STEP codes as integers in units of 1 / LINE_UNIT. */
ALWAYS_INLINE void decode_pairs(const uint8_t *codes, const line_tables *with, integers *even,
                                integers *odd) {
  integers code = integers_load(codes);
  integers h = integers_and(integers_right(code, 4), integers_set_bytes(15));
  integers low = integers_shuffle(with->start_low, h);
  integers high = integers_shuffle(with->start_high, h);
  integers slope = integers_shuffle(with->slope, h);
  integers even_step = integers_multiply_bytes(slope, integers_and(code, integers_set(0x000f)));
  integers odd_step = integers_multiply_bytes(slope, integers_and(code, integers_set(0x0f00)));
  integers lower_byte = integers_set(0x00ff);
  *even = integers_add_16(
      even_step, integers_or(integers_and(low, lower_byte), integers_left(high, 8)));
  *odd = integers_add_16(
      odd_step, integers_or(integers_right(low, 8), integers_without(lower_byte, high)));
}

/* Split 64 numbers into integers of STEP / 2 even and odd numbers, upper and lower parts. Return the
   value of 1 in the upper integers, or -1 if a number is not finite or all are too small for powers of
   two that float32 has. */
static float split_block(const float *x, int16_t *parts) {
  float largest = 0;
  for (int i = 0; i < INPUT_BLOCK; i++) {
    float size = fabsf(x[i]);
    if (!(size <= FLT_MAX)) return -1;
    largest = size > largest ? size : largest;
  }
  if (largest == 0) {
    memset(parts, 0, 2 * INPUT_BLOCK * sizeof *parts);
    return 0;
  }
  if (largest < 0x1p-90f) return -1;
  int exponent;
  frexpf(largest, &exponent); /* largest < 2^exponent */
  float up = ldexpf(1.0f, LOWER_BITS - exponent), finer = (float)(1 << LOWER_BITS);
  for (int i = 0; i < INPUT_BLOCK; i++) {
    float scaled = x[i] * up, upper = rintf(scaled), lower = rintf((scaled - upper) * finer);
    int16_t *place = parts + i / STEP * 2 * STEP + i % 2 * (STEP / 2) + i % STEP / 2;
    place[0] = (int16_t)upper;
    place[STEP] = (int16_t)lower;
  }
  return ldexpf(1.0f, exponent - LOWER_BITS);
}

/* y[t] = row of W times row t of x, for ROWS rows whose parts are 2 * columns apart. */
ALWAYS_INLINE void multiply_parts(const matrix *w, const line_tables *with, const int16_t *parts,
                                  const float *units, int64_t row, int rows, float *y) {
  const int64_t columns = w->columns;
  const uint8_t *codes = w->codes + row * columns;
  vector total[2];
  for (int t = 0; t < rows; t++) total[t] = vector_zero();
  for (int64_t at = 0; at < columns; at += INPUT_BLOCK) {
    integers upper[2], lower[2];
    vector scale[2];
    for (int step = 0; step < INPUT_BLOCK / STEP; step++) {
      integers even, odd;
      prefetch(codes + at + step * STEP + AHEAD);
      decode_pairs(codes + at + step * STEP, with, &even, &odd);
      int is_first = step == 0 || w->block_size < INPUT_BLOCK;
      for (int t = 0; t < rows; t++) {
        const int16_t *part = parts + 2 * (t * columns + at + step * STEP);
        integers high = integers_add_32(integers_multiply(even, integers_load(part)),
                                        integers_multiply(odd, integers_load(part + STEP / 2)));
        integers low = integers_add_32(integers_multiply(even, integers_load(part + STEP)),
                                       integers_multiply(odd, integers_load(part + STEP + STEP / 2)));
        upper[t] = is_first ? high : integers_add_32(upper[t], high);
        lower[t] = is_first ? low : integers_add_32(lower[t], low);
      }
      if (step + 1 < INPUT_BLOCK / STEP && w->block_size >= INPUT_BLOCK) continue;
      int64_t block = (row * columns + at + step * STEP) >> w->shift;
      for (int t = 0; t < rows; t++) {
        float unit = units[(t * columns + at) / INPUT_BLOCK] * DECODED_LINE;
        scale[t] = vector_set(scale_at(&w->scale, block) * unit);
        if (STEP > 32 && w->block_size == 32)
          scale[t] = vector_halves(scale[t], vector_set(scale_at(&w->scale, block + 1) * unit));
        vector smaller = vector_multiply(scale[t], vector_set(1.0f / (1 << LOWER_BITS)));
        total[t] = vector_multiply_add(vector_of(upper[t]), scale[t], total[t]);
        total[t] = vector_multiply_add(vector_of(lower[t]), smaller, total[t]);
      }
    }
  }
  for (int t = 0; t < rows; t++) y[t * w->rows] = vector_sum(total[t]);
}

/* Multiply one or two rows; return 0 if the matrix or the rows are not for this way, for example if a
   number is infinite. `room` has `size` bytes. */
static int multiply_few(const matrix *w, const float *x, int64_t count, int64_t from, int64_t to,
                        float *y, void *room, int64_t size) {
  int64_t n = count * w->columns;
  if (w->columns % INPUT_BLOCK || 4 * n + n / 16 > size) return 0;
  line_tables with = line_tables_of(&w->lines, 0);
  int16_t *parts = room;
  float *units = (float *)(parts + 2 * n);
  for (int64_t at = 0; at < n; at += INPUT_BLOCK) {
    units[at / INPUT_BLOCK] = split_block(x + at, parts + 2 * at);
    if (units[at / INPUT_BLOCK] < 0) return 0;
  }
  for (int64_t row = from; row < to; row++)
    if (count == 1)
      multiply_parts(w, &with, parts, units, row, 1, y + row);
    else
      multiply_parts(w, &with, parts, units, row, 2, y + row);
  return 1;
}

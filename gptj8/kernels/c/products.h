/* Products with a matrix of codes, for one instruction set.

   Included once per instruction set, after the header that defines its vectors. A few rows of codes
   are restored to a panel that stays in a core's caches and is multiplied right away, so a restored
   matrix is never written to memory:

     product     y = x W^T: rows of x and of W are multiplied along their columns. A tile of
                 TILE_ROWS x 4 sums stays in registers, each sum in LANES parts.
     transposed  x = y W: a tile of WIDE_ROWS x 2 vectors of x stays in registers, to which row
                 after row of W is added, multiplied by a number of y.

   The sum of a row is added up in the same order for any number of rows from three on. With one or two
   rows, codes are decoded in registers, without a panel. */

#define DEPTH 512       /* columns of a panel, or rows if transposed: 4 rows fit the first cache */
#define PANEL 64        /* rows of a panel: 128 KB, for the second cache */
#define FEW 16          /* rows of x up to which a panel has 4 rows and stays in the first cache */
#define INPUT_ROWS 6    /* rows of x that stay in the first cache beside 4 rows of a panel */
#define HALVES (STEP / LANES / 2)

/* Restore `count` codes, a multiple of STEP that begins at a multiple of 32. */
ALWAYS_INLINE void restore_run(const matrix *w, const tables *with, int64_t at, int64_t count,
                               float *out) {
  for (int64_t i = 0; i < count; i += STEP) {
    vector value[STEP / LANES];
    prefetch(w->codes + at + i + AHEAD);
    decode(w->codes + at + i, with, value);
    int64_t block = (at + i) >> w->shift;
    vector first = vector_set(scale_at(&w->scale, block) * DECODED_UNIT), second = first;
    if (STEP > 32 && w->block_size == 32)
      second = vector_set(scale_at(&w->scale, block + 1) * DECODED_UNIT);
    for (int q = 0; q < STEP / LANES; q++)
      vector_store(out + i + q * LANES, vector_multiply(value[q], q < HALVES ? first : second));
  }
}

/* y[t] = row of W times row t of x, for ROWS rows. */
ALWAYS_INLINE void multiply_row(const matrix *w, const tables *with, const float *x, int64_t row,
                                int rows, float *y) {
  const int64_t columns = w->columns;
  vector total[2];
  for (int t = 0; t < rows; t++) total[t] = vector_zero();
  for (int64_t at = 0; at < columns;) {
    int64_t place = row * columns + at;
    int64_t end = (((place >> w->shift) + 1) << w->shift) - row * columns;
    end = end < columns ? end : columns;
    vector part[2][2];
    for (int t = 0; t < rows; t++) part[t][0] = part[t][1] = vector_zero();
    float scale = scale_at(&w->scale, place >> w->shift) * DECODED_UNIT;
    if (STEP > 32 && w->block_size == 32) end = at + STEP;
    for (; at < end; at += STEP) {
      vector value[STEP / LANES];
      prefetch(w->codes + row * columns + at + AHEAD);
      decode(w->codes + row * columns + at, with, value);
      for (int t = 0; t < rows; t++)
        for (int q = 0; q < STEP / LANES; q++)
          part[t][q >= HALVES] = vector_multiply_add(
              value[q], vector_load(x + t * columns + at + q * LANES), part[t][q >= HALVES]);
    }
    if (STEP > 32 && w->block_size == 32) {
      float second = scale_at(&w->scale, place / 32 + 1) * DECODED_UNIT;
      for (int t = 0; t < rows; t++) {
        total[t] = vector_multiply_add(part[t][0], vector_set(scale), total[t]);
        total[t] = vector_multiply_add(part[t][1], vector_set(second), total[t]);
      }
    } else {
      for (int t = 0; t < rows; t++)
        total[t] = vector_multiply_add(vector_add(part[t][0], part[t][1]), vector_set(scale), total[t]);
    }
  }
  for (int t = 0; t < rows; t++) y[t * w->rows] = vector_sum(total[t]);
}

/* Add to y the product of `rows` rows of x and 4 rows of a panel, `wanted` of which are needed. */
ALWAYS_INLINE void multiply_tile(const float *x, int64_t columns, const float *panel, int64_t depth,
                                 int rows, int64_t wanted, float *y, int64_t stride, int is_first) {
  vector sum[TILE_ROWS][4];
  for (int t = 0; t < rows; t++)
    for (int r = 0; r < 4; r++) sum[t][r] = vector_zero();
  for (int64_t k = 0; k < depth; k += LANES) {
    vector input[TILE_ROWS];
    for (int t = 0; t < rows; t++) input[t] = vector_load(x + t * columns + k);
    for (int r = 0; r < 4; r++) {
      vector weight = vector_load(panel + r * DEPTH + k);
      for (int t = 0; t < rows; t++) sum[t][r] = vector_multiply_add(input[t], weight, sum[t][r]);
    }
  }
  for (int t = 0; t < rows; t++) {
    float found[4];
    store_sums(found, sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
    for (int64_t r = 0; r < wanted; r++)
      y[t * stride + r] = is_first ? found[r] : y[t * stride + r] + found[r];
  }
}

static void multiply_rows(const float *x, int64_t columns, const float *panel, int64_t depth,
                          int64_t rows, int64_t wanted, float *y, int64_t stride, int is_first) {
#define TILE(ROWS) multiply_tile(x, columns, panel, depth, ROWS, wanted, y, stride, is_first)
  switch (rows) {
    case 1: TILE(1); break;
    case 2: TILE(2); break;
    case 3: TILE(3); break;
#if TILE_ROWS > 3
    case 4: TILE(4); break;
    case 5: TILE(5); break;
    case 6: TILE(6); break;
#endif
  }
#undef TILE
}

/* Return the rows of the next tile, so that the tiles for `left` rows are nearly equal. */
static inline int64_t share_of(int64_t left, int64_t most) {
  int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

static void product(const matrix *w, const float *x, int64_t count, int64_t from, int64_t to,
                    float *y) {
  float panel[PANEL * DEPTH] __attribute__((aligned(64)));
  tables with = tables_of(w);
#ifdef INTEGER_ROWS
  if (count <= INTEGER_ROWS && multiply_few(w, x, count, from, to, y, panel, sizeof panel)) return;
#endif
  if (count <= 2) {
    for (int64_t row = from; row < to; row++)
      if (count == 1)
        multiply_row(w, &with, x, row, 1, y + row);
      else
        multiply_row(w, &with, x, row, 2, y + row);
    return;
  }
  const int64_t columns = w->columns, height = count <= FEW ? 4 : PANEL;
  const int64_t inputs = count <= FEW ? FEW : INPUT_ROWS;
  for (int64_t row = from; row < to; row += height) {
    int64_t rows = to - row < height ? to - row : height;
    for (int64_t start = 0; start < columns; start += DEPTH) {
      int64_t depth = columns - start < DEPTH ? columns - start : DEPTH;
      for (int64_t r = 0; r < rows; r++)
        restore_run(w, &with, (row + r) * columns + start, depth, panel + r * DEPTH);
      for (int64_t t0 = 0; t0 < count; t0 += inputs) {
        int64_t stop = t0 + inputs < count ? t0 + inputs : count;
        for (int64_t r = 0; r < rows; r += 4)
          for (int64_t t = t0, tile; t < stop; t += tile) {
            tile = share_of(stop - t, TILE_ROWS);
            multiply_rows(x + t * columns + start, columns, panel + r * DEPTH, depth, tile,
                          rows - r < 4 ? rows - r : 4, y + t * w->rows + row + r, w->rows,
                          start == 0);
          }
      }
    }
  }
}

#define SLICE (2 * LANES)
#define MOST 96   /* rows of y at once */
#define TALL 256  /* rows of a panel; its columns make up 128 KB */

/* Add `depth` rows of a slice, multiplied by `factors`, to `rows` rows of x. */
ALWAYS_INLINE void add_tile(const float *factors, const float *slice, int64_t depth, int rows,
                            float *x, int64_t columns, int is_first) {
  vector sum[WIDE_ROWS][2];
  for (int t = 0; t < rows; t++)
    for (int q = 0; q < 2; q++)
      sum[t][q] = is_first ? vector_zero() : vector_load(x + t * columns + q * LANES);
  for (int64_t k = 0; k < depth; k++) {
    vector first = vector_load(slice + k * SLICE), second = vector_load(slice + k * SLICE + LANES);
    for (int t = 0; t < rows; t++) {
      vector factor = vector_set(factors[k * rows + t]);
      sum[t][0] = vector_multiply_add(factor, first, sum[t][0]);
      sum[t][1] = vector_multiply_add(factor, second, sum[t][1]);
    }
  }
  for (int t = 0; t < rows; t++)
    for (int q = 0; q < 2; q++) vector_store(x + t * columns + q * LANES, sum[t][q]);
}

static void add_rows(const float *factors, const float *slice, int64_t depth, int64_t rows, float *x,
                     int64_t columns, int is_first) {
#define TILE(ROWS) add_tile(factors, slice, depth, ROWS, x, columns, is_first)
  switch (rows) {
    case 1: TILE(1); break;
    case 2: TILE(2); break;
    case 3: TILE(3); break;
    case 4: TILE(4); break;
    case 5: TILE(5); break;
    case 6: TILE(6); break;
#if WIDE_ROWS > 6
    case 7: TILE(7); break;
    case 8: TILE(8); break;
    case 9: TILE(9); break;
    case 10: TILE(10); break;
    case 11: TILE(11); break;
    case 12: TILE(12); break;
#endif
  }
#undef TILE
}

static void transposed(const matrix *w, const float *y, int64_t count, int64_t from, int64_t to,
                       float *x) {
  float panel[PANEL * DEPTH] __attribute__((aligned(64)));
  float factors[MOST * TALL] __attribute__((aligned(64)));
  tables with = tables_of(w);
  const int64_t columns = w->columns;
  /* A tall panel reads and writes x less often; a wide one reads codes in longer runs. */
  const int64_t height = count <= 48 ? 64 : TALL, most = PANEL * DEPTH / height;
  for (int64_t start = from; start < to; start += most) {
    int64_t width = to - start < most ? to - start : most;
    for (int64_t row = 0; row < w->rows; row += height) {
      int64_t depth = w->rows - row < height ? w->rows - row : height;
      for (int64_t k = 0; k < depth; k++) {
        float restored[DEPTH];
        restore_run(w, &with, (row + k) * columns + start, width, restored);
        for (int64_t c = 0; c < width; c += LANES)
          vector_store(panel + c / SLICE * height * SLICE + k * SLICE + c % SLICE,
                       vector_load(restored + c));
      }
      for (int64_t t0 = 0; t0 < count; t0 += MOST) {
        int64_t stop = t0 + MOST < count ? t0 + MOST : count;
        /* The numbers that a tile needs lie side by side; in y, rows may be a power of two apart,
           which the caches place on top of each other. */
        for (int64_t t = t0, tile; t < stop; t += tile) {
          tile = share_of(stop - t, WIDE_ROWS);
          for (int64_t r = 0; r < tile; r++)
            for (int64_t k = 0; k < depth; k++)
              factors[(t - t0) * height + k * tile + r] = y[(t + r) * w->rows + row + k];
        }
        for (int64_t c = 0; c < width; c += SLICE)
          for (int64_t t = t0, tile; t < stop; t += tile) {
            tile = share_of(stop - t, WIDE_ROWS);
            add_rows(factors + (t - t0) * height, panel + c * height, depth, tile,
                     x + t * columns + start + c, columns, row == 0);
          }
      }
    }
  }
}

/* Restore the codes `from` to `to`, which are multiples of STEP, to `dtype`. */
ALWAYS_INLINE void restore_as(const matrix *w, int64_t from, int64_t to, void *out, int dtype,
                              int streams) {
  tables with = tables_of(w);
  for (int64_t at = from; at < to; at += STEP) {
    vector value[STEP / LANES];
    prefetch(w->codes + at + AHEAD);
    decode(w->codes + at, &with, value);
    int64_t block = at >> w->shift;
    float first_scale = scale_at(&w->scale, block), second_scale = first_scale;
    if (STEP > 32 && w->block_size == 32) second_scale = scale_at(&w->scale, block + 1);
    /* Two multiplications, as the reference does: the first one is exact. */
    const vector unit = vector_set(DECODED_UNIT);
    vector first = vector_set(first_scale), second = vector_set(second_scale);
    for (int q = 0; q < STEP / LANES; q++)
      value[q] = vector_multiply(vector_multiply(value[q], unit), q < HALVES ? first : second);
#ifdef store_bfloat16
    /* The hardware rounds as the reference does, but flushes subnormal values to zero. A value is zero
       or at least 1 / LINE_UNIT, so with these scales there are none. */
    if (dtype == BFLOAT16 && first_scale >= 0x1p-100f && second_scale >= 0x1p-100f) {
      for (int q = 0; q < STEP / LANES; q += 2)
        store_bfloat16((uint16_t *)out + at + q * LANES, value[q], value[q + 1], streams);
      continue;
    }
#endif
    if (dtype == FLOAT32)
      for (int q = 0; q < STEP / LANES; q++) {
        float *place = (float *)out + at + q * LANES;
        if (streams)
          vector_stream(place, value[q]);
        else
          vector_store(place, value[q]);
      }
    else
      for (int q = 0; q < STEP / LANES; q += 2)
        store_narrowed((uint16_t *)out + at + q * LANES, value[q], value[q + 1], dtype, streams);
  }
  if (streams) streams_end();
}

static void restore(const matrix *w, int64_t from, int64_t to, void *out, int dtype, int streams) {
  /* Constants, so that each combination is compiled on its own. */
#define RESTORE(DTYPE)                          \
  if (streams)                                  \
    restore_as(w, from, to, out, DTYPE, 1);     \
  else                                          \
    restore_as(w, from, to, out, DTYPE, 0)
  if (dtype == FLOAT32) {
    RESTORE(FLOAT32);
  } else if (dtype == BFLOAT16) {
    RESTORE(BFLOAT16);
  } else {
    RESTORE(FLOAT16);
  }
#undef RESTORE
}

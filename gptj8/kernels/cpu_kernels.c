/* Block-wise 8-bit quantization on a CPU; results are bit-identical to gptj8/kernels/reference.py.

   Plain C for any compiler with OpenMP. gptj8/kernels/cpu.py loads the library and documents the
   arguments. Each function takes a complete tensor as a flat row of `n` numbers in blocks of
   `block_size` (the last block may be shorter) and distributes the blocks over `threads`.

   The file must be compiled without contraction into fused multiply-adds and without relaxed math.
   Division, multiplication and rounding then follow IEEE 754, so the results are byte-identical to
   the torch reference. If the compiler supports it, each function is built for several instruction
   sets, and one is selected when the library is loaded. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Increase it whenever a function or the meaning of an argument changes; cpu.py compares it. */
#define INTERFACE 4

#define MAX_BLOCK 4096
/* Blocks of at least this length use a table of all 256 products with their absmax. */
#define TABLE_BLOCK 1024
#define CELLS 4096
/* Of search_levels; see reference.py. */
#define SEARCH_CELLS 4096
#define SEARCH_UNIT 65536.0f
#define SEARCH_LIMIT 4095
/* Number of weights from which the restored tensor (32 MB) no longer fits into the caches. */
#define STREAMED (1 << 24)
/* Codes are prefetched one page ahead. The hardware prefetcher stops at the end of each 4 KB page,
   and its restarts took half the time of a product with one row. */
#define AHEAD 4096

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

enum dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

int gptj8_interface(void) { return INTERFACE; }

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

/* Look up each code in a table of 256 16-bit values. */
static void look_up_16(const uint8_t *codes, int64_t length, const uint16_t *table, uint16_t *out) {
  for (int64_t i = 0; i < length; i++) out[i] = table[codes[i]];
}

#if defined(__x86_64__) && defined(__GNUC__)
/* Look up 64 codes per iteration. The low and high bytes of the table fill four registers each. One
   permutation of two registers looks up 128 entries, and the top bit of the code selects one of two
   permutations. */
#define WITH_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))

WITH_VBMI static inline __attribute__((always_inline)) void look_up_16_vbmi(
    const uint8_t *codes, int64_t length, const uint16_t *table, uint16_t *out, int streams) {
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

#if defined(__x86_64__) && defined(__GNUC__)
/* The four bytes of the 256 float32 values of a codebook, each in four registers. */
typedef struct {
  __m512i byte[4][4];
} float_tables;

WITH_VBMI static void fill_float_tables(const float *codebook, float_tables *tables) {
  uint8_t bytes[256];
  for (int place = 0; place < 4; place++) {
    for (int k = 0; k < 256; k++) bytes[k] = (uint8_t)(as_bits(codebook[k]) >> (8 * place));
    for (int part = 0; part < 4; part++)
      tables->byte[place][part] = _mm512_loadu_si512(bytes + 64 * part);
  }
}

/* Look up 64 codes as float32 values; value[q] holds codes 16 q to 16 q + 15. */
WITH_VBMI static inline __attribute__((always_inline)) void look_up_floats(
    __m512i codes, const float_tables *tables, __m512 *value) {
  /* Unpacking works within 128-bit lanes and interleaves twice: lane j of the result q holds the
     codes 4 q to 4 q + 3 of lane j, so lane j gets codes 4 j to 4 j + 3 of each group of 16. */
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i code = _mm512_permutexvar_epi32(order, codes);
  __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i plane[4];
  for (int place = 0; place < 4; place++) {
    const __m512i *table = tables->byte[place];
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

/* Round 16 finite float32 values to bfloat16 like to_bfloat16; the hardware's conversion flushes
   subnormal values to zero. */
WITH_VBMI static inline __m256i rounded_bfloat16(__m512 value) {
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

WITH_VBMI static inline __m256i narrowed(__m512 value, int dtype) {
  return dtype == BFLOAT16
             ? rounded_bfloat16(value)
             : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Restore the blocks `from` to `to`, which are complete and hold 32 weights or a multiple of 64. */
WITH_VBMI static inline __attribute__((always_inline)) void restore_small_blocks(
    const uint8_t *codes, int64_t from, int64_t to, int64_t block_size, const scales *scale,
    const float_tables *tables, void *out, int dtype, int streams) {
  int64_t at = from * block_size, end = to * block_size;
  __m512 value[4];
  for (; at + 64 <= end; at += 64) {
    int64_t block = at / block_size;
    __m512 first = _mm512_set1_ps(scale_at(scale, block)), second = first;
    if (block_size == 32) second = _mm512_set1_ps(scale_at(scale, block + 1));
    _mm_prefetch((const char *)(codes + at + AHEAD), _MM_HINT_T0);
    look_up_floats(_mm512_loadu_si512(codes + at), tables, value);
    for (int q = 0; q < 4; q++) value[q] = _mm512_mul_ps(value[q], q < 2 ? first : second);
    for (int half = 0; half < 4; half += dtype == FLOAT32 ? 1 : 2) {
      __m512i wide = dtype == FLOAT32
                         ? _mm512_castps_si512(value[half])
                         : _mm512_inserti64x4(
                               _mm512_castsi256_si512(narrowed(value[half & 2], dtype)),
                               narrowed(value[(half & 2) + 1], dtype), 1);
      char *place = (char *)out + (at + 16 * half) * (dtype == FLOAT32 ? 4 : 2);
      if (streams)
        _mm512_stream_si512((void *)place, wide);
      else
        _mm512_storeu_si512(place, wide);
    }
  }
  if (at < end) { /* a last block of 32 */
    __m512 last = _mm512_set1_ps(scale_at(scale, to - 1));
    look_up_floats(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)(codes + at))), tables,
                   value);
    for (int q = 0; q < 2; q++, at += 16) {
      __m512 product = _mm512_mul_ps(value[q], last);
      if (dtype == FLOAT32)
        _mm512_storeu_ps((float *)out + at, product);
      else
        _mm256_storeu_si256((void *)((uint16_t *)out + at), narrowed(product, dtype));
    }
  }
  if (streams) _mm_sfence();
}

/* Call restore_small_blocks with constants, so that each combination is compiled on its own. */
WITH_VBMI static void restore_vbmi(const uint8_t *codes, int64_t from, int64_t to,
                                   int64_t block_size, const scales *scale,
                                   const float_tables *tables, void *out, int dtype, int streams) {
#define RESTORE(DTYPE)                                                                       \
  if (streams)                                                                               \
    restore_small_blocks(codes, from, to, block_size, scale, tables, out, DTYPE, 1);         \
  else                                                                                       \
    restore_small_blocks(codes, from, to, block_size, scale, tables, out, DTYPE, 0)
  if (dtype == FLOAT32) {
    RESTORE(FLOAT32);
  } else if (dtype == BFLOAT16) {
    RESTORE(BFLOAT16);
  } else {
    RESTORE(FLOAT16);
  }
#undef RESTORE
}
#endif

FOR_EACH_MACHINE
static void narrow(const float *values, int64_t length, int dtype, uint16_t *out) {
  if (dtype == BFLOAT16)
    for (int64_t i = 0; i < length; i++) out[i] = to_bfloat16(values[i]);
  else
    for (int64_t i = 0; i < length; i++) out[i] = to_half(values[i]);
}

/* `absmax` is float32, or uint8 codes of `levels`, which is null otherwise. */
void gptj8_dequantize(const uint8_t *codes, int64_t n, int64_t block_size, const void *absmax,
                      const float *levels, const float *codebook, void *out, int64_t dtype,
                      int64_t threads) {
  int64_t blocks = (n + block_size - 1) / block_size, done = 0;
  scales scale = scales_of(absmax, levels);
  void (*look_up)(const uint8_t *, int64_t, const uint16_t *, uint16_t *) = look_up_16;
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512vbmi")) {
    int streams = n >= STREAMED && (uintptr_t)out % 64 == 0 && block_size % 32 == 0;
    look_up = streams ? look_up_16_streamed : look_up_16_stored;
    if (dtype == FLOAT32 || block_size < TABLE_BLOCK) {
      float_tables tables;
      fill_float_tables(codebook, &tables);
      done = n / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int thread = 0; thread < threads; thread++) {
        /* Two blocks of 32 are restored at once. */
        int64_t from = done / 2 * thread / threads * 2;
        int64_t to = thread + 1 == threads ? done : done / 2 * (thread + 1) / threads * 2;
        restore_vbmi(codes, from, to, block_size, &scale, &tables, out, dtype, streams);
      }
    }
  }
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = done; block < blocks; block++) {
    int64_t start = block * block_size, length = length_of(block, n, block_size);
    float absmax_here = scale_at(&scale, block);
    if (dtype == FLOAT32) {
      restore_block(codes + start, length, absmax_here, codebook, (float *)out + start);
    } else if (block_size < TABLE_BLOCK) {
      float restored[TABLE_BLOCK];
      restore_block(codes + start, length, absmax_here, codebook, restored);
      narrow(restored, length, dtype, (uint16_t *)out + start);
    } else {
      float products[256];
      uint16_t table[256];
      for (int k = 0; k < 256; k++) products[k] = codebook[k] * absmax_here;
      narrow(products, 256, dtype, table);
      look_up(codes + start, length, table, (uint16_t *)out + start);
    }
  }
}

/* Products with few rows of x, computed directly from the codes.

   y[t][r] = sum of codebook[codes[r][c]] * scale of the block * x[t][c]

   A block may begin or end inside a row. A product with few rows is limited by memory bandwidth. This
   one reads one byte per weight and writes no restored weights, which moves a fifth of the bytes that
   restoring needs. */

#define MAX_ROWS 8

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

#if defined(__x86_64__) && defined(__GNUC__)
/* The same for whole groups of 64 codes that begin at a multiple of 64. */
WITH_VBMI static void restore_groups(const uint8_t *codes, int64_t at, int64_t count,
                                     int64_t block_size, const scales *scale,
                                     const float_tables *tables, float *restored) {
  __m512 value[4];
  for (int64_t i = 0; i < count; i += 64) {
    int64_t block = (at + i) / block_size;
    __m512 first = _mm512_set1_ps(scale_at(scale, block)), second = first;
    if (block_size == 32) second = _mm512_set1_ps(scale_at(scale, block + 1));
    look_up_floats(_mm512_loadu_si512(codes + at + i), tables, value);
    for (int q = 0; q < 4; q++)
      _mm512_storeu_ps(restored + i + 16 * q, _mm512_mul_ps(value[q], q < 2 ? first : second));
  }
}
#endif

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

#define CHUNK 256

/* x is float32 (rows, in), y is float32 (rows, out); at most MAX_ROWS rows. */
void gptj8_linear_float32(const float *x, int64_t rows, const uint8_t *codes, int64_t out,
                          int64_t in, int64_t block_size, const void *absmax,
                          const float *levels, const float *codebook, float *y, int64_t threads) {
  scales scale = scales_of(absmax, levels);
#if defined(__x86_64__) && defined(__GNUC__)
  float_tables tables;
  int in_groups = in % 64 == 0 && __builtin_cpu_supports("avx512vbmi");
  if (in_groups) fill_float_tables(codebook, &tables);
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < out; r++) {
    float sums[MAX_ROWS] = {0}, restored[CHUNK];
    for (int64_t start = 0; start < in; start += CHUNK) {
      int64_t count = in - start < CHUNK ? in - start : CHUNK;
#if defined(__x86_64__) && defined(__GNUC__)
      if (in_groups)
        restore_groups(codes, r * in + start, count, block_size, &scale, &tables, restored);
      else
#endif
        restore_any(codes, r * in + start, count, block_size, &scale, codebook, restored);
      multiply_add(restored, count, x + start, in, rows, sums);
    }
    for (int64_t t = 0; t < rows; t++) y[t * out + r] = sums[t];
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
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

/* Return whether this machine supports gptj8_linear_bfloat16. If not, it must not be called. */
int gptj8_multiplies_bfloat16(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

/* x and y are bfloat16; `in` is a multiple of 64; `ordered` has room for a copy of x. */
void gptj8_linear_bfloat16(const uint16_t *x, int64_t rows, const uint8_t *codes, int64_t out,
                           int64_t in, int64_t block_size, const void *absmax, const float *levels,
                           const float *codebook, uint16_t *y, uint16_t *ordered, int64_t threads) {
#if defined(__x86_64__) && defined(__GNUC__)
  scales scale = scales_of(absmax, levels);
  linear_bfloat16(x, rows, codes, out, in, block_size, &scale, codebook, y, ordered, threads);
#else
  (void)x, (void)rows, (void)codes, (void)out, (void)in, (void)block_size, (void)absmax;
  (void)levels, (void)codebook, (void)y, (void)ordered, (void)threads;
#endif
}

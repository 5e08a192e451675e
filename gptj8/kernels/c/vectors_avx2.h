/* AVX2: vectors of 8 floats, and decoding of 32 codes at once. */

#include <immintrin.h>

#define LANES 8
#define STEP 32
#define TILE_ROWS 3 /* 3 x 4 sums, 3 inputs and 1 weight fill the 16 registers */
#define WIDE_ROWS 6 /* 6 x 2 sums */

#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

typedef __m256 vector;

#define vector_zero() _mm256_setzero_ps()
#define vector_set(value) _mm256_set1_ps(value)
#define vector_load(from) _mm256_loadu_ps(from)
#define vector_store(to, value) _mm256_storeu_ps(to, value)
#define vector_add(a, b) _mm256_add_ps(a, b)
#define vector_multiply(a, b) _mm256_mul_ps(a, b)
#define vector_multiply_add(a, b, c) _mm256_fmadd_ps(a, b, c)
#define prefetch(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)

typedef __m256i integers;

#define integers_load(from) _mm256_loadu_si256((const void *)(from))
#define integers_set(value) _mm256_set1_epi16(value)
#define integers_set_bytes(value) _mm256_set1_epi8(value)
#define integers_and(a, b) _mm256_and_si256(a, b)
#define integers_or(a, b) _mm256_or_si256(a, b)
#define integers_without(a, b) _mm256_andnot_si256(a, b)
#define integers_left(a, bits) _mm256_slli_epi16(a, bits)
#define integers_right(a, bits) _mm256_srli_epi16(a, bits)
#define integers_shuffle(table, index) _mm256_shuffle_epi8(table, index)
#define integers_multiply_bytes(a, b) _mm256_maddubs_epi16(a, b)
#define integers_multiply(a, b) _mm256_madd_epi16(a, b)
#define integers_add_16(a, b) _mm256_add_epi16(a, b)
#define integers_add_32(a, b) _mm256_add_epi32(a, b)
#define vector_of(a) _mm256_cvtepi32_ps(a)
#define vector_halves(first, second) (first) /* a step has one scale */

typedef __m256i bytes;

ALWAYS_INLINE bytes bytes_of(const uint8_t values[16]) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
}

ALWAYS_INLINE void vector_stream(float *to, vector value) { _mm256_stream_ps(to, value); }
ALWAYS_INLINE void streams_end(void) { _mm_sfence(); }

/* Return the sums of four vectors. */
ALWAYS_INLINE __m128 sums_of_four(vector a, vector b, vector c, vector d) {
  vector pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

ALWAYS_INLINE void store_sums(float *to, vector a, vector b, vector c, vector d) {
  _mm_storeu_ps(to, sums_of_four(a, b, c, d));
}

ALWAYS_INLINE float vector_sum(vector value) {
  vector zero = vector_zero();
  return _mm_cvtss_f32(sums_of_four(value, zero, zero, zero));
}

#include "lines.h"

typedef line_tables tables;

/* Decoded values are offset so that they are not negative; see decode. */
ALWAYS_INLINE tables tables_of(const matrix *w) { return line_tables_of(&w->lines, LINE_UNIT); }

/* Decode 32 codes; value[q] holds codes 8 q to 8 q + 7, in units of 1 / LINE_UNIT. */
ALWAYS_INLINE void decode(const uint8_t *codes, const tables *with, vector *value) {
  const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  /* Unpacking works within 128-bit lanes and interleaves twice: this order compensates for it. */
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  __m256i code = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const void *)codes), order);
  __m256i l = _mm256_and_si256(code, nibble);
  __m256i h = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble);
  __m256i low = _mm256_shuffle_epi8(with->start_low, h);
  __m256i high = _mm256_shuffle_epi8(with->start_high, h);
  __m256i slope = _mm256_shuffle_epi8(with->slope, h);
  __m256i first = _mm256_add_epi16(
      _mm256_unpacklo_epi8(low, high),
      _mm256_maddubs_epi16(_mm256_unpacklo_epi8(slope, zero), _mm256_unpacklo_epi8(l, zero)));
  __m256i second = _mm256_add_epi16(
      _mm256_unpackhi_epi8(low, high),
      _mm256_maddubs_epi16(_mm256_unpackhi_epi8(slope, zero), _mm256_unpackhi_epi8(l, zero)));
  /* An integer below 2^16 as the lowest bits of the float 2^23; the subtraction is exact. */
  const __m256i exponent = _mm256_set1_epi16(0x4b00);
  const __m256 offset = _mm256_set1_ps(0x1p23f + LINE_UNIT);
#define EXACT(unpack, of) _mm256_sub_ps(_mm256_castsi256_ps(unpack(of, exponent)), offset)
  value[0] = EXACT(_mm256_unpacklo_epi16, first);
  value[1] = EXACT(_mm256_unpackhi_epi16, first);
  value[2] = EXACT(_mm256_unpacklo_epi16, second);
  value[3] = EXACT(_mm256_unpackhi_epi16, second);
#undef EXACT
}
#define DECODED_UNIT (1.0f / LINE_UNIT)

/* Round 8 finite values to bfloat16, to nearest, ties to even. */
ALWAYS_INLINE __m256i bfloat16_bits(vector value) {
  __m256i bits = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_srli_epi32(bits, 16);
}

/* Round 16 values to 16 bits. */
ALWAYS_INLINE void store_narrowed(uint16_t *to, vector a, vector b, int dtype, int streams) {
  __m256i bits;
  if (dtype == BFLOAT16) {
    bits = _mm256_packus_epi32(bfloat16_bits(a), bfloat16_bits(b));
    bits = _mm256_permute4x64_epi64(bits, 0xd8);
  } else {
    bits = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(a, NEAREST)),
                                   _mm256_cvtps_ph(b, NEAREST), 1);
  }
  if (streams)
    _mm256_stream_si256((void *)to, bits);
  else
    _mm256_storeu_si256((void *)to, bits);
}

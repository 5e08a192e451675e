/* AVX-512: vectors of 16 floats, and decoding of 64 codes at once. */

#include <immintrin.h>

#define LANES 16
#define STEP 64
#define TILE_ROWS 6  /* 6 x 4 sums, 6 inputs and 1 weight fit the 32 registers */
#define WIDE_ROWS 12 /* 12 x 2 sums */

#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

typedef __m512 vector;

#define vector_zero() _mm512_setzero_ps()
#define vector_set(value) _mm512_set1_ps(value)
#define vector_load(from) _mm512_loadu_ps(from)
#define vector_store(to, value) _mm512_storeu_ps(to, value)
#define vector_stream(to, value) _mm512_stream_ps(to, value)
#define vector_add(a, b) _mm512_add_ps(a, b)
#define vector_multiply(a, b) _mm512_mul_ps(a, b)
#define vector_multiply_add(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vector_sum(value) _mm512_reduce_add_ps(value)
#define prefetch(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
#define streams_end() _mm_sfence()

typedef __m512i integers;

#define integers_load(from) _mm512_loadu_si512(from)
#define integers_set(value) _mm512_set1_epi16(value)
#define integers_set_bytes(value) _mm512_set1_epi8(value)
#define integers_and(a, b) _mm512_and_si512(a, b)
#define integers_or(a, b) _mm512_or_si512(a, b)
#define integers_without(a, b) _mm512_andnot_si512(a, b)
#define integers_left(a, bits) _mm512_slli_epi16(a, bits)
#define integers_right(a, bits) _mm512_srli_epi16(a, bits)
#define integers_shuffle(table, index) _mm512_shuffle_epi8(table, index)
#define integers_multiply_bytes(a, b) _mm512_maddubs_epi16(a, b)
#define integers_multiply(a, b) _mm512_madd_epi16(a, b)
#define integers_add_16(a, b) _mm512_add_epi16(a, b)
#define integers_add_32(a, b) _mm512_add_epi32(a, b)
#define vector_of(a) _mm512_cvtepi32_ps(a)
#define vector_halves(first, second) _mm512_mask_blend_ps(0xff00, first, second)

typedef __m512i bytes;

ALWAYS_INLINE bytes bytes_of(const uint8_t values[16]) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
}

ALWAYS_INLINE __m256 halves_of(vector value) {
  __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1));
  return _mm256_add_ps(_mm512_castps512_ps256(value), upper);
}

ALWAYS_INLINE void store_sums(float *to, vector a, vector b, vector c, vector d) {
  __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves_of(a), halves_of(b)),
                                _mm256_hadd_ps(halves_of(c), halves_of(d)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

/* Round 16 finite values to bfloat16, to nearest, ties to even; the hardware's conversion flushes
   subnormal values to zero. */
ALWAYS_INLINE __m256i bfloat16_bits(vector value) {
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

ALWAYS_INLINE __m256i narrowed(vector value, int dtype) {
  return dtype == BFLOAT16
             ? bfloat16_bits(value)
             : _mm512_cvtps_ph(value, NEAREST);
}

/* Round 32 values to 16 bits. */
ALWAYS_INLINE void store_narrowed(uint16_t *to, vector a, vector b, int dtype, int streams) {
  __m512i bits = _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(a, dtype)), narrowed(b, dtype), 1);
  if (streams)
    _mm512_stream_si512((void *)to, bits);
  else
    _mm512_storeu_si512((void *)to, bits);
}

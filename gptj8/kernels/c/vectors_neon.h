/* NEON: vectors of 4 floats, and decoding of 32 codes at once. */

#include <arm_neon.h>

#define LANES 4
#define STEP 32
#define TILE_ROWS 6 /* 6 x 4 sums, 6 inputs and 1 weight fit the 32 registers */
#define WIDE_ROWS 12 /* 12 x 2 sums */

typedef float32x4_t vector;

#define vector_zero() vdupq_n_f32(0.0f)
#define vector_set(value) vdupq_n_f32(value)
#define vector_load(from) vld1q_f32(from)
#define vector_store(to, value) vst1q_f32(to, value)
#define vector_stream(to, value) vst1q_f32(to, value)
#define vector_add(a, b) vaddq_f32(a, b)
#define vector_multiply(a, b) vmulq_f32(a, b)
#define vector_multiply_add(a, b, c) vfmaq_f32(c, a, b)
#define vector_sum(value) vaddvq_f32(value)
#define prefetch(address) __builtin_prefetch(address)
#define streams_end() (void)0

ALWAYS_INLINE void store_sums(float *to, vector a, vector b, vector c, vector d) {
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

typedef uint8x16_t bytes;

#define bytes_of(values) vld1q_u8(values)

#include "lines.h"

typedef line_tables tables;

ALWAYS_INLINE tables tables_of(const matrix *w) { return line_tables_of(&w->lines, 0); }

/* Decode 16 codes; value[q] holds codes 4 q to 4 q + 3, in units of 1 / LINE_UNIT. */
ALWAYS_INLINE void decode_16(uint8x16_t code, const tables *with, vector *value) {
  uint8x16_t l = vandq_u8(code, vdupq_n_u8(15)), h = vshrq_n_u8(code, 4);
  uint8x16_t low = vqtbl1q_u8(with->start_low, h), high = vqtbl1q_u8(with->start_high, h);
  uint8x16_t slope = vqtbl1q_u8(with->slope, h);
  uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(low, high));
  uint16x8_t second = vreinterpretq_u16_u8(vzip2q_u8(low, high));
  first = vmlal_u8(first, vget_low_u8(slope), vget_low_u8(l));
  second = vmlal_high_u8(second, slope, l);
  int16x8_t lower = vreinterpretq_s16_u16(first), upper = vreinterpretq_s16_u16(second);
  value[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(lower)));
  value[1] = vcvtq_f32_s32(vmovl_high_s16(lower));
  value[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(upper)));
  value[3] = vcvtq_f32_s32(vmovl_high_s16(upper));
}

ALWAYS_INLINE void decode(const uint8_t *codes, const tables *with, vector *value) {
  decode_16(vld1q_u8(codes), with, value);
  decode_16(vld1q_u8(codes + 16), with, value + 4);
}
#define DECODED_UNIT (1.0f / LINE_UNIT)

/* Round 4 finite values to bfloat16, to nearest, ties to even. */
ALWAYS_INLINE uint16x4_t bfloat16_bits(vector value) {
  uint32x4_t bits = vreinterpretq_u32_f32(value);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(bits, 16);
}

/* Round 8 values to 16 bits. */
ALWAYS_INLINE void store_narrowed(uint16_t *to, vector a, vector b, int dtype, int streams) {
  (void)streams;
  if (dtype == BFLOAT16) {
    vst1q_u16(to, vcombine_u16(bfloat16_bits(a), bfloat16_bits(b)));
  } else {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a)));
    vst1_u16(to + 4, vreinterpret_u16_f16(vcvt_f16_f32(b)));
  }
}

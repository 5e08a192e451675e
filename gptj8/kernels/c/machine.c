/* Select the kernels for this machine and a matrix, and recognize codebooks of lines. */

#include "common.h"

/* Increase it whenever a function or the meaning of an argument changes; cpu.py compares it. */
#define INTERFACE 5

int gptj8_interface(void) { return INTERFACE; }

/* Instruction sets in ascending order; GPTJ8_CPU_ISA limits the choice (see cpu.py). */
enum { PLAIN, AVX2, AVX512, AVX512_VBMI, EVERYTHING };
static int limit = EVERYTHING;

void gptj8_limit(int64_t instruction_set) { limit = (int)instruction_set; }

/* Return whether a codebook consists of lines, which are written to `found`. */
static int find_lines(const float *codebook, lines *found) {
  for (int h = 0; h < 16; h++) {
    const float *piece = codebook + 16 * h;
    float start = piece[0] * LINE_UNIT, slope = piece[1] * LINE_UNIT - start;
    if (!(start >= -LINE_UNIT && start <= LINE_UNIT && slope >= 0 && slope <= 255)) return 0;
    if (start != (float)(int)start || slope != (float)(int)slope) return 0;
    for (int l = 0; l < 16; l++)
      if (piece[l] * LINE_UNIT != start + slope * (float)l || as_bits(piece[l]) == 0x80000000)
        return 0;
    found->start[h] = (int16_t)start;
    found->slope[h] = (uint8_t)slope;
  }
  return 1;
}

matrix matrix_of(const uint8_t *codes, int64_t rows, int64_t columns, int64_t block_size,
                 const void *absmax, const float *levels, const float *codebook) {
  matrix made = {0};
  made.codes = codes, made.rows = rows, made.columns = columns;
  made.block_size = block_size;
  while (block_size >> made.shift > 1) made.shift++;
  made.scale = scales_of(absmax, levels);
  made.codebook = codebook;
  made.has_lines = find_lines(codebook, &made.lines);
  return made;
}

#if defined(ON_X86)
static int has_avx512(void) {
  return limit >= AVX512 && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static int has_avx512_vbmi(void) {
  return limit >= AVX512_VBMI && has_avx512() && __builtin_cpu_supports("avx512vbmi");
}
static int has_avx512_bf16(void) {
  return limit >= EVERYTHING && has_avx512_vbmi() && __builtin_cpu_supports("avx512bf16");
}
static int has_avx2(void) {
  /* F16C is older than AVX2. */
  return limit >= AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

const machine *multiplier_for(const matrix *w) {
#if defined(ON_X86)
  if (w->has_lines && has_avx512_bf16()) return &gptj8_avx512_bf16;
  if (w->has_lines && has_avx512()) return &gptj8_avx512;
  if (w->has_lines && has_avx2()) return &gptj8_avx2;
  if (has_avx512_vbmi()) return &gptj8_avx512_vbmi;
#elif defined(ON_ARM)
  if (w->has_lines && limit > PLAIN) return &gptj8_neon;
#else
  (void)w;
#endif
  return 0;
}

const machine *restorer_for(const matrix *w) {
  const machine *found = multiplier_for(w);
#if defined(ON_X86)
  /* A table in registers is 1.1 times as fast as lines, but not as lines rounded by the hardware. */
  if (found != &gptj8_avx512_bf16 && has_avx512_vbmi()) return &gptj8_avx512_vbmi;
#endif
  return found;
}

int has_byte_permutations(void) {
#if defined(ON_X86)
  return has_avx512_vbmi();
#else
  return 0;
#endif
}

/* Return the instruction set that is used: a number of the enumeration above. NEON counts as AVX2. */
int64_t gptj8_instruction_set(void) {
#if defined(ON_X86)
  return has_avx512_vbmi() ? AVX512_VBMI : has_avx512() ? AVX512 : has_avx2() ? AVX2 : PLAIN;
#elif defined(ON_ARM)
  return limit > PLAIN ? AVX2 : PLAIN;
#else
  return PLAIN;
#endif
}

/* Return whether this machine supports gptj8_linear_bfloat16. If not, it must not be called. */
int64_t gptj8_multiplies_bfloat16(void) {
#if defined(ON_X86)
  return has_avx512_bf16();
#else
  return 0;
#endif
}

/* Return the most rows for which products from the codes are faster than restoring the matrix and
   multiplying it with torch, measured with matrices of 4096 x 4096 and 16384 x 4096 on two cores.

   A fixed rule and no timing when a process begins: the two add up in different orders, and a choice
   that depends on the load of the machine would make runs with the same seed differ. torch multiplies
   with MKL, which is fast on Intel's processors only. */
int64_t gptj8_most_rows(int64_t is_transposed) {
#if defined(ON_X86)
  if (__builtin_cpu_is("amd")) return INT64_MAX;
  if (has_avx512()) return is_transposed ? 32 : 64;
  return is_transposed ? 32 : 128;
#else
  return is_transposed ? 16 : 32; /* not measured */
#endif
}

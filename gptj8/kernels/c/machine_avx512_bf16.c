/* Kernels for AVX-512 with bfloat16 conversion, and codebooks of lines. */

#include "common.h"

#if defined(ON_X86)

#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#include "target.h"

#include "vectors_avx512.h"
#include "lines_avx512.h"

/* Round 32 values that are not subnormal to bfloat16. */
ALWAYS_INLINE void store_bfloat16(uint16_t *to, vector a, vector b, int streams) {
  __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  if (streams)
    _mm512_stream_si512((void *)to, bits);
  else
    _mm512_storeu_si512((void *)to, bits);
}
#define store_bfloat16 store_bfloat16

#define INTEGER_ROWS 2
#include "rows.h"
#include "products.h"

const machine gptj8_avx512_bf16 = {STEP, restore, product, transposed};

#include "target_end.h"

#else
typedef int nothing; /* ISO C has no empty files */
#endif

/* Kernels for AVX-512 with VBMI and any codebook. */

#include "common.h"

#if defined(ON_X86)

#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c"
#include "target.h"

#include "vectors_avx512.h"
#include "tables_avx512.h"
#include "products.h"

const machine gptj8_avx512_vbmi = {STEP, restore, product, transposed};

#include "target_end.h"

#else
typedef int nothing; /* ISO C has no empty files */
#endif

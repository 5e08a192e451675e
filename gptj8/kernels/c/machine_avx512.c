/* Kernels for AVX-512 and codebooks of lines. */

#include "common.h"

#if defined(ON_X86)

#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "target.h"

#include "vectors_avx512.h"
#include "lines_avx512.h"
#define INTEGER_ROWS 2
#include "rows.h"
#include "products.h"

const machine gptj8_avx512 = {STEP, restore, product, transposed};

#include "target_end.h"

#else
typedef int nothing; /* ISO C has no empty files */
#endif

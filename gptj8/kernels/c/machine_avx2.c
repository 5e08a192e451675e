/* Kernels for AVX2. */

#include "common.h"

#if defined(ON_X86)

#define TARGET "avx2,fma,f16c"
#include "target.h"

#include "vectors_avx2.h"
#define INTEGER_ROWS 1 /* two rows are faster in floats */
#include "rows.h"
#include "products.h"

const machine gptj8_avx2 = {STEP, restore, product, transposed};

#include "target_end.h"

#else
typedef int nothing; /* ISO C has no empty files */
#endif

/* Kernels for 64-bit ARM, all of which have NEON. */

#include "common.h"

#if defined(ON_ARM)

#include "vectors_neon.h"
#include "products.h"

const machine gptj8_neon = {STEP, restore, product, transposed};

#else
typedef int nothing; /* ISO C has no empty files */
#endif

/* Compile what follows, up to target_end.h, for the instruction set TARGET. */

#if defined(__clang__)
#define GPTJ8_PRAGMA(text) _Pragma(#text)
#define GPTJ8_ATTRIBUTE(name) \
  GPTJ8_PRAGMA(clang attribute push(__attribute__((target(name))), apply_to = function))
GPTJ8_ATTRIBUTE(TARGET)
#else
#define GPTJ8_PRAGMA(text) _Pragma(#text)
#define GPTJ8_OPTIONS(name) GPTJ8_PRAGMA(GCC target(name))
#pragma GCC push_options
GPTJ8_OPTIONS(TARGET)
#endif

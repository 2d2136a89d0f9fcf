// For the headers of files that gapkern_simd_source() compiles once per instruction set.
#pragma once

// Declares a function once in the namespace of each instruction set, within the current namespace.
#define GAPKERN_DECLARE_FOR_EACH_ISA(declaration) \
  namespace portable {                            \
  declaration;                                    \
  }                                               \
  namespace avx2 {                                \
  declaration;                                    \
  }                                               \
  namespace avx512 {                              \
  declaration;                                    \
  }                                               \
  namespace avx512bf16 {                          \
  declaration;                                    \
  }                                               \
  namespace neon {                                \
  declaration;                                    \
  }                                               \
  namespace neonbf16 {                            \
  declaration;                                    \
  }

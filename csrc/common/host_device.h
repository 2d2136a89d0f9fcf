// What headers shared by the CPU kernels and CUDA need: the qualifier, and floats as bits.
// On the CPU everything has internal linkage and is inlined, so that code compiled for one instruction set can never be
// picked by the linker for another.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GAPKERN_HD static __host__ __device__ __forceinline__
#else
#define GAPKERN_HD static inline __attribute__((always_inline))
#endif

namespace gapkern {

GAPKERN_HD float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

GAPKERN_HD uint32_t to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

}  // namespace gapkern

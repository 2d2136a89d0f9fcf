// What device kernels are written against: CUDA, or its threads emulated on the CPU (tests/simt/simt.h), so that every
// kernel runs on machines without a GPU too.
#pragma once
#include <cmath>
#include <limits>

#include "common/half.h"
#include "common/host_device.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Shared memory of a block; the emulation poisons it before every block.
#define GAPKERN_SHARED(type, name, count) __shared__ type name[count]
#else
#include "simt.h"
#define GAPKERN_SHARED(type, name, count) type* const name = simt::shared<type>(count, GAPKERN_SITE)
#endif

namespace gapkern {

inline constexpr unsigned kEveryLane = 0xffffffffu;
inline constexpr int kWarp = 32;

// A power of two of elements in one access, at most 16 bytes.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T value[count];
};
template <class T>
inline constexpr int kPack = 16 / int(sizeof(T));

// The type sums of T are formed in.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

GAPKERN_HD double to_wide(double x) { return x; }
template <class T>
GAPKERN_HD float to_wide(T x) {
  return to_float(x);
}
GAPKERN_HD void from_wide(double x, double* out) { *out = x; }
template <class T>
GAPKERN_HD void from_wide(float x, T* out) {
  from_float(x, out);
}

// Over the 32 lanes, in a fixed order; every lane has the result.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kEveryLane, x, o);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int o = kWarp / 2; o > 0; o /= 2) {
    const T other = __shfl_xor_sync(kEveryLane, x, o);
    x = x > other ? x : other;
  }
  return x;
}

}  // namespace gapkern

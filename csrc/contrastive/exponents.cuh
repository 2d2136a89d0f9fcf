// Exponentials in base 2 and constants, shared by the losses' device kernels.
#pragma once
#include "common/cuda.cuh"

namespace gapkern::contrastive {

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
#else
inline float exp2_of(float x) { return std::exp2(x); }
inline double exp2_of(double x) { return std::exp2(x); }
inline float log1p_of(float x) { return std::log1p(x); }
inline double log1p_of(double x) { return std::log1p(x); }
#endif

inline constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class R>
inline constexpr R kNothing = -std::numeric_limits<R>::infinity();

template <class R>
__device__ __forceinline__ R larger(R a, R b) {
  return a > b ? a : b;
}

}  // namespace gapkern::contrastive

// What the small kernels around the Hopper products are made of: the shift, sums and maxima, products in float32.
#pragma once
#include "common/cuda.cuh"
#include "contrastive/epilogue.cuh"
#include "contrastive/exponents.cuh"

namespace gapkern::contrastive::sm90 {

inline constexpr int kThreads = 256, kWarps = kThreads / kWarp;
inline constexpr double kCeiling = 110, kFloor = -102, kWeightRange = 120;

GAPKERN_HD float shift_of(float bound, double terms) {
  const double spare = kCeiling - log2(terms), least = ceil(bound - spare);
  // 2^(-bound - c) is the smallest there can be, and above 2^kFloor the sums are complete.
  const double fitting = floor(bound < -kFloor - bound ? double(bound) : -kFloor - bound);
  const double shift = least > fitting ? least : fitting;
  return float(shift > 0 ? shift : 0.0);
}

// The log-sum of `terms` exponentials relative to c in units of log 2; NaN where too much may be missing.
GAPKERN_HD double log2_sum(double sum, double terms, float shift) {
  const bool complete = sum >= terms * 0x1p-102 && sum < 0x1p127;
  return complete ? log2(sum) - double(shift) : double(from_bits(0x7fc00000u));
}

// Over a block of `warps`; `scratch` has a float for each.
template <int warps>
__device__ __forceinline__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < warps; ++w) x = larger(x, scratch[w]);
  return x;
}

// The largest of `count` values, at least zero, for a thread's part; loads eight at a time, so that their latencies
// overlap.
__device__ __forceinline__ float part_max(const float* values, int64_t count, int threads) {
  constexpr int loads = 8;
  float most = 0;
  for (int64_t first = threadIdx.x; first < count; first += loads * threads) {
    float value[loads];
#pragma unroll
    for (int i = 0; i < loads; ++i) value[i] = first + i * threads < count ? values[first + i * threads] : 0.f;
#pragma unroll
    for (int i = 0; i < loads; ++i) most = larger(most, value[i]);
  }
  return most;
}

// Products in float32 without tensor cores: a block has kSide x kSide of them, a thread kPart x kPart.
inline constexpr int kSide = 64, kStep = 16, kPart = 4, kAcross = kSide / kPart;

template <class T>
struct Products {
  const T* x;  // [rows, depth]
  const T* y;  // [columns, depth]
  int64_t rows, columns, depth;
};

template <class T>
__device__ __forceinline__ void tile_products(const Products<T>& p, int64_t row0, int64_t column0,
                                              float (&acc)[kPart][kPart]) {
  GAPKERN_SHARED(float, left, kStep*(kSide + 1));
  GAPKERN_SHARED(float, right, kStep*(kSide + 1));
  const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
#pragma unroll
  for (int i = 0; i < kPart; ++i)
    for (int j = 0; j < kPart; ++j) acc[i][j] = 0;
  for (int64_t first = 0; first < p.depth; first += kStep) {
    __syncthreads();
    for (int e = threadIdx.x; e < kSide * kStep; e += kThreads) {
      const int line = e / kStep, d = e % kStep;
      const bool deep = first + d < p.depth;
      left[d * (kSide + 1) + line] =
          deep && row0 + line < p.rows ? to_wide(p.x[(row0 + line) * p.depth + first + d]) : 0;
      right[d * (kSide + 1) + line] =
          deep && column0 + line < p.columns ? to_wide(p.y[(column0 + line) * p.depth + first + d]) : 0;
    }
    __syncthreads();
    for (int d = 0; d < kStep; ++d)
#pragma unroll
      for (int i = 0; i < kPart; ++i)
#pragma unroll
        for (int j = 0; j < kPart; ++j)
          acc[i][j] += left[d * (kSide + 1) + ty * kPart + i] * right[d * (kSide + 1) + tx * kPart + j];
  }
}

// A sum of powers of two relative to the largest.
struct RunningSum {
  float base = kNothing<float>, sum = 0;
  __device__ void add(float other_base, float other_sum) {
    if (other_base == kNothing<float>) return;
    const float high = larger(base, other_base);
    sum = (base == kNothing<float> ? 0 : sum * exp2_of(base - high)) + other_sum * exp2_of(other_base - high);
    base = high;
  }
};

// Calls f(element, i, row, column) for a thread's part of a tile, of which row is the i-th row.
template <class F>
__device__ __forceinline__ void over_part(const float (&acc)[kPart][kPart], const F& f) {
  const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
#pragma unroll
  for (int i = 0; i < kPart; ++i)
#pragma unroll
    for (int j = 0; j < kPart; ++j) f(acc[i][j], i, ty * kPart + i, tx * kPart + j);
}

}  // namespace gapkern::contrastive::sm90

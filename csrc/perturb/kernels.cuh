// The perturbations' device kernels; perturb.h says what they compute.
#pragma once
#include "common/cuda.cuh"
#include "perturb/values.h"

namespace gapkern::perturb {

inline constexpr int kThreads = 256;

// One thread per Philox block: four neighbouring columns of one row.
template <class Body>
__global__ void over_blocks(int64_t rows, int64_t columns, Stream s, Body body) {
  const int64_t per_row = (columns + 3) / 4;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < rows * per_row;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t r = i / per_row, b = i - r * per_row, row = s.first_row + r;
    const philox::Block block =
        philox::block(uint32_t(b), uint32_t(row), uint32_t(uint64_t(row) >> 32), s.trial, s.seed);
    const int64_t left = columns - 4 * b;
    body(block, r * columns + 4 * b, left < 4 ? int(left) : 4);
  }
}

struct WriteBits {
  int32_t* out;
  __device__ void operator()(const philox::Block& block, int64_t at, int count) const {
    for (int w = 0; w < count; ++w) out[at + w] = int32_t(block.word[w]);
  }
};

template <Law law, class T>
struct AddNoise {
  using A = typename Wide<T>::type;
  const T* x;
  T* out;
  A scale;
  bool packed;  // rows of a multiple of four, and aligned
  __device__ void operator()(const philox::Block& block, int64_t at, int count) const {
    float z[4];
    unit_noise<law>(block, z, z + 1, z + 2, z + 3);
    if (packed) {
      Pack<T, 4> values = *reinterpret_cast<const Pack<T, 4>*>(x + at);
      for (int w = 0; w < 4; ++w) from_wide(to_wide(values.value[w]) + scale * A(z[w]), values.value + w);
      *reinterpret_cast<Pack<T, 4>*>(out + at) = values;
    } else {
      for (int w = 0; w < count; ++w) from_wide(to_wide(x[at + w]) + scale * A(z[w]), out + at + w);
    }
  }
};

template <class T, class A>
__global__ void quantize_all(const T* x, int64_t elements, int64_t columns, const A* low, const A* high, bool shared,
                             A bins, T* out) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < elements; i += int64_t(gridDim.x) * kThreads) {
    const int64_t c = shared ? 0 : i % columns;
    from_wide(quantized(to_wide(x[i]), low[c], (high[c] - low[c]) / bins, bins), out + i);
  }
}

}  // namespace gapkern::perturb

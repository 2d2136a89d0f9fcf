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
    for (int w = 0; w < 4; ++w)  // a fixed number of turns keeps the words in registers
      if (w < count) out[at + w] = int32_t(block.word[w]);
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
      for (int w = 0; w < 4; ++w)
        if (w < count) from_wide(to_wide(x[at + w]) + scale * A(z[w]), out + at + w);
    }
  }
};

// Neighbouring columns of a row that one lane has at a time: whole Philox blocks, and 16 bytes an access where
// `packed`.
template <class T, bool packed>
struct Run {
  using A = typename Wide<T>::type;
  static constexpr int kCount = kPack<T> > 4 ? kPack<T> : 4;
  A value[kCount];

  // `left`: columns from here to the end of the row.
  template <class From>
  __device__ __forceinline__ void load(const From* from, int64_t left) {
    constexpr int pack = kPack<From> < kCount ? kPack<From> : kCount;
    if (packed)
      for (int i = 0; i < kCount; i += pack) {
        const Pack<From, pack> values = *reinterpret_cast<const Pack<From, pack>*>(from + i);
        for (int w = 0; w < pack; ++w) value[i + w] = to_wide(values.value[w]);
      }
    else
      for (int i = 0; i < kCount; ++i) value[i] = i < left ? to_wide(from[i]) : A(0);
  }
  __device__ __forceinline__ void store(T* to, int64_t left) const {
    if (packed)
      for (int i = 0; i < kCount; i += kPack<T>) {
        Pack<T, kPack<T>> values;
        for (int w = 0; w < kPack<T>; ++w) from_wide(value[i + w], values.value + w);
        *reinterpret_cast<Pack<T, kPack<T>>*>(to + i) = values;
      }
    else
      for (int i = 0; i < kCount && i < left; ++i) from_wide(value[i], to + i);
  }
  // To T and back: what a result in between would hold.
  __device__ __forceinline__ void round() {
    for (A& v : value) {
      T narrow;
      from_wide(v, &narrow);
      v = to_wide(narrow);
    }
  }
  __device__ __forceinline__ void add_noise(Law law, A scale, const Stream& s, int64_t row, int64_t column) {
    for (int i = 0; i < kCount; i += 4) {
      const philox::Block block =
          philox::block(uint32_t((column + i) / 4), uint32_t(row), uint32_t(uint64_t(row) >> 32), s.trial, s.seed);
      float z[4];
      if (law == Law::gaussian)
        unit_noise<Law::gaussian>(block, z, z + 1, z + 2, z + 3);
      else
        unit_noise<Law::uniform>(block, z, z + 1, z + 2, z + 3);
      for (int w = 0; w < 4; ++w) value[i + w] = value[i + w] + scale * A(z[w]);
    }
  }
};

// The shift of rows and their noise in one reading and one writing, a warp per row. The second reading of a row, once
// its norm is known, comes from the cache: of x, or of what noise has made of it, which the result holds until then.
template <class T, bool packed>
__global__ void __launch_bounds__(kThreads)
    noisy_rows(const T* x, int64_t rows, int64_t columns, const typename Wide<T>::type* shift, bool normalize,
               bool noise_first, Law law, typename Wide<T>::type std, Stream s, T* out) {
  using A = typename Wide<T>::type;
  using Values = Run<T, packed>;
  constexpr int step = kWarp * Values::kCount, warps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Values values, by;
  for (int64_t r = blockIdx.x * int64_t(warps) + warp; r < rows; r += int64_t(gridDim.x) * warps) {
    const T* from = x + r * columns;
    T* to = out + r * columns;
    A scale = 1;
    if (normalize) {
      A squared = 0;
      for (int64_t c = lane * Values::kCount; c < columns; c += step) {
        values.load(from + c, columns - c);
        by.load(shift + c, columns - c);
        if (noise_first) {
          values.add_noise(law, std, s, s.first_row + r, c);
          values.round();
          values.store(to + c, columns - c);
        }
        for (int i = 0; i < Values::kCount; ++i) {
          const A y = i < columns - c ? values.value[i] + by.value[i] : A(0);
          squared += y * y;
        }
      }
      const A norm = sqrt(warp_sum(squared));
      scale = A(1) / (norm > A(1e-12) ? norm : A(1e-12));
    }
    for (int64_t c = lane * Values::kCount; c < columns; c += step) {
      values.load((normalize && noise_first ? to : from) + c, columns - c);
      by.load(shift + c, columns - c);
      if (noise_first && !normalize) {
        values.add_noise(law, std, s, s.first_row + r, c);
        values.round();
      }
      for (int i = 0; i < Values::kCount; ++i) values.value[i] = (values.value[i] + by.value[i]) * scale;
      if (!noise_first) {
        values.round();
        values.add_noise(law, std, s, s.first_row + r, c);
      }
      values.store(to + c, columns - c);
    }
  }
}

template <class T, class A>
__global__ void quantize_all(const T* x, int64_t elements, int64_t columns, const A* low, const A* high, bool shared,
                             A bins, T* out) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < elements; i += int64_t(gridDim.x) * kThreads) {
    const int64_t c = shared ? 0 : i % columns;
    from_wide(quantized(to_wide(x[i]), low[c], (high[c] - low[c]) / bins, bins), out + i);
  }
}

}  // namespace gapkern::perturb

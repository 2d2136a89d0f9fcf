// The mean shift's device kernels; meanshift.h says what they compute.
#pragma once
#include "common/cuda.cuh"

namespace gapkern::meanshift {

inline constexpr int kSumWarps = 8;             // of a block, each taking every eighth row
inline constexpr int64_t kRowsPerBlock = 1024;  // whose partial sums one block forms
inline constexpr int kApplyWarps = 8;           // of a block, each with rows of its own

// partial[block y][column] = sum of the rows of that block, in float64. A thread has `pack` neighbouring columns.
template <class T, int pack>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    sum_rows(const T* x, int64_t rows, int64_t columns, double* partial) {
  GAPKERN_SHARED(double, part, kSumWarps * kWarp * pack);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = (blockIdx.x * int64_t(kWarp) + lane) * pack;
  const int64_t first = blockIdx.y * kRowsPerBlock;
  const int64_t last = first + kRowsPerBlock < rows ? first + kRowsPerBlock : rows;
  double sum[pack] = {};
  if (column < columns)
    for (int64_t r = first + warp; r < last; r += kSumWarps) {
      const Pack<T, pack> values = *reinterpret_cast<const Pack<T, pack>*>(x + r * columns + column);
      for (int i = 0; i < pack; ++i) sum[i] += double(to_wide(values.value[i]));
    }
  for (int i = 0; i < pack; ++i) part[(warp * pack + i) * kWarp + lane] = sum[i];
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int i = 0; i < pack; ++i) {
    double total = 0;
    for (int w = 0; w < kSumWarps; ++w) total += part[(w * pack + i) * kWarp + lane];
    partial[blockIdx.y * columns + column + i] = total;
  }
}

// A warp per row. The second reading of a row, once its norm is known, comes from the cache.
template <class T, int pack, bool normalize>
__global__ void __launch_bounds__(kApplyWarps* kWarp)
    apply_rows(const T* x, int64_t rows, int64_t columns, const typename Wide<T>::type* shift, T* out) {
  using A = typename Wide<T>::type;
  using Values = Pack<T, pack>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t r = blockIdx.x * int64_t(kApplyWarps) + warp; r < rows; r += int64_t(gridDim.x) * kApplyWarps) {
    const T* row = x + r * columns;
    A scale = 1;
    if (normalize) {
      A squared = 0;
      for (int64_t c = lane * pack; c < columns; c += kWarp * pack) {
        const Values values = *reinterpret_cast<const Values*>(row + c);
        for (int i = 0; i < pack; ++i) {
          const A y = to_wide(values.value[i]) + shift[c + i];
          squared += y * y;
        }
      }
      const A norm = sqrt(warp_sum(squared));
      scale = A(1) / (norm > A(1e-12) ? norm : A(1e-12));
    }
    for (int64_t c = lane * pack; c < columns; c += kWarp * pack) {
      Values values = *reinterpret_cast<const Values*>(row + c);
      for (int i = 0; i < pack; ++i) from_wide((to_wide(values.value[i]) + shift[c + i]) * scale, values.value + i);
      *reinterpret_cast<Values*>(out + r * columns + c) = values;
    }
  }
}

}  // namespace gapkern::meanshift

// What the device kernels over a chunk of logits share: t = S / logit_scale [rows, M], that a library product has
// written, the tiles it is cut into, and what a tile of its gradient leaves.
//
// A block has a tile of kTileRows x kTileColumns: a warp 8 rows of it, a thread 4 neighbouring columns.
#pragma once
#include "common/cuda.cuh"
#include "contrastive/exponents.cuh"

namespace gapkern::contrastive {

inline constexpr int kTileWarps = 8, kWarpRows = 8, kThreadColumns = 4;
inline constexpr int kTileRows = kTileWarps * kWarpRows, kTileColumns = kWarp * kThreadColumns;
inline constexpr int kTileThreads = kTileWarps * kWarp;

// A log-sum in two parts, log2 = high + log2(sum).
struct Partial {
  double high, sum;
};

// The chunk, and what turns its products into t: 2 t - row_norms - column_norms for squared distances.
template <class R>
struct Chunk {
  const R* products;
  const R* row_norms;     // [rows], null for the dot product
  const R* column_norms;  // [M]
  int64_t rows, columns;

  template <bool pack>
  __device__ __forceinline__ void load(int64_t row, int64_t column, R (&t)[kThreadColumns]) const {
    const R* from = products + row * columns + column;
    if (pack && column + kThreadColumns <= columns) {
      const Pack<R, kThreadColumns> values = *reinterpret_cast<const Pack<R, kThreadColumns>*>(from);
      for (int c = 0; c < kThreadColumns; ++c) t[c] = values.value[c];
    } else {
      for (int c = 0; c < kThreadColumns; ++c) t[c] = column + c < columns ? from[c] : R(0);
    }
    if (row_norms)
      for (int c = 0; c < kThreadColumns; ++c)
        if (column + c < columns) t[c] = 2 * t[c] - row_norms[row] - column_norms[column + c];
  }
};

struct Place {
  int lane, warp;
  int64_t row, column;  // the thread's first
  __device__ __forceinline__ Place()
      : lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        row(blockIdx.y * int64_t(kTileRows) + warp * kWarpRows),
        column(blockIdx.x * int64_t(kTileColumns) + lane * kThreadColumns) {}
};

// What exponents are taken relative to: the maximum, or zero where there is nothing.
template <class R>
__device__ __forceinline__ R reference(R maximum) {
  return maximum > kNothing<R> ? maximum : R(0);
}

// A log-sum-exp in units of log 2 in two parts: k t - high is exact where the two are close (Sterbenz), low is added
// then.
template <class R>
struct Split {
  R high = 0, low = 0;
  Split() = default;
  __device__ __forceinline__ explicit Split(double lse) : high(R(lse)), low(R(lse - double(R(lse)))) {}
  __device__ __forceinline__ R probability(R v) const { return exp2_of((v - high) - low); }
};

// Block sums of a tile's dS t; rows and columns of dS where a gradient of squared distances needs them.
template <class R>
struct TileSums {
  double* scale;  // [tiles]
  R* rows;        // [tiles across, rows], or null
  R* columns;     // [tiles down, M], or null
};

// The sum of x over the block, for its first thread; scratch [kTileWarps].
__device__ __forceinline__ double block_sum(double x, double* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kTileWarps; ++w) total += scratch[w];
  return total;
}

// Writes a tile of dS, w[r][c].
template <class R, class O, bool pack>
__device__ __forceinline__ void store_values(const Chunk<R>& chunk, const Place& at,
                                             const R (&w)[kWarpRows][kThreadColumns], O* ds) {
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    if (at.row + r >= chunk.rows) continue;
    O* to = ds + (at.row + r) * chunk.columns + at.column;
    Pack<O, kThreadColumns> narrow;
    for (int c = 0; c < kThreadColumns; ++c) from_wide(w[r][c], narrow.value + c);
    if (pack && at.column + kThreadColumns <= chunk.columns)
      *reinterpret_cast<Pack<O, kThreadColumns>*>(to) = narrow;
    else
      for (int c = 0; c < kThreadColumns; ++c)
        if (at.column + c < chunk.columns) to[c] = narrow.value[c];
  }
}

// Writes the sums of a tile of dS; `of_scale` is this thread's part of the sum of dS t.
template <class R>
__device__ __forceinline__ void store_sums(const Chunk<R>& chunk, const Place& at,
                                           const R (&w)[kWarpRows][kThreadColumns], double of_scale,
                                           const TileSums<R>& sums) {
  GAPKERN_SHARED(double, scratch, kTileWarps);
  GAPKERN_SHARED(R, part, kTileWarps * kTileColumns);
  const double total = block_sum(of_scale, scratch);
  if (threadIdx.x == 0) sums.scale[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = total;
  if (!sums.rows) return;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    R sum = 0;
    for (int c = 0; c < kThreadColumns; ++c) sum += w[r][c];
    sum = warp_sum(sum);
    if (at.lane == 0 && at.row + r < chunk.rows) sums.rows[blockIdx.x * chunk.rows + at.row + r] = sum;
  }
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    R sum = 0;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) sum += w[r][c];
    part[at.warp * kTileColumns + at.lane * kThreadColumns + c] = sum;
  }
  __syncthreads();
  for (int column = threadIdx.x; column < kTileColumns; column += kTileThreads) {
    const int64_t j = blockIdx.x * int64_t(kTileColumns) + column;
    R sum = 0;
    for (int warp = 0; warp < kTileWarps; ++warp) sum += part[warp * kTileColumns + column];
    if (j < chunk.columns) sums.columns[blockIdx.y * chunk.columns + j] = sum;
  }
}

template <class R, class O, bool pack>
__device__ __forceinline__ void store_tile(const Chunk<R>& chunk, const Place& at,
                                           const R (&w)[kWarpRows][kThreadColumns], double of_scale,
                                           const TileSums<R>& sums, O* ds) {
  store_values<R, O, pack>(chunk, at, w, ds);
  store_sums(chunk, at, w, of_scale, sums);
}

}  // namespace gapkern::contrastive

// Device kernels over a chunk of logits (chunk.cuh). Each reads t once. Exponents are relative to a row's or column's
// own maximum within a tile and cannot overflow; the second exponential hides behind the memory traffic.
#pragma once
#include "contrastive/chunk.cuh"

namespace gapkern::contrastive {

// row_part [tiles across, rows], column_part [tiles down, M]: log-sums of every tile's rows and columns without the
// labels, which are added in float64: a small loss is the log1p of the other terms over the label's, and would cancel.
template <class R, bool pack>
__global__ void __launch_bounds__(kTileThreads)
    lse_tiles(Chunk<R> chunk, const R* scale, int64_t label_offset, Partial* row_part, Partial* column_part) {
  GAPKERN_SHARED(R, highest, kTileWarps * kTileColumns);
  GAPKERN_SHARED(R, sums, kTileWarps * kTileColumns);
  const Place at;
  const R none = kNothing<R>, k = R(kLog2e) * *scale;
  R v[kWarpRows][kThreadColumns];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const bool inside = at.row + r < chunk.rows;
    if (inside) chunk.template load<pack>(at.row + r, at.column, v[r]);
    const int64_t label = at.row + r + label_offset;
    for (int c = 0; c < kThreadColumns; ++c) {
      const bool counts = inside && at.column + c < chunk.columns && at.column + c != label;
      v[r][c] = counts ? k * v[r][c] : none;
    }
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    R most = v[r][0];
    for (int c = 1; c < kThreadColumns; ++c) most = larger(most, v[r][c]);
    const R base = reference(warp_max(most));
    R sum = 0;
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) sum += exp2_of(v[r][c] - base);
    sum = warp_sum(sum);
    if (at.lane == 0 && at.row + r < chunk.rows)
      row_part[blockIdx.x * chunk.rows + at.row + r] = {double(base), double(sum)};
  }
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    R most = v[0][c];
    for (int r = 1; r < kWarpRows; ++r) most = larger(most, v[r][c]);
    highest[at.warp * kTileColumns + at.lane * kThreadColumns + c] = most;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    const int column = at.lane * kThreadColumns + c;
    R most = highest[column];
    for (int w = 1; w < kTileWarps; ++w) most = larger(most, highest[w * kTileColumns + column]);
    const R base = reference(most);
    R sum = 0;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) sum += exp2_of(v[r][c] - base);
    sums[at.warp * kTileColumns + column] = sum;
  }
  __syncthreads();
  for (int column = threadIdx.x; column < kTileColumns; column += kTileThreads) {
    const int64_t j = blockIdx.x * int64_t(kTileColumns) + column;
    if (j >= chunk.columns) continue;
    R most = highest[column];
    double sum = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      most = larger(most, highest[w * kTileColumns + column]);
      sum += double(sums[w * kTileColumns + column]);
    }
    column_part[blockIdx.y * chunk.columns + j] = {double(reference(most)), sum};
  }
}

// out[i] = ln of the sum over tiles, part [tiles, count], in their order; -inf where there is none.
inline __global__ void lse_combine(const Partial* part, int64_t tiles, int64_t count, double* out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  double base = kNothing<double>, sum = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const Partial next = part[t * count + i];
    if (next.sum == 0) continue;
    const double high = larger(base, next.high);
    sum = sum * exp2(base - high) + next.sum * exp2(next.high - high);
    base = high;
  }
  out[i] = kLn2 * base + log(sum);
}

// dS = grad_row e^(S - row_lse) + grad_col e^(S - col_lse), but grad_label at the label: p - 1 of a rounded p cancels
// for a small loss.
template <class R>
struct Weights {
  const double* row_lse;  // in units of log 2, as col_lse
  const R* grad_row;
  const R* grad_label;
  const double* col_lse;
  const R* grad_col;
  int64_t label_offset;  // the label of row 0 of the chunk
};

// dS of the softmax losses, rounded once.
template <class R, class O, bool pack>
__global__ void __launch_bounds__(kTileThreads)
    lse_gradient(Chunk<R> chunk, const R* scale, Weights<R> weights, TileSums<R> sums, O* ds) {
  const Place at;
  const R k = R(kLog2e) * *scale;
  R w[kWarpRows][kThreadColumns], column_grad[kThreadColumns];
  Split<R> column_lse[kThreadColumns];
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    const bool inside = at.column + c < chunk.columns;
    if (inside) column_lse[c] = Split<R>(weights.col_lse[at.column + c]);
    column_grad[c] = inside ? weights.grad_col[at.column + c] : R(0);
  }
  double of_scale = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int64_t row = at.row + r;
    R t[kThreadColumns] = {}, part = 0;
    const bool inside = row < chunk.rows;
    if (inside) chunk.template load<pack>(row, at.column, t);
    const Split<R> row_lse(inside ? weights.row_lse[row] : 0.);
    const R row_grad = inside ? weights.grad_row[row] : R(0);
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const R v = k * t[c];
      R weight = row_grad * row_lse.probability(v) + column_grad[c] * column_lse[c].probability(v);
      if (inside && at.column + c == row + weights.label_offset) weight = weights.grad_label[row];
      w[r][c] = inside && at.column + c < chunk.columns ? weight : R(0);
      part += w[r][c] * t[c];
    }
    of_scale += double(part);
  }
  store_tile<R, O, pack>(chunk, at, w, of_scale, sums, ds);
}

// The sigmoid loss and its dS = -z sigmoid(-z (s t + bias)), z = 1 at the label and -1 elsewhere.
template <class R, class O, bool pack>
__global__ void __launch_bounds__(kTileThreads)
    sigmoid_tiles(Chunk<R> chunk, const R* scale, const R* bias, int64_t label_offset, TileSums<R> sums, double* loss,
                  double* of_bias, O* ds) {
  GAPKERN_SHARED(double, loss_scratch, kTileWarps);
  GAPKERN_SHARED(double, bias_scratch, kTileWarps);
  const Place at;
  const R s = *scale, b = *bias;
  R w[kWarpRows][kThreadColumns];
  double loss_sum = 0, bias_sum = 0, scale_sum = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int64_t row = at.row + r;
    R t[kThreadColumns] = {}, losses = 0, weights = 0, products = 0;
    if (row < chunk.rows) chunk.template load<pack>(row, at.column, t);
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const bool inside = row < chunk.rows && at.column + c < chunk.columns;
      const bool positive = at.column + c == row + label_offset;
      const R u = positive ? s * t[c] + b : -(s * t[c] + b);
      const R e = exp2_of(R(-kLog2e) * (u < 0 ? -u : u));
      const R softplus = (u < 0 ? -u : R(0)) + log1p_of(e);  // of -u
      const R sigmoid = (u < 0 ? R(1) : e) / (1 + e);        // of -u
      w[r][c] = inside ? (positive ? -sigmoid : sigmoid) : R(0);
      losses += inside ? softplus : R(0);
      weights += w[r][c];
      products += w[r][c] * t[c];
    }
    loss_sum += double(losses);
    bias_sum += double(weights);
    scale_sum += double(products);
  }
  loss_sum = block_sum(loss_sum, loss_scratch);
  bias_sum = block_sum(bias_sum, bias_scratch);
  if (threadIdx.x == 0) {
    loss[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = loss_sum;
    of_bias[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = bias_sum;
  }
  store_tile<R, O, pack>(chunk, at, w, scale_sum, sums, ds);
}

}  // namespace gapkern::contrastive

// Device kernels over a chunk of logits (chunk.cuh) whose pairs are of classes: labels, positives, negatives, and those
// left out; gapkern/ops/contrastive/masked.py has the contract. Each reads t, and the guide's products, once. Which of
// a thread's 32 pairs are of a class is a bit of a word: what decides it is compared once, and every use tests a bit.
#pragma once
#include "contrastive/chunk.cuh"

namespace gapkern::contrastive {

static_assert(kWarpRows == 8 && kThreadColumns == 4, "a thread's pairs are the bits of a word");
__device__ __forceinline__ constexpr uint32_t bit(int r, int c) { return 1u << (r * kThreadColumns + c); }
__device__ __forceinline__ constexpr uint32_t row_bits(int r) { return 15u << (r * kThreadColumns); }
__device__ __forceinline__ constexpr uint32_t column_bits(int c) { return 0x11111111u << c; }

// A thread's part of a tile.
template <class R>
using Pairs = R[kWarpRows][kThreadColumns];

// What decides the classes of a chunk's pairs; null where absent.
template <class R>
struct ChunkClasses {
  const int64_t* row_ids;       // [rows]
  const int64_t* column_ids;    // [M]
  const R* row_limit;           // [rows], of t
  const R* column_limit;        // [M]
  const R* guide;               // [rows, M], products of the guide's embeddings
  const R* guide_row_limit;     // [rows], of those
  const R* guide_column_limit;  // [M]
  int64_t label_offset;         // the label of row 0 of the chunk; far outside where there are none
  bool positive;                // pairs of equal ids are positives, otherwise left out
};

// Bits of the thread's pairs.
struct Members {
  uint32_t label, positive, negative;
};

template <bool pack, class R>
__device__ __forceinline__ void load_rows(const Chunk<R>& products, const Place& at, Pairs<R>& v) {
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    if (at.row + r < products.rows) {
      products.template load<pack>(at.row + r, at.column, v[r]);
    } else {
      for (int c = 0; c < kThreadColumns; ++c) v[r][c] = R(0);
    }
  }
}

// `packed`: rows can be read 16 bytes at a time.
template <class R>
__device__ __forceinline__ void load_tile(const R* from, int64_t rows, int64_t columns, bool packed, const Place& at,
                                          Pairs<R>& v) {
  const Chunk<R> products{from, nullptr, nullptr, rows, columns};
  if (packed)
    load_rows<true>(products, at, v);
  else
    load_rows<false>(products, at, v);
}

// t of the chunk: distances that rounding makes negative are zero, as limits of theirs are.
template <class R>
__device__ __forceinline__ void load_tile(const Chunk<R>& chunk, bool packed, const Place& at, Pairs<R>& t) {
  load_tile(chunk.products, chunk.rows, chunk.columns, packed, at, t);
  if (!chunk.row_norms) return;
  R of_column[kThreadColumns];
  for (int c = 0; c < kThreadColumns; ++c)
    of_column[c] = at.column + c < chunk.columns ? chunk.column_norms[at.column + c] : R(0);
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const R of_row = at.row + r < chunk.rows ? chunk.row_norms[at.row + r] : R(0);
    for (int c = 0; c < kThreadColumns; ++c) {
      const R distance = 2 * t[r][c] - of_row - of_column[c];
      t[r][c] = distance > 0 ? R(0) : distance;
    }
  }
}

// The pairs of equal ids.
template <class R>
__device__ __forceinline__ uint32_t equal_ids(const Chunk<R>& chunk, const Place& at, const int64_t* row_ids,
                                              const int64_t* column_ids) {
  int64_t of_column[kThreadColumns];
  for (int c = 0; c < kThreadColumns; ++c) of_column[c] = at.column + c < chunk.columns ? column_ids[at.column + c] : 0;
  uint32_t found = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int64_t of_row = at.row + r < chunk.rows ? row_ids[at.row + r] : 0;
    for (int c = 0; c < kThreadColumns; ++c) found |= of_row == of_column[c] ? bit(r, c) : 0;
  }
  return found;
}

// The pairs whose value is above a limit of their row's or their column's.
template <class R>
__device__ __forceinline__ uint32_t above_limits(const Chunk<R>& chunk, const Place& at, const Pairs<R>& value,
                                                 const R* row_limit, const R* column_limit) {
  const R never = -kNothing<R>;
  R of_column[kThreadColumns];
  for (int c = 0; c < kThreadColumns; ++c)
    of_column[c] = column_limit && at.column + c < chunk.columns ? column_limit[at.column + c] : never;
  uint32_t found = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const R of_row = row_limit && at.row + r < chunk.rows ? row_limit[at.row + r] : never;
    for (int c = 0; c < kThreadColumns; ++c)
      found |= (value[r][c] > of_row) | (value[r][c] > of_column[c]) ? bit(r, c) : 0;
  }
  return found;
}

// The pairs within the chunk.
template <class R>
__device__ __forceinline__ uint32_t inside(const Chunk<R>& chunk, const Place& at) {
  const int64_t rows = chunk.rows - at.row, columns = chunk.columns - at.column;
  const uint32_t down = rows >= kWarpRows ? ~0u : rows <= 0 ? 0 : (1u << (kThreadColumns * int(rows))) - 1;
  const uint32_t across = columns >= kThreadColumns ? 15 : columns <= 0 ? 0 : (1u << int(columns)) - 1;
  return down & (across * column_bits(0));
}

template <class R>
__device__ __forceinline__ Members members_of(const Chunk<R>& chunk, const ChunkClasses<R>& classes, bool packed,
                                              const Place& at, const Pairs<R>& t) {
  const uint32_t there = inside(chunk, at);
  uint32_t label = 0, equal = 0, above = 0;
  const int64_t first = at.row + classes.label_offset - at.column;  // the first row's label, from the thread's column
  if (first > -kWarpRows && first < kThreadColumns)
    for (int r = 0; r < kWarpRows; ++r)
      if (first + r >= 0 && first + r < kThreadColumns) label |= bit(r, int(first) + r);
  if (classes.row_ids) equal = equal_ids(chunk, at, classes.row_ids, classes.column_ids);
  if (classes.row_limit || classes.column_limit)
    above = above_limits(chunk, at, t, classes.row_limit, classes.column_limit);
  if (classes.guide) {
    Pairs<R> u;
    load_tile(classes.guide, chunk.rows, chunk.columns, packed, at, u);
    above |= above_limits(chunk, at, u, classes.guide_row_limit, classes.guide_column_limit);
  }
  label &= there;
  const uint32_t others = there & ~label;
  return {label, classes.positive ? others & equal : 0, others & ~equal & ~above};
}

// row_part [classes, tiles across, rows], column_part [classes, tiles down, M]: log-sums of every tile's rows and
// columns over negatives, then over positives. Positives are few where ids are of many values: a warp forms
// exponentials only for those of its rows and columns that have any.
template <class R>
__global__ void __launch_bounds__(kTileThreads) class_tiles(Chunk<R> chunk, bool packed, ChunkClasses<R> classes,
                                                            const R* scale, Partial* row_part, Partial* column_part) {
  GAPKERN_SHARED(R, highest, kTileWarps * kTileColumns);
  GAPKERN_SHARED(R, sums, kTileWarps * kTileColumns);
  const Place at;
  const R none = kNothing<R>, k = R(kLog2e) * *scale;
  Pairs<R> t;
  load_tile(chunk, packed, at, t);
  const Members members = members_of(chunk, classes, packed, at, t);
#pragma unroll 1
  for (int of = 0; of < (classes.positive ? 2 : 1); ++of) {
    const uint32_t counts = of == 0 ? members.negative : members.positive;
    Pairs<R> v;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      for (int c = 0; c < kThreadColumns; ++c) v[r][c] = counts & bit(r, c) ? k * t[r][c] : none;
      R base = 0, sum = 0;
      if (__ballot_sync(kEveryLane, (counts & row_bits(r)) != 0)) {
        R most = v[r][0];
        for (int c = 1; c < kThreadColumns; ++c) most = larger(most, v[r][c]);
        base = reference(warp_max(most));
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) sum += exp2_of(v[r][c] - base);
        sum = warp_sum(sum);
      }
      if (at.lane == 0 && at.row + r < chunk.rows)
        row_part[(of * int64_t(gridDim.x) + blockIdx.x) * chunk.rows + at.row + r] = {double(base), double(sum)};
    }
    if (of > 0) __syncthreads();
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
      R sum = 0;
      if (__ballot_sync(kEveryLane, (counts & column_bits(c)) != 0)) {
        R most = highest[column];
        for (int w = 1; w < kTileWarps; ++w) most = larger(most, highest[w * kTileColumns + column]);
        const R base = reference(most);
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) sum += exp2_of(v[r][c] - base);
      }
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
      column_part[(of * int64_t(gridDim.y) + blockIdx.y) * chunk.columns + j] = {double(reference(most)), sum};
    }
  }
}

template <class R, class O>
__device__ __forceinline__ void store(const Chunk<R>& chunk, bool packed, const Place& at, const Pairs<R>& w,
                                      double of_scale, const TileSums<R>& sums, O* ds) {
  if (packed)
    store_values<R, O, true>(chunk, at, w, ds);
  else
    store_values<R, O, false>(chunk, at, w, ds);
  store_sums(chunk, at, w, of_scale, sums);
}

// One class's part of dS = grad_row e^(S - row_lse) + grad_col e^(S - col_lse); log-sum-exps in units of log 2.
template <class R>
struct WeightsOfClass {
  const double* row_lse;  // [rows]; those of no pair are not read
  const R* grad_row;
  const double* column_lse;  // [M]
  const R* grad_column;
};

template <class R>
struct WeightsOfClasses {
  WeightsOfClass<R> negative, positive;
  const R* grad_label;  // [rows], dS at the labels; null: zero
};

// dS by the class of its pair, rounded once; of_all [tiles] are sums of dS.
template <class R, class O>
__global__ void __launch_bounds__(kTileThreads)
    class_gradient(Chunk<R> chunk, bool packed, ChunkClasses<R> classes, const R* scale, WeightsOfClasses<R> weights,
                   TileSums<R> sums, double* of_all, O* ds) {
  GAPKERN_SHARED(double, scratch, kTileWarps);
  const Place at;
  const R k = R(kLog2e) * *scale;
  Pairs<R> t;
  load_tile(chunk, packed, at, t);
  const Members members = members_of(chunk, classes, packed, at, t);
  R column_grad[kThreadColumns];
  Split<R> column_lse[kThreadColumns];
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    const bool there = at.column + c < chunk.columns;
    if (there) column_lse[c] = Split<R>(weights.negative.column_lse[at.column + c]);
    column_grad[c] = there ? weights.negative.grad_column[at.column + c] : R(0);
  }
  double scale_sum = 0, all_sum = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int64_t row = at.row + r;
    const bool there = row < chunk.rows;
    const Split<R> row_lse(there ? weights.negative.row_lse[row] : 0.);
    const R row_grad = there ? weights.negative.grad_row[row] : R(0);
    R w[kThreadColumns];
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const R v = k * t[r][c];
      const R weight = row_grad * row_lse.probability(v) + column_grad[c] * column_lse[c].probability(v);
      w[c] = members.negative & bit(r, c) ? weight : R(0);
    }
    if (members.positive & row_bits(r)) {
      const WeightsOfClass<R>& positive = weights.positive;
      const Split<R> row_lse_of(positive.row_lse[row]);
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        if (!(members.positive & bit(r, c))) continue;
        const R v = k * t[r][c];
        w[c] = positive.grad_row[row] * row_lse_of.probability(v) +
               positive.grad_column[at.column + c] * Split<R>(positive.column_lse[at.column + c]).probability(v);
      }
    }
    if (weights.grad_label && (members.label & row_bits(r))) {
      for (int c = 0; c < kThreadColumns; ++c)
        if (members.label & bit(r, c)) w[c] = weights.grad_label[row];
    }
    R of_scale = 0, all = 0;
    for (int c = 0; c < kThreadColumns; ++c) {
      of_scale += w[c] * t[r][c];
      all += w[c];
      t[r][c] = w[c];
    }
    scale_sum += double(of_scale);
    all_sum += double(all);
  }
  all_sum = block_sum(all_sum, scratch);
  if (threadIdx.x == 0) of_all[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = all_sum;
  store(chunk, packed, at, t, scale_sum, sums, ds);
}

// What decides the sigmoid loss's pairs: z = 1 and the weight row_weights + column_weights where ids are equal, else -1
// and 1.
template <class R>
struct WeightedIds {
  const int64_t* row_ids;     // [rows]
  const int64_t* column_ids;  // [M]
  const R* row_weights;       // [rows]
  const R* column_weights;    // [M]
};

// The weighted sigmoid loss and its dS = -w z sigmoid(-z (s t + bias)).
template <class R, class O>
__global__ void __launch_bounds__(kTileThreads)
    sigmoid_of_ids(Chunk<R> chunk, bool packed, WeightedIds<R> ids, const R* scale, const R* bias, TileSums<R> sums,
                   double* loss, double* of_bias, O* ds) {
  GAPKERN_SHARED(double, loss_scratch, kTileWarps);
  GAPKERN_SHARED(double, bias_scratch, kTileWarps);
  const Place at;
  const R s = *scale, b = *bias;
  Pairs<R> t;
  load_tile(chunk, packed, at, t);
  const uint32_t there = inside(chunk, at), equal = there & equal_ids(chunk, at, ids.row_ids, ids.column_ids);
  double loss_sum = 0, bias_sum = 0, scale_sum = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    R losses = 0, all = 0, products = 0;
    R weight[kThreadColumns] = {R(1), R(1), R(1), R(1)};
    if (equal & row_bits(r)) {
      for (int c = 0; c < kThreadColumns; ++c)
        if (equal & bit(r, c)) weight[c] = ids.row_weights[at.row + r] + ids.column_weights[at.column + c];
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const bool positive = equal & bit(r, c);
      const R v = s * t[r][c] + b, u = positive ? v : -v;
      const R e = exp2_of(R(-kLog2e) * (u < 0 ? -u : u));
      const R softplus = (u < 0 ? -u : R(0)) + log1p_of(e);  // of -u
      const R sigmoid = (u < 0 ? R(1) : e) / (1 + e);        // of -u
      const bool counts = there & bit(r, c);
      const R w = counts ? weight[c] * (positive ? -sigmoid : sigmoid) : R(0);
      losses += counts ? weight[c] * softplus : R(0);
      all += w;
      products += w * t[r][c];
      t[r][c] = w;
    }
    loss_sum += double(losses);
    bias_sum += double(all);
    scale_sum += double(products);
  }
  loss_sum = block_sum(loss_sum, loss_scratch);
  bias_sum = block_sum(bias_sum, bias_scratch);
  if (threadIdx.x == 0) {
    loss[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = loss_sum;
    of_bias[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = bias_sum;
  }
  store(chunk, packed, at, t, scale_sum, sums, ds);
}

}  // namespace gapkern::contrastive

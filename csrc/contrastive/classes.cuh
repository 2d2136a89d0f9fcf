// Device kernels over a chunk of logits (chunk.cuh) whose pairs are of classes: labels, positives, negatives, and those
// left out; gapkern/ops/contrastive/masked.py has the contract. Each reads t, and the guide's products, once. Which of
// a thread's 32 pairs are of a class is a bit of a word: what decides it is compared once, and every use tests a bit.
#pragma once
#include "contrastive/chunk.cuh"
#include "contrastive/epilogue.cuh"

namespace gapkern::contrastive {

static_assert(kWarpRows == 8 && kThreadColumns == 4, "a thread's pairs are the bits of a word");
__device__ __forceinline__ constexpr uint32_t bit(int r, int c) { return 1u << (r * kThreadColumns + c); }
__device__ __forceinline__ constexpr uint32_t row_bits(int r) { return 15u << (r * kThreadColumns); }
__device__ __forceinline__ constexpr uint32_t column_bits(int c) { return 0x11111111u << c; }

// A thread's part of a tile.
template <class R>
using Pairs = R[kWarpRows][kThreadColumns];

// Where a thread reads what belongs to its r-th row and its c-th column: beyond the chunk at its last, without a
// branch. No bit is set there. Both counts are below 2^31.
template <class R>
__device__ __forceinline__ int row_of(const Chunk<R>& chunk, const Place& at, int r) {
  const int row = int(at.row) + r, last = int(chunk.rows) - 1;
  return row < last ? row : last;
}
template <class R>
__device__ __forceinline__ int column_of(const Chunk<R>& chunk, const Place& at, int c) {
  const int column = int(at.column) + c, last = int(chunk.columns) - 1;
  return column < last ? column : last;
}

// Terms below 2^-126 of a sum's largest vanish in its rounding.
__device__ __forceinline__ float exp2_term(float x) { return sm90::exp2_fast(x); }
__device__ __forceinline__ double exp2_term(double x) { return exp2_of(x); }

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

// `packed`, of float32: rows can be read 16 bytes at a time.
template <class R>
__device__ __forceinline__ void load_tile(const R* from, const Chunk<R>& chunk, bool packed, const Place& at,
                                          Pairs<R>& v) {
  if (sizeof(R) < 8 && packed) {
    const R* const first = from + (at.column < chunk.columns ? at.column : chunk.columns - kThreadColumns);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const auto values =
          *reinterpret_cast<const Pack<R, kThreadColumns>*>(first + row_of(chunk, at, r) * chunk.columns);
      for (int c = 0; c < kThreadColumns; ++c) v[r][c] = values.value[c];
    }
  } else {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r)
      for (int c = 0; c < kThreadColumns; ++c)
        v[r][c] = from[row_of(chunk, at, r) * chunk.columns + column_of(chunk, at, c)];
  }
}

// t of the chunk: distances that rounding makes negative are zero, as limits of theirs are.
template <class R>
__device__ __forceinline__ void load_tile(const Chunk<R>& chunk, bool packed, const Place& at, Pairs<R>& t) {
  load_tile(chunk.products, chunk, packed, at, t);
  if (!chunk.row_norms) return;
  R of_column[kThreadColumns];
  for (int c = 0; c < kThreadColumns; ++c) of_column[c] = chunk.column_norms[column_of(chunk, at, c)];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const R of_row = chunk.row_norms[row_of(chunk, at, r)];
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
    const int64_t of_row = row_ids[row_of(chunk, at, r)];
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
  for (int c = 0; c < kThreadColumns; ++c) of_column[c] = column_limit ? column_limit[column_of(chunk, at, c)] : never;
  uint32_t found = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const R of_row = row_limit ? row_limit[row_of(chunk, at, r)] : never;
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
    load_tile(classes.guide, chunk, packed, at, u);
    above |= above_limits(chunk, at, u, classes.guide_row_limit, classes.guide_column_limit);
  }
  label &= there;
  const uint32_t others = there & ~label;
  return {label, classes.positive ? others & equal : 0, others & ~equal & ~above};
}

// The rows' v combined over the lanes, v[r] being the lane's part of row r, each by its own quarter of an octet of
// lanes: lane i has that of row i / 4. Nine shuffles for eight rows, where row by row would be forty.
template <class R, class F>
__device__ __forceinline__ R fold_rows(R (&v)[kWarpRows], int lane, const F& f) {
#pragma unroll
  for (int rows = kWarpRows / 2; rows > 0; rows /= 2) {
    const bool upper = lane & (rows * 4);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const R mine = upper ? v[r + rows] : v[r], other = upper ? v[r] : v[r + rows];
      v[r] = f(mine, __shfl_xor_sync(kEveryLane, other, rows * 4));
    }
  }
  for (int o = 2; o > 0; o /= 2) v[0] = f(v[0], __shfl_xor_sync(kEveryLane, v[0], o));
  return v[0];
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
  const auto greater = [](R a, R b) { return larger(a, b); };
  const auto plus = [](R a, R b) { return a + b; };
  Pairs<R> t;
  load_tile(chunk, packed, at, t);
  const Members members = members_of(chunk, classes, packed, at, t);
#pragma unroll 1
  for (int of = 0; of < (classes.positive ? 2 : 1); ++of) {
    const uint32_t counts = of == 0 ? members.negative : members.positive;
    Pairs<R> v;
    R part[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      for (int c = 0; c < kThreadColumns; ++c) v[r][c] = counts & bit(r, c) ? k * t[r][c] : none;
      part[r] = larger(larger(v[r][0], v[r][1]), larger(v[r][2], v[r][3]));
    }
    const R row_base = reference(fold_rows(part, at.lane, greater));
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const R base = __shfl_sync(kEveryLane, row_base, r * 4);
      part[r] = 0;
      if (__ballot_sync(kEveryLane, (counts & row_bits(r)) != 0))
        for (int c = 0; c < kThreadColumns; ++c) part[r] += exp2_term(v[r][c] - base);
    }
    const R row_sum = fold_rows(part, at.lane, plus);
    const int64_t row = at.row + at.lane / 4;
    if (at.lane % 4 == 0 && row < chunk.rows)
      row_part[(of * int64_t(gridDim.x) + blockIdx.x) * chunk.rows + row] = {double(row_base), double(row_sum)};
    if (of > 0) __syncthreads();
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      R most = v[0][c], sum = 0;
      for (int r = 1; r < kWarpRows; ++r) most = larger(most, v[r][c]);
      const R base = reference(most);
      if (__ballot_sync(kEveryLane, (counts & column_bits(c)) != 0))
        for (int r = 0; r < kWarpRows; ++r) sum += exp2_term(v[r][c] - base);
      const int to = at.warp * kTileColumns + at.lane * kThreadColumns + c;
      highest[to] = most;
      sums[to] = sum;
    }
    __syncthreads();
    for (int column = threadIdx.x; column < kTileColumns; column += kTileThreads) {
      const int64_t j = blockIdx.x * int64_t(kTileColumns) + column;
      if (j >= chunk.columns) continue;
      R most = highest[column], sum = 0;
      for (int w = 1; w < kTileWarps; ++w) most = larger(most, highest[w * kTileColumns + column]);
      const R base = reference(most);
      for (int w = 0; w < kTileWarps; ++w)
        sum += sums[w * kTileColumns + column] * exp2_term(highest[w * kTileColumns + column] - base);
      column_part[(of * int64_t(gridDim.y) + blockIdx.y) * chunk.columns + j] = {double(base), double(sum)};
    }
  }
}

template <class R, class O>
__device__ __forceinline__ void store(const Chunk<R>& chunk, bool packed, const Place& at, const Pairs<R>& w,
                                      double of_scale, const TileSums<R>& sums, O* ds) {
  if (sizeof(R) < 8 && packed)
    store_values<R, O, true>(chunk, at, w, ds);
  else
    store_values<R, O, false>(chunk, at, w, ds);
  store_sums(chunk, at, w, of_scale, sums);
}

// One class's part of dS = grad_row e^(S - row_lse) + grad_col e^(S - col_lse); log-sum-exps in units of log 2.
template <class R>
struct WeightsOfClass {
  const double* row_lse;  // [rows]
  const R* grad_row;
  const double* column_lse;  // [M]
  const R* grad_column;
};

template <class R>
struct WeightsOfClasses {
  WeightsOfClass<R> negative, positive;
  const R* grad_label;  // [rows], dS at the labels; null: zero
};

// e^(S - lse), of v = log2(e) S. Where a sum is empty it is no number, and no pair has it.
template <class R>
__device__ __forceinline__ R probability(const Split<R>& lse, R v) {
  return exp2_term((v - lse.high) - lse.low);
}

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
  const WeightsOfClass<R>&negative = weights.negative, &positive = weights.positive;
  R column_grad[kThreadColumns];
  Split<R> column_lse[kThreadColumns];
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    const int column = column_of(chunk, at, c);
    column_lse[c] = Split<R>(negative.column_lse[column]);
    column_grad[c] = negative.grad_column[column];
  }
  double scale_sum = 0, all_sum = 0;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = row_of(chunk, at, r);
    const Split<R> row_lse(negative.row_lse[row]);
    const R row_grad = negative.grad_row[row];
    R w[kThreadColumns];
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const R v = k * t[r][c];
      const R weight = row_grad * probability(row_lse, v) + column_grad[c] * probability(column_lse[c], v);
      w[c] = members.negative & bit(r, c) ? weight : R(0);
    }
    if (members.positive & row_bits(r)) {
      const Split<R> lse_of_row(positive.row_lse[row]);
      const R grad_of_row = positive.grad_row[row];
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const int column = column_of(chunk, at, c);
        const R v = k * t[r][c];
        const R weight = grad_of_row * probability(lse_of_row, v) +
                         positive.grad_column[column] * probability(Split<R>(positive.column_lse[column]), v);
        w[c] = members.positive & bit(r, c) ? weight : w[c];
      }
    }
    if (weights.grad_label && (members.label & row_bits(r)))
      for (int c = 0; c < kThreadColumns; ++c) w[c] = members.label & bit(r, c) ? weights.grad_label[row] : w[c];
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

// What decides the sigmoid loss's pairs: where ids are equal z = 1 and a = row_weights + column_weights, which is the
// weight, or the target of weight 1; else z = -1 and the weight 1.
template <class R>
struct WeightedIds {
  const int64_t* row_ids;     // [rows]
  const int64_t* column_ids;  // [M]
  const R* row_weights;       // [rows]
  const R* column_weights;    // [M]
  bool soft_targets;
};

// softplus(x) and its derivative.
struct Softplus {
  double loss, gradient;
};
__device__ __forceinline__ sm90::SigmoidTerms softplus(float x) { return sm90::sigmoid_of_other(x, 1, 0); }
__device__ __forceinline__ Softplus softplus(double x) {
  const double e = exp2_of(-kLog2e * (x < 0 ? -x : x));
  return {(x > 0 ? x : 0.) + log1p_of(e), (x > 0 ? 1. : e) / (1 + e)};
}

// The sigmoid loss and its dS = -w z sigmoid(-z (s t + bias)), and 1 - a more at a soft target.
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
    R weight[kThreadColumns] = {R(1), R(1), R(1), R(1)}, rest[kThreadColumns] = {};
    if (equal & row_bits(r)) {
      const R of_row = ids.row_weights[row_of(chunk, at, r)];
      for (int c = 0; c < kThreadColumns; ++c) {
        const R a = equal & bit(r, c) ? of_row + ids.column_weights[column_of(chunk, at, c)] : R(1);
        weight[c] = ids.soft_targets ? R(1) : a;
        rest[c] = ids.soft_targets ? 1 - a : R(0);
      }
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const bool positive = equal & bit(r, c);
      const R logit = s * t[r][c] + b;
      const auto terms = softplus(positive ? -logit : logit);
      // a softplus(-S) + (1 - a) softplus(S) = softplus(-S) + (1 - a) S.
      const bool counts = there & bit(r, c);
      const R w = counts ? weight[c] * (positive ? -terms.gradient : terms.gradient) + rest[c] : R(0);
      losses += counts ? weight[c] * terms.loss + rest[c] * logit : R(0);
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

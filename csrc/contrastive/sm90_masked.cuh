// The small kernels around the Hopper products over classes of pairs (contrastive/sm90_masked_gemm.h): passes over
// ranges of exponents, and the float32 recomputation of what none of them had.
//
// The range. A class may leave out the largest logits of a row, so that what is left underflows at the common shift
// although the row as a whole would not. Its log-sum-exp is then pending, +inf, and one pass more over all pairs, with
// exponents raised as far as sums that came out too small allow, 2^213 for 32768 terms, finds it at the tensor cores'
// rate. A pass that nothing waits for returns at once. Three passes cover unit vectors up to a logit_scale of 210
// (32768 pairs); what is pending afterwards is recomputed by `repair_classes`, float32 products with a running maximum.
// An empty class and one that underflowed have the same sum, zero: only a pass that can flush nothing tells them apart,
// which up to a logit_scale of 67 the first is.
#pragma once
#include "contrastive/sm90_parts.cuh"

namespace gapkern::contrastive::sm90 {

// control = {k, -c, the least k <x, y> that there can be}.
GAPKERN_HD double pending() { return double(from_bits(0x7f800000u)); }
GAPKERN_HD bool flushes(const float* control) { return !(control[2] + control[1] >= -125); }

// The log-sum of a class of at most `terms` exponentials relative to c, in units of log 2: -inf of nothing, +inf where
// it is pending.
GAPKERN_HD double log2_class_sum(double sum, double terms, const float* control) {
  if (sum != sum && control[1] == control[1]) return sum;  // no shift may be a number where a norm is none
  const bool flushed = flushes(control);
  if (sum == 0 && !flushed) return -pending();
  const bool complete = (!flushed || sum >= terms * 0x1p-102) && sum < 0x1p127;
  return complete ? log2(sum) - double(control[1]) : pending();
}

// Sums below terms 2^kFloor stay below 2^127 when their exponents are raised by this.
GAPKERN_HD float raise_of(double terms) { return float(floor(228 - log2(terms))); }

// out[i] = the sum over tiles of part [tiles, stride], in their order; zero where the pass did nothing.
inline __global__ void sum_class_parts(const float* part, int64_t tiles, int64_t stride, int64_t count,
                                       const float* condition, double* out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  double sum = 0;
  if (!condition || *condition != 0)
    for (int64_t t = 0; t < tiles; ++t) sum += double(part[t * stride + i]);
  out[i] = sum;
}

// Puts a pass's sums where lse is pending; pending_of_block[b] = 1 where any of a block's still is.
inline __global__ void __launch_bounds__(kThreads)
    merge_classes(const double* sums, int64_t count, int64_t terms, const float* control, double* lse,
                  float* pending_of_block) {
  GAPKERN_SHARED(float, scratch, kWarps);
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  float left = 0;
  if (i < count && lse[i] == pending()) {
    const double found = kLn2 * log2_class_sum(sums[i], double(terms), control);
    lse[i] = found;
    left = found == pending() ? 1 : 0;
  }
  left = block_max<kWarps>(left, scratch);
  if (threadIdx.x == 0) pending_of_block[blockIdx.x] = left;
}

// The condition of the next pass, and its control; one block.
inline __global__ void __launch_bounds__(kThreads)
    next_pass(const float* pending_of_block, int64_t blocks, const float* control, int64_t terms, float* condition,
              float* next) {
  GAPKERN_SHARED(float, scratch, kWarps);
  const float found = block_max<kWarps>(part_max(pending_of_block, blocks, kThreads), scratch);
  if (threadIdx.x != 0) return;
  *condition = found;
  next[0] = control[0];
  next[1] = control[1] + raise_of(double(terms));
  next[2] = control[2];
}

// Replaces what is pending among the log-sums over negatives and over positives, [rows] each. Products are of another
// order than the tensor cores': pairs at a limit are to be negatives here, or dS could have one that the sum has not.
template <class T>
__global__ void __launch_bounds__(kThreads)
    repair_classes(Products<T> p, int64_t label, const float* control, const float* row_marks,
                   const float* column_marks, double* negative, double* positive) {
  const int64_t row0 = blockIdx.x * int64_t(kSide);
  bool needed = false;
  for (int r = 0; r < kSide && row0 + r < p.rows; ++r)
    needed = needed || negative[row0 + r] == pending() || (positive && positive[row0 + r] == pending());
  if (!needed) return;
  const float k = control[0];
  const int part = threadIdx.x / kAcross * kPart;
  uint32_t id[kPart];
  float limit[kPart];
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int64_t row = row0 + part + i;
    id[i] = row < p.rows ? to_bits(row_marks[2 * row]) : 0;
    limit[i] = row < p.rows ? row_marks[2 * row + 1] : 0;
  }
  RunningSum sums[2][kPart];
  for (int64_t column0 = 0; column0 < p.columns; column0 += kSide) {
    float acc[kPart][kPart];
    tile_products(p, row0, column0, acc);
    over_part(acc, [&](float product, int i, int row, int column) {
      if (column0 + column >= p.columns || column0 + column == row0 + row + label) return;
      const float* mark = column_marks + 2 * (column0 + column);
      if (id[i] == to_bits(mark[0]))
        sums[1][i].add(k * product, 1);
      else if (!(product > limit[i] || product > mark[1]))
        sums[0][i].add(k * product, 1);
    });
  }
  const auto finish = [&](RunningSum& sum, int64_t row, double* lse) {
    for (int o = kAcross / 2; o > 0; o /= 2) {
      const float base = __shfl_xor_sync(kEveryLane, sum.base, o);
      sum.add(base, __shfl_xor_sync(kEveryLane, sum.sum, o));
    }
    if (threadIdx.x % kAcross == 0 && row < p.rows && lse && lse[row] == pending())
      lse[row] = kLn2 * (double(sum.base) + log2(double(sum.sum)));
  };
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    finish(sums[0][i], row0 + part + i, negative);
    finish(sums[1][i], row0 + part + i, positive);
  }
}

}  // namespace gapkern::contrastive::sm90

// The small kernels around the Hopper products: the choice of the exponents' shift, sums of partial sums, weights,
// labels, and the float32 recomputation of what a common shift could not represent. Sums are over all but the labels.
// All decisions are taken on the device, so that nothing waits for the host and everything can be captured in a graph.
//
// The shift. |k <x, y>| <= bound = k max|x| max|y|. c is at least what keeps a sum of `terms` exponentials below
// 2^kCeiling: no sum overflows. A sum may underflow instead: below terms 2^kFloor more than 2^-24 of it can have been
// flushed to zero. Such rows are marked NaN and recomputed by `repair_lse`, float32 products with a running maximum.
// Otherwise c is raised to the bound where that is safe without: the logits of trained pairs are near it, and what
// is rounded is k <x, y> - c. For normalised embeddings c is the bound up to logit_scale 35 and the least from 67 on
// (32768 pairs); at 100 only rows whose best cosine, but the label's, is below -0.26 are recomputed. For embeddings of
// large norms most rows may be, without tensor cores: GAPKERN_KERNEL=chunked suits those. In the gradient a row or
// column whose weight or exponentials leave float32's range has a separate weight (contrastive/epilogue.cuh); tiles
// without any pay nothing.
#pragma once
#include "contrastive/sm90_parts.cuh"

namespace gapkern::contrastive::sm90 {

// control = {k, -c}; one block.
inline constexpr int kShiftThreads = 1024, kShiftWarps = kShiftThreads / kWarp;
inline __global__ void __launch_bounds__(kShiftThreads)
    choose_shift(const float* row_norms, int64_t rows, const float* column_norms, int64_t columns, const float* scale,
                 float* control) {
  GAPKERN_SHARED(float, row_scratch, kShiftWarps);
  GAPKERN_SHARED(float, column_scratch, kShiftWarps);
  const float row = block_max<kShiftWarps>(part_max(row_norms, rows, kShiftThreads), row_scratch);
  const float column = block_max<kShiftWarps>(part_max(column_norms, columns, kShiftThreads), column_scratch);
  if (threadIdx.x != 0) return;
  const float k = float(kLog2e) * *scale;
  const float bound = (k < 0 ? -k : k) * row * column * 1.001f;  // the norms are rounded
  control[0] = k;
  control[1] = -shift_of(bound, double(larger(rows, columns)));
}

// out[i] = the sum over tiles of part [tiles, stride], in their order.
inline __global__ void sum_parts(const float* part, int64_t tiles, int64_t stride, int64_t count, double* out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  double sum = 0;
  for (int64_t t = 0; t < tiles; ++t) sum += double(part[t * stride + i]);
  out[i] = sum;
}

// NaN where `repair_lse` is wanted; so is that of a row whose label is its only column.
inline __global__ void finish_lse(const double* sums, int64_t count, int64_t terms, const float* control, double* lse) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < count) lse[i] = kLn2 * log2_sum(sums[i], double(terms), control[1]);
}

// Replaces what is NaN among lse [rows]: log-sums over all columns but the label, which is row + label, -inf of none.
template <class T>
__global__ void __launch_bounds__(kThreads)
    repair_lse(Products<T> p, int64_t label, const float* control, double* lse) {
  const int64_t row0 = blockIdx.x * int64_t(kSide);
  bool needed = false;
  for (int r = 0; r < kSide && row0 + r < p.rows; ++r) needed = needed || lse[row0 + r] != lse[row0 + r];
  if (!needed) return;
  const float k = control[0];
  RunningSum sums[kPart];
  for (int64_t column0 = 0; column0 < p.columns; column0 += kSide) {
    float acc[kPart][kPart];
    tile_products(p, row0, column0, acc);
    over_part(acc, [&](float product, int i, int row, int column) {
      if (column0 + column < p.columns && column0 + column != row0 + row + label) sums[i].add(k * product, 1);
    });
  }
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    for (int o = kAcross / 2; o > 0; o /= 2) {
      const float base = __shfl_xor_sync(kEveryLane, sums[i].base, o);
      sums[i].add(base, __shfl_xor_sync(kEveryLane, sums[i].sum, o));
    }
    const int64_t row = row0 + threadIdx.x / kAcross * kPart + i;
    if (threadIdx.x % kAcross == 0 && row < p.rows && lse[row] != lse[row])
      lse[row] = kLn2 * (double(sums[i].base) + log2(double(sums[i].sum)));
  }
}

// Whether g 2^(c - lse2) e can stand for g 2^-lse2 2^v in float32.
GAPKERN_HD bool common_weight_is_safe(double g, double lse2, float shift, double terms) {
  if (!(lse2 + double(shift) >= log2(terms) + kFloor)) return false;
  if (g == 0) return true;
  const double exponent = log2(g < 0 ? -g : g) - lse2 - double(shift);
  return exponent >= -kWeightRange && exponent <= kWeightRange;
}

// The weights of rows or columns, common where that is safe; separate_of_block[b] = 1 where any of a block's is not.
// Those beyond `count`, up to `padded`, are zero.
inline __global__ void __launch_bounds__(kThreads)
    form_weights(const double* lse2, const double* grad, int64_t count, int64_t padded, int64_t terms,
                 const float* control, float* weight, float* separate_of_block) {
  GAPKERN_SHARED(float, scratch, kWarps);
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  float separate = 0;
  if (i < count) {
    const float shift = control[1];
    separate = common_weight_is_safe(grad[i], lse2[i], shift, double(terms)) ? 0 : 1;
    weight[i] =
        separate != 0 ? separate_weight(grad[i], lse2[i]) : common_weight(grad[i] * exp2(-lse2[i] - double(shift)));
  } else if (i < padded) {
    weight[i] = 0;
  }
  separate = block_max<kWarps>(separate, scratch);
  if (threadIdx.x == 0) separate_of_block[blockIdx.x] = separate;
}

// separate = 1 where any block has a separate weight, else 0; one block.
inline __global__ void __launch_bounds__(kThreads)
    any_separate_weight(const float* separate_of_block, int64_t blocks, float* separate) {
  GAPKERN_SHARED(float, scratch, kWarps);
  const float found = block_max<kWarps>(part_max(separate_of_block, blocks, kThreads), scratch);
  if (threadIdx.x == 0) *separate = found;
}

// What the gradient's kernels are told about the weights.
struct Weighing {
  const float* control;
  const float* separate;  // whether there are any
  const float* row_weight;
  const float* column_weight;
};

// dS from the exponentials that the forward pass kept, [rows, pitch]; nothing where there are separate weights, as the
// exponentials may then have been flushed: the product is formed again.
template <class T>
__global__ void gradient_of_kept(const BFloat16* kept, Weighing w, int64_t rows, int64_t columns, int64_t pitch,
                                 T* ds) {
  if (*w.separate != 0) return;
  constexpr int count = 8;
  const int64_t packs = pitch / count, all = rows * packs;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < all; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / packs, column = i % packs * count;
    const float a = w.row_weight[row];
    const Pack<BFloat16, count> e = *reinterpret_cast<const Pack<BFloat16, count>*>(kept + i * count);
    Pack<T, count> out;
#pragma unroll
    for (int c = 0; c < count; ++c) {
      const bool inside = column + c < columns;
      from_wide(inside ? to_wide(e.value[c]) * (a + w.column_weight[column + c]) : 0.f, out.value + c);
    }
    *reinterpret_cast<Pack<T, count>*>(ds + i * count) = out;
  }
}

// positive[i] = <x_i, y_{i + label_offset}>, a warp each; exact but for the sum's rounding to double.
template <class T>
__global__ void label_products(Products<T> p, int64_t label_offset, double* positive) {
  const int64_t row = blockIdx.x * int64_t(kWarps) + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* x = p.x + row * p.depth;
  const T* y = p.y + (row + label_offset) * p.depth;
  double sum = 0;
  for (int64_t d = lane; d < p.depth; d += kWarp)
    if constexpr (std::is_same_v<T, float>)
      sum += double(x[d]) * double(y[d]);
    else  // exact in float32
      sum += double(to_wide(x[d]) * to_wide(y[d]));
  sum = warp_sum(sum);
  if (lane == 0) positive[row] = sum;
}

// The labels' entries of dS [terms, rows, pitch], which come whole: p - 1 of a rounded p would cost 2 % at logit_scale
// 100.
template <class T>
__global__ void set_labels(const double* grad_label, int64_t label_offset, int64_t rows, int64_t pitch, int terms,
                           T* ds) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (row >= rows) return;
  double left = grad_label[row];
  for (int term = 0; term < terms; ++term) {
    T* to = ds + (term * rows + row) * pitch + row + label_offset;
    from_wide(float(left), to);
    left -= double(to_wide(*to));
  }
}

}  // namespace gapkern::contrastive::sm90

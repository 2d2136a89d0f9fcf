// The sums of a tile's exponentials over rows and over columns, all but the labels'. Only for kernels_*.cpp.
#pragma once
#include "contrastive/softmax_tile.h"

namespace gapkern::contrastive {
namespace {

// A known number of rows keeps their sums in registers.
template <Range kRange, class T, int kKnown>
GAPKERN_INLINE void sum_exponentials(const ForwardBlock<T>& b, const T* tile, int some, int64_t i0) {
  using V = typename Vec<T>::type;
  const int rows = kKnown ? kKnown : some;
  const AllButLabel<T> mask(b.cols, b.label + i0, rows);
  V row_sum[kRows] = {};
  for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
    V column = load(b.column_sum + j);
    if (mask.partial(j)) {
      for (int r = 0; r < rows; ++r) {
        const V e = exponential<kRange>(load(tile + r * kStripe + j), b.exponents);
        const V counted = mask.lanes(j, r) ? e : V{};
        row_sum[r] += counted;
        column += counted;
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const V e = exponential<kRange>(load(tile + r * kStripe + j), b.exponents);
        row_sum[r] += e;
        column += e;
      }
    }
    store(b.column_sum + j, column);
  }
  for (int r = 0; r < rows; ++r) b.row_sum[i0 + r] = sum<T>(row_sum[r]);
}

template <class T>
GAPKERN_INLINE void sum_exponentials_tracked(const ForwardBlock<T>& b, T* tile, int rows, int64_t i0) {
  using V = typename Vec<T>::type;
  const V lowest = splat<T>(T(-__builtin_inf()));
  const T sign = b.exponents.k < 0 ? T(-1) : T(1), k = b.exponents.k * sign;
  V row_sum[kRows] = {};
  V row_reference[kRows];
  for (int r = 0; r < rows; ++r) {
    V best = lowest;
    const AllButLabel<T> mask(b.cols, b.label + i0 + r, 1);
    for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
      V t = load(tile + r * kStripe + j) * sign;
      if (mask.partial(j)) t = mask.lanes(j, 0) ? t : lowest;
      store(tile + r * kStripe + j, t);
      best = best < t ? t : best;
    }
    b.row_largest[i0 + r] = largest<T>(best);
    row_reference[r] = finite_reference(splat<T>(b.row_largest[i0 + r]), lowest);
  }
  for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
    const V before = load(b.column_largest + j);
    V best = before;
    for (int r = 0; r < rows; ++r) {
      const V t = load(tile + r * kStripe + j);
      best = best < t ? t : best;
    }
    const V reference = finite_reference(best, lowest);
    V column = load(b.column_sum + j) * exp2((before - reference) * k);
    for (int r = 0; r < rows; ++r) {
      const V t = load(tile + r * kStripe + j);
      column += exp2((t - reference) * k);
      row_sum[r] += exp2((t - row_reference[r]) * k);
    }
    store(b.column_largest + j, best);
    store(b.column_sum + j, column);
  }
  for (int r = 0; r < rows; ++r) b.row_sum[i0 + r] = sum<T>(row_sum[r]);
}

template <Range kRange, class T>
GAPKERN_INLINE void sum_exponentials(const ForwardBlock<T>& b, const T* tile, int rows, int64_t i0) {
  if (rows == kRows)
    sum_exponentials<kRange, T, kRows>(b, tile, rows, i0);
  else
    sum_exponentials<kRange, T, 0>(b, tile, rows, i0);
}

template <class T>
GAPKERN_INLINE void clear_columns(const ForwardBlock<T>& b) {
  for (int64_t j = 0; j < kStripe; ++j) {
    b.column_sum[j] = T(0);
    if (b.exponents.range == Range::tracked) b.column_largest[j] = T(-__builtin_inf());
  }
}

// What a block takes from a tile of t, which is overwritten: labels, kept logits, sums.
template <class E>
GAPKERN_INLINE void sum_tile(const ForwardBlock<typename E::T>& b, typename E::T* tile, int rows, int64_t i0) {
  for (int r = 0; r < rows; ++r) {
    const int64_t label = b.label + i0 + r;
    if (label >= 0 && label < b.cols) b.label_t[i0 + r] = tile[r * kStripe + label];
  }
  keep<E>(b.kept, b.cols, tile, rows, i0);
  if (b.exponents.range == Range::tracked)
    sum_exponentials_tracked(b, tile, rows, i0);
  else if (b.exponents.range == Range::shifted)
    sum_exponentials<Range::shifted>(b, tile, rows, i0);
  else
    sum_exponentials<Range::normal>(b, tile, rows, i0);
}

// Orders the streaming stores before other threads' reads.
GAPKERN_INLINE void order_streams() {
#if GAPKERN_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace gapkern::contrastive

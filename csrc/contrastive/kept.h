// The logits that stay between the forward and the backward pass, and where each block of them lies.
#pragma once
#include <vector>

#include "contrastive/problem.h"

namespace gapkern::contrastive {

inline constexpr int64_t kOwnExtra = 512;  // at least kStripe and half a block

// With bfloat16 products logits are kept as 16-bit multiples of a unit, where that is finer than the rounding of their
// exponentials to bfloat16; 0: as they are. Rounded factors may exceed the bound that norms give by a little.
template <class T>
T unit_of_kept(const Problem<T>& p) {
  const bool coded = p.bf16_products() && p.range.bound() <= kShiftedExponent && p.largest_t > 0;
  return coded ? T(1.02 * p.largest_t / 32767) : T(0);
}

// Of the first `rows` rows. Blocks are written and read in one piece each, whole or not at all. T is const in the
// backward pass.
template <class T>
class KeptLogits {
 public:
  KeptLogits() = default;
  KeptLogits(const Problem<std::remove_const_t<T>>& p, T* memory, int64_t rows)
      : memory_(memory), rows_(rows), columns_(p.m), unit_(unit_of_kept(p)) {}

  // Of a side with itself: all rows of the blocks on and above the diagonal.
  static KeptLogits of_own(const Problem<std::remove_const_t<T>>& p, T* memory) {
    KeptLogits kept(p, memory, memory == nullptr ? 0 : p.n);
    const Blocking& cut = p.blocking;
    kept.block_ = cut.block;
    int64_t at = 0;
    for (int64_t row = 0; row < p.n; row += cut.block) {
      const int64_t column0 = row / cut.stripe * cut.stripe, rows = std::min(cut.block, p.n - row);
      kept.starts_.push_back(at - rows * column0);
      at += rows * (p.m - column0);
    }
    return kept;
  }
  // Columns of the memory, [n, columns], that `of_own` needs at most: stripes begin up to kStripe before the diagonal.
  static int64_t own_columns(int64_t n) { return std::min(n, n / 2 + kOwnExtra); }

  // Whether all blocks of rows below `end` are kept.
  bool reaches(int64_t end) const { return end <= rows_; }

  // The block of b.rows rows at `row` and b.cols columns at `column`; null pointers where it is not kept.
  KeptBlock<T> block(const LogitBlock<std::remove_const_t<T>>& b, int64_t row, int64_t column) const {
    if (!reaches(row + b.rows)) return {};
    const int64_t at = (starts_.empty() ? row * columns_ : starts_[row / block_]) + b.rows * column;
    if (unit_ == 0) return {.t = memory_ + at};
    return {.codes = reinterpret_cast<SameConst<T, int16_t>*>(memory_) + at, .unit = unit_};
  }

 private:
  T* memory_ = nullptr;
  int64_t rows_ = 0, columns_ = 0;
  int64_t block_ = 0;
  std::vector<int64_t> starts_;  // where column 0 of each block would be; empty: all columns are kept
  std::remove_const_t<T> unit_ = 0;
};

}  // namespace gapkern::contrastive

// The logits that stay between the forward and the backward pass, and where each block of them lies.
#pragma once
#include "contrastive/problem.h"

namespace gapkern::contrastive {

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

  // Whether all blocks of rows below `end` are kept.
  bool reaches(int64_t end) const { return end <= rows_; }

  // The block of b.rows rows at `row` and b.cols columns at `column`; null pointers where it is not kept.
  KeptBlock<T> block(const LogitBlock<std::remove_const_t<T>>& b, int64_t row, int64_t column) const {
    if (!reaches(row + b.rows)) return {};
    const int64_t at = row * columns_ + b.rows * column;
    if (unit_ == 0) return {.t = memory_ + at};
    return {.codes = reinterpret_cast<SameConst<T, int16_t>*>(memory_) + at, .unit = unit_};
  }

 private:
  T* memory_ = nullptr;
  int64_t rows_ = 0, columns_ = 0;
  std::remove_const_t<T> unit_ = 0;
};

}  // namespace gapkern::contrastive

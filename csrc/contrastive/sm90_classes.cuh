// What decides a pair's class in the epilogues (contrastive/sm90_masked_gemm.h): read for a thread's two rows, and for
// its two columns of a block of eight, whose records lie side by side.
#pragma once
#include "contrastive/epilogue_classes.cuh"
#include "contrastive/sm90_cutlass.cuh"
#include "contrastive/sm90_masked_gemm.h"

namespace gapkern::contrastive::sm90 {

struct Mark {
  uint32_t id;
  float value;  // the limit of <x, y>; of the sigmoid loss the weight
};
struct MarkPair {
  Mark of[2];
};

// With the weights of the gradient.
struct WeightedMark {
  Mark mark;
  float negative, positive;
};

CUTLASS_DEVICE Mark row_mark(const float* rows, const Place& at, int h) {
  const int row = at.row + 8 * h;
  const float2 found =
      row < at.rows ? __ldg(reinterpret_cast<const float2*>(rows) + row) : float2{from_bits(kNoRow), 0};
  return {to_bits(found.x), found.y};
}
CUTLASS_DEVICE WeightedMark weighted_mark(const float4& found) {
  return {{to_bits(found.x), found.y}, found.z, found.w};
}
CUTLASS_DEVICE WeightedMark weighted_row(const float* rows, const Place& at, int h) {
  const int row = at.row + 8 * h;
  return weighted_mark(row < at.rows ? __ldg(reinterpret_cast<const float4*>(rows) + row) : float4{0, 0, 0, 0});
}

// From a thread's first column on.
struct ColumnMarks {
  const float4* first;
  CUTLASS_DEVICE ColumnMarks(const float* columns, const Place& at)
      : first(reinterpret_cast<const float4*>(columns + 2 * int64_t(at.column))) {}
  CUTLASS_DEVICE MarkPair of(int n) const {
    const float4 found = __ldg(first + 4 * n);
    return {{{to_bits(found.x), found.y}, {to_bits(found.z), found.w}}};
  }
};
struct WeightedColumnMarks {
  const float4* first;
  CUTLASS_DEVICE WeightedColumnMarks(const float* columns, const Place& at)
      : first(reinterpret_cast<const float4*>(columns) + at.column) {}
  CUTLASS_DEVICE WeightedMark of(int n, int c) const { return weighted_mark(__ldg(first + 8 * n + c)); }
};

CUTLASS_DEVICE bool equal(const Mark& row, const Mark& column) { return row.id == column.id; }
CUTLASS_DEVICE bool above(float acc, const Mark& row, const Mark& column) {
  return acc > row.value | acc > column.value;
}

}  // namespace gapkern::contrastive::sm90

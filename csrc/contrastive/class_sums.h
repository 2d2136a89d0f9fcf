// Sums of t over pairs of equal ids, t = <x, y> or -||x - y||^2 as in contrastive.h: the means of t over positives.
//
// contrastive_class_sums(x [N, D], y [M, D], row_ids [N], col_ids [M], ...) -> row_sums [N], col_sums [M] float64:
//   row_sums[i] = sum_j t_ij,  col_sums[j] = sum_i t_ij  over row_ids[i] == col_ids[j],
//   where `labelled` all but the labels, j = i + label_offset.
// contrastive_class_sums_backward -> the gradients that `needs` asks for (x, y), in the inputs' dtypes; an empty tensor
//   for the others.
//
// No pair is formed but the labels': a class's sum of y serves all its x, for distances with the rows' spread about
// their mean. Sums in float64, in an order that does not depend on the number of threads.
// Work: O((N + M) D). Traffic: two reads of both sides, and one write of each gradient. Memory: O(N + M + D) a thread.
#pragma once
#include <cstdint>

#include "common/each_isa.h"
#include "common/half.h"

namespace gapkern::contrastive {

// One side's rows of a class, in a run of columns.
template <class T>
struct ClassSide {
  const T* values;         // [., stride]
  const int64_t* members;  // [count] rows
  int64_t count;
};

// A class as one of its sides sees it.
template <class T>
struct ClassBlock {
  ClassSide<T> own, other;
  const int64_t* label;  // of own's rows: the other side's row, -1 where it is of another class
  int64_t depth, stride;
  bool distances;
};

template <class T>
struct ClassSums {
  // out[i] of own's rows i: the sum of t over the run of columns. scratch [depth].
  void (*sums)(const ClassBlock<T>&, double* scratch, double* out);
  // The gradient of own's rows, of those by own's sums and by the other side's. scratch [2 depth].
  void (*gradient)(const ClassBlock<T>&, const double* by_own, const double* by_other, double* scratch, T* out);
};

struct ClassSumsKernels {
  ClassSums<float> f32;
  ClassSums<double> f64;
  ClassSums<BFloat16> bf16;
  ClassSums<Half> f16;
};

GAPKERN_DECLARE_FOR_EACH_ISA(const ClassSumsKernels& class_sums_kernels())

}  // namespace gapkern::contrastive

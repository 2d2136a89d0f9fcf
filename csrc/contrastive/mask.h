// Which logits count in the sums of a kernel. Only for kernels_*.cpp.
#pragma once
#include "common/vec.h"

namespace gapkern::contrastive {
namespace {

// All ones in the lanes of columns [j, j + size) that are below cols.
template <class T>
GAPKERN_INLINE auto lanes_below(int64_t j, int64_t cols) {
  T index[Vec<T>::size];
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = T(i);
  return load(index) < splat<T>(T(cols - j));
}

template <class T>
GAPKERN_INLINE auto lane_at(int64_t lane) {
  T index[Vec<T>::size];
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = T(i);
  return load(index) == splat<T>(T(lane));
}

// For `rows` rows, the first of which has its label at column `label` and each next one a column further: all of the
// `cols` columns but the row's label, whose term is added separately.
template <class T>
class AllButLabel {
 public:
  AllButLabel(int64_t cols, int64_t label, int rows)
      : cols_(cols), label_(label), first_(label - Vec<T>::size), last_(label + rows), end_(cols - Vec<T>::size) {}
  // Whether some lane of the vector at column j does not count for some of the rows.
  bool partial(int64_t j) const { return j > end_ || (j > first_ && j < last_); }
  // All ones in the lanes of the vector at column j that count for row r.
  auto lanes(int64_t j, int r) const {
    const int64_t label = label_ + r;
    const bool here = label >= j && label < j + Vec<T>::size;
    return lanes_below<T>(j, cols_) & ~lane_at<T>(here ? label - j : -1);
  }

 private:
  int64_t cols_, label_, first_, last_, end_;
};

}  // namespace
}  // namespace gapkern::contrastive

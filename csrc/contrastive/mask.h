// Which logits count in the sums of a kernel. Only for kernels_*.cpp.
#pragma once
#include "common/vec.h"
#include "contrastive/kernels.h"

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

// The same of a block of pairs (i, j) of one side's rows, label being the diagonal: those with j > i.
template <class T>
class AboveDiagonal {
 public:
  AboveDiagonal(int64_t cols, int64_t label, int rows)
      : cols_(cols), label_(label), last_(label + rows), end_(cols - Vec<T>::size) {}
  bool partial(int64_t j) const { return j > end_ || j < last_; }
  auto lanes(int64_t j, int r) const { return lanes_below<T>(j, cols_) & ~lanes_below<T>(j, label_ + r + 1); }

 private:
  int64_t cols_, label_, last_, end_;
};

// What the pairs of a panel of rows are, by ids and limits. kPositive: pairs of equal ids are positives, otherwise left
// out. kOwn: rows and columns are the same, and either leaves a pair out for itself alone. kGuided: there is a guide.
template <bool kPositive, bool kOwn, bool kGuided>
struct Kind {
  static constexpr bool positive = kPositive, own = kOwn, guided = kGuided;
};

template <class K, class T>
class PanelClasses {
 public:
  using V = typename Vec<T>::type;
  using Lanes = decltype(V{} < V{});

  // From row i0 of the block on; `guide` is its tile.
  PanelClasses(const PairClasses<T>& pairs, int64_t i0, const T* guide) : pairs_(pairs), i0_(i0), guide_(guide) {}

  struct Columns {
    V ids, limit, guide_limit;
  };
  [[gnu::always_inline]] Columns columns(int64_t j) const {
    Columns c{load(pairs_.column_ids + j), load(pairs_.column_limit + j), V{}};
    if constexpr (K::guided) c.guide_limit = load(pairs_.guide_column_limit + j);
    return c;
  }

  // Negatives for the row, and for the column; positives, where K has them.
  struct Pairs {
    Lanes of_row, of_column, positive;
  };
  [[gnu::always_inline]] Pairs of(const Columns& c, int64_t j, int r, V t) const {
    const int64_t i = i0_ + r;
    const Lanes equal = c.ids == splat<T>(pairs_.row_ids[i]);
    const V limit = splat<T>(pairs_.row_limit[i]);
    if constexpr (K::own) return {~(equal | (t > limit)), ~(equal | (t > c.limit)), equal};
    Lanes other = equal | (t > at_most(limit, c.limit));
    if constexpr (K::guided)
      other |= load(guide_ + r * kStripe + j) > at_most(splat<T>(pairs_.guide_row_limit[i]), c.guide_limit);
    return {~other, ~other, equal};
  }

 private:
  const PairClasses<T>& pairs_;
  const int64_t i0_;
  const T* const guide_;
};

}  // namespace
}  // namespace gapkern::contrastive

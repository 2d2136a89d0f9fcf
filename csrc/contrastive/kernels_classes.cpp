// The softmax kernels over classes of pairs (mask.h): sums over negatives and over positives, and dS by the weights of
// a pair's class. Apart from kernels_softmax.cpp, whose pairs are all negatives but the label; compiled once per
// instruction set.
#include "contrastive/gradient_tile.h"
#include "contrastive/mask.h"
#include "contrastive/softmax_tile.h"

namespace gapkern::contrastive {
namespace {

template <class K, class T>
using CountedOf = std::conditional_t<K::own, AboveDiagonal<T>, AllButLabel<T>>;

// The first column that a panel of rows at i0 needs, a multiple of nr.
template <class K, class E>
GAPKERN_INLINE int64_t first_column(const LogitBlock<typename E::T>& b, int64_t i0) {
  if (!K::own) return 0;
  const int64_t first = b.label + i0 + 1;
  return first <= 0 ? 0 : first / kWidth<E> * kWidth<E>;
}

template <class K, Range kRange, class T, int kKnown>
GAPKERN_INLINE void sum_classes(const ClassesForwardBlock<T>& b, const PanelClasses<K, T>& panel, const T* tile,
                                int some, int64_t i0, int64_t j0) {
  using V = typename Vec<T>::type;
  using Lanes = typename PanelClasses<K, T>::Lanes;
  const int rows = kKnown ? kKnown : some;
  const CountedOf<K, T> mask(b.cols, b.label + i0, rows);
  V row_sum[kRows] = {}, row_positive[kRows] = {};
  for (int64_t j = j0; j < b.cols; j += Vec<T>::size) {
    const auto columns = panel.columns(j);
    V column = load(b.column_sum[kNegative] + j), positive{};
    if constexpr (K::positive) positive = load(b.column_sum[kPositive] + j);
    const auto add = [&](int r, Lanes counted) __attribute__((always_inline)) {
      const V t = load(tile + r * kStripe + j), e = exponential<kRange>(t, b.exponents);
      const auto pairs = panel.of(columns, j, r, t);
      row_sum[r] += counted & pairs.of_row ? e : V{};
      column += counted & pairs.of_column ? e : V{};
      if constexpr (K::positive) {
        const V counts = counted & pairs.positive ? e : V{};
        row_positive[r] += counts;
        positive += counts;
      }
    };
    if (mask.partial(j)) {
      for (int r = 0; r < rows; ++r) add(r, mask.lanes(j, r));
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) add(r, Lanes{} == Lanes{});
    }
    store(b.column_sum[kNegative] + j, column);
    if constexpr (K::positive) store(b.column_sum[kPositive] + j, positive);
  }
  for (int r = 0; r < rows; ++r) {
    b.row_sum[kNegative][i0 + r] = sum<T>(row_sum[r]);
    if constexpr (K::positive) b.row_sum[kPositive][i0 + r] = sum<T>(row_positive[r]);
  }
}

// One class about the largest logits of its rows and columns.
template <class K, PairClass kClass, class T>
void sum_class_tracked(const ClassesForwardBlock<T>& b, const PanelClasses<K, T>& panel, const T* tile, int rows,
                       int64_t i0, int64_t j0) {
  using V = typename Vec<T>::type;
  const V lowest = splat<T>(T(-__builtin_inf()));
  const T sign = b.exponents.k < 0 ? T(-1) : T(1), k = b.exponents.k * sign;
  const CountedOf<K, T> mask(b.cols, b.label + i0, rows);
  // sign t where it counts for the row, or the column; else the lowest.
  const auto counting = [&](int r, int64_t j, bool of_row) {
    const V t = load(tile + r * kStripe + j);
    const auto pairs = panel.of(panel.columns(j), j, r, t);
    const auto of_class = kClass == kPositive ? pairs.positive : of_row ? pairs.of_row : pairs.of_column;
    return mask.lanes(j, r) & of_class ? t * sign : lowest;
  };
  const auto larger = [](V best, V t) { return best < t ? t : best; };
  for (int r = 0; r < rows; ++r) {
    V best = lowest, total{};
    for (int64_t j = j0; j < b.cols; j += Vec<T>::size) best = larger(best, counting(r, j, true));
    b.row_largest[kClass][i0 + r] = largest<T>(best);
    const V reference = finite_reference(splat<T>(b.row_largest[kClass][i0 + r]), lowest);
    for (int64_t j = j0; j < b.cols; j += Vec<T>::size) total += exp2((counting(r, j, true) - reference) * k);
    b.row_sum[kClass][i0 + r] = sum<T>(total);
  }
  for (int64_t j = j0; j < b.cols; j += Vec<T>::size) {
    const V before = load(b.column_largest[kClass] + j);
    V best = before;
    for (int r = 0; r < rows; ++r) best = larger(best, counting(r, j, false));
    const V reference = finite_reference(best, lowest);
    V column = load(b.column_sum[kClass] + j) * exp2((before - reference) * k);
    for (int r = 0; r < rows; ++r) column += exp2((counting(r, j, false) - reference) * k);
    store(b.column_largest[kClass] + j, best);
    store(b.column_sum[kClass] + j, column);
  }
}

template <class K, Range kRange, class T>
GAPKERN_INLINE void sum_classes(const ClassesForwardBlock<T>& b, const PanelClasses<K, T>& panel, const T* tile,
                                int rows, int64_t i0, int64_t j0) {
  if (rows == kRows)
    sum_classes<K, kRange, T, kRows>(b, panel, tile, rows, i0, j0);
  else
    sum_classes<K, kRange, T, 0>(b, panel, tile, rows, i0, j0);
}

// The guide's tile, in T: bfloat16 products would decide otherwise near a limit.
template <class K, class T>
GAPKERN_INLINE void guide_tile(const PairClasses<T>& classes, int64_t cols, int64_t i0, T* tile) {
  if constexpr (K::guided) {
    LogitBlock<T> block{};
    block.images = classes.guide_images;
    block.texts = classes.guide_texts;
    block.cols = cols;
    block.depth = classes.guide_depth;
    logit_tile<Plain<T>>(block, i0, tile);
  }
}

template <class K, class T>
using GuideTile = T[K::guided ? kRows * kStripe : 1];

template <class K, class E>
void forward(const ClassesForwardBlock<typename E::T>& b) {
  using T = typename E::T;
  alignas(64) T tile[kRows * kStripe];
  alignas(64) GuideTile<K, T> guide;
  const Range range = b.exponents.range;
  for (int c = 0; c < (K::positive ? kClasses : 1); ++c)
    for (int64_t j = 0; j < kStripe; ++j) {
      b.column_sum[c][j] = T(0);
      if (range == Range::tracked) b.column_largest[c][j] = T(-__builtin_inf());
    }
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    const int64_t j0 = first_column<K, E>(b, i0);
    logit_tile<E>(b, i0, tile, j0);
    guide_tile<K>(b.classes, b.cols, i0, guide);
    for (int r = 0; !K::own && r < rows; ++r) {
      const int64_t label = b.label + i0 + r;
      if (label >= 0 && label < b.cols) b.label_t[i0 + r] = tile[r * kStripe + label];
    }
    keep<E>(b.kept, b.cols, tile, rows, i0);
    const PanelClasses<K, T> panel(b.classes, i0, guide);
    if (range == Range::tracked) {
      sum_class_tracked<K, kNegative>(b, panel, tile, rows, i0, j0);
      if constexpr (K::positive) sum_class_tracked<K, kPositive>(b, panel, tile, rows, i0, j0);
    } else if (range == Range::shifted) {
      sum_classes<K, Range::shifted>(b, panel, tile, rows, i0, j0);
    } else {
      sum_classes<K, Range::normal>(b, panel, tile, rows, i0, j0);
    }
  }
#if GAPKERN_VECTOR_BYTES == 64
  _mm_sfence();  // orders the streaming stores before other threads' reads
#endif
}

template <class V>
struct ClassWeightsOf {
  V weight, reference, log2;
};

template <class K, Range kRange, class T>
GAPKERN_INLINE GradientSums class_gradient(const ClassesGradientBlock<T>& b, const PanelClasses<K, T>& panel,
                                           const T* logits, int64_t stride, T* tile, int rows, int64_t i0, int64_t j0) {
  using V = typename Vec<T>::type;
  using Lanes = typename PanelClasses<K, T>::Lanes;
  constexpr bool kTracked = kRange == Range::tracked;
  constexpr int classes = K::positive ? kClasses : 1;
  const T k = b.exponents.k;
  GradientSums sums;
  for (int r = 0; r < rows; ++r) {
    const T* t = logits + r * stride;
    T* const out = tile + r * kStripe;
    const int64_t label = b.label + i0 + r;
    ClassWeightsOf<V> of_row[kClasses];
    for (int c = 0; c < classes; ++c) {
      of_row[c].weight = splat<T>(b.rows_of[c].weight[i0 + r]);
      if (!kTracked) continue;
      of_row[c].reference = splat<T>(b.rows_of[c].reference[i0 + r]);
      of_row[c].log2 = splat<T>(b.rows_of[c].log2[i0 + r]);
    }
    const CountedOf<K, T> mask(b.cols, label, 1);
    V dot{}, row{};
    for (int64_t j = j0; j < b.cols; j += Vec<T>::size) {
      const bool edge = j + Vec<T>::size > b.cols;
      const V value = edge ? load_first(t + j, b.cols - j) : load(t + j);
      const auto pairs = panel.of(panel.columns(j), j, r, value);
      // A side's part of dS, or without the exponential its weight.
      const auto part = [&](const ClassWeightsOf<V>& w) __attribute__((always_inline)) {
        return kTracked ? w.weight * exp2((value - w.reference) * k - w.log2) : w.weight;
      };
      const auto of_column = [&](int c) __attribute__((always_inline)) {
        ClassWeightsOf<V> w{load(b.columns_of[c].weight + j), V{}, V{}};
        if (kTracked) {
          w.reference = load(b.columns_of[c].reference + j);
          w.log2 = load(b.columns_of[c].log2 + j);
        }
        return w;
      };
      V d = (pairs.of_row ? part(of_row[kNegative]) : V{}) + (pairs.of_column ? part(of_column(kNegative)) : V{});
      if constexpr (K::positive) d = pairs.positive ? part(of_row[kPositive]) + part(of_column(kPositive)) : d;
      if (!kTracked) d *= exponential<kTracked ? Range::normal : kRange>(value, b.exponents);
      V product = d * value;
      if (mask.partial(j)) {
        const Lanes counted = mask.lanes(j, 0);
        d = counted ? d : V{};
        product = counted ? product : V{};
      }
      dot += product;
      row += d;
      if (b.column_sum != nullptr) store(b.column_sum + j, load(b.column_sum + j) + d);
      store(out + j, d);
    }
    for (int64_t j = 0; j < j0 && j < b.cols; j += Vec<T>::size) store(out + j, V{});
    sums.end_row(b, i0 + r, !K::own && label < b.cols ? label : -1, out, dot, row);
  }
  return sums;
}

template <class K, class E>
void gradient(const ClassesGradientBlock<typename E::T>& b) {
  using T = typename E::T;
  alignas(64) T tile[kRows * kStripe];
  alignas(64) GuideTile<K, T> guide;
  const Range range = b.exponents.range;
  if (b.column_sum != nullptr)
    for (int64_t j = 0; j < kStripe; ++j) b.column_sum[j] = T(0);
  GradientSums all;
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    const int64_t j0 = first_column<K, E>(b, i0);
    if (b.kept.t == nullptr && b.kept.codes == nullptr) logit_tile<E>(b, i0, tile, j0);
    guide_tile<K>(b.classes, b.cols, i0, guide);
    decode<E>(b.kept, b.cols, tile, rows, i0);
    const T* const t = b.kept.t == nullptr ? tile : b.kept.t + i0 * b.cols;
    const int64_t stride = b.kept.t == nullptr ? kStripe : b.cols;
    const PanelClasses<K, T> panel(b.classes, i0, guide);
    const GradientSums sums =
        range == Range::tracked   ? class_gradient<K, Range::tracked>(b, panel, t, stride, tile, rows, i0, j0)
        : range == Range::shifted ? class_gradient<K, Range::shifted>(b, panel, t, stride, tile, rows, i0, j0)
                                  : class_gradient<K, Range::normal>(b, panel, t, stride, tile, rows, i0, j0);
    all.of_scale += sums.of_scale;
    all.of_all += sums.of_all;
    if (b.out.by_rows != nullptr) store_gradient(E{}, b.out, tile, rows, b.cols, i0);
  }
  *b.out.scale_sum = all.of_scale;
  *b.sum = all.of_all;
}

// In the order of ClassesKind::index.
constexpr auto set = kernel_set<ClassesKernels>([](auto arithmetic) {
  using E = decltype(arithmetic);
  using LeftOut = Kind<false, false, false>;
  using Positive = Kind<true, false, false>;
  using OwnLeftOut = Kind<false, true, false>;
  using OwnPositive = Kind<true, true, false>;
  using GuidedLeftOut = Kind<false, false, true>;
  using GuidedPositive = Kind<true, false, true>;
  return ClassesKernels<typename E::T>{
      {&forward<LeftOut, E>, &forward<Positive, E>, &forward<OwnLeftOut, E>, &forward<OwnPositive, E>,
       &forward<GuidedLeftOut, E>, &forward<GuidedPositive, E>},
      {&gradient<LeftOut, E>, &gradient<Positive, E>, &gradient<OwnLeftOut, E>, &gradient<OwnPositive, E>,
       &gradient<GuidedLeftOut, E>, &gradient<GuidedPositive, E>}};
});

}  // namespace

namespace GAPKERN_ISA {
const KernelSet<ClassesKernels>& classes_kernels() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

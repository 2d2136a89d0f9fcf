// Prefixes' softmax statistics and logit gradients, compiled once per instruction set. The products of a prefix grow in
// a tile of the first-level cache from segment to segment; its logits are that tile times the factors.
#include "contrastive/gradient_tile.h"
#include "contrastive/prefixes.h"
#include "contrastive/softmax_sums.h"

namespace gapkern::contrastive {
namespace {

// The segment's products of one row panel with the stripe, alone or added to those of the segments before.
template <class E, Result kResult>
void segment_tile(const LogitBlock<typename E::T>& b, int64_t i0, typename E::T* products) {
  constexpr int nr = kWidth<E>;
  const int64_t words = (b.depth + E::group - 1) / E::group;
  const auto* rows = static_cast<const typename E::Word*>(b.images) + i0 * words;
  const auto* columns = static_cast<const typename E::Word*>(b.texts);
  for (int64_t j = 0; j < b.cols; j += nr, columns += nr * words)
    tile_product<E, 1, kRows, kResult>(rows, columns, words, products + j, kStripe, kRows, nr);
}

// t of prefix `k`, whose products go on from those of prefix k - 1.
template <class E, template <class> class Block>
GAPKERN_INLINE void prefix_tile(const Block<typename E::T>& b, int k, int rows, int64_t i0, typename E::T* products,
                                typename E::T* t) {
  using T = typename E::T;
  using V = typename Vec<T>::type;
  if (k == 0)
    segment_tile<E, Result::assign>(b, i0, products);
  else
    segment_tile<E, Result::add>(b, i0, products);
  for (int r = 0; r < rows; ++r) {
    const V factor = splat<T>(b.row_factor[i0 + r]);
    for (int64_t j = 0; j < b.cols; j += Vec<T>::size)
      store(t + r * kStripe + j, load(products + r * kStripe + j) * factor * load(b.column_factor + j));
  }
}

template <class E>
void prefixes_forward(const PrefixForwardBlock<typename E::T>* prefixes, int count) {
  using T = typename E::T;
  alignas(64) T products[kRows * kStripe];
  alignas(64) T tile[kRows * kStripe];
  for (int k = 0; k < count; ++k) clear_columns(prefixes[k]);
  const int64_t all = prefixes->rows;
  for (int64_t i0 = 0; i0 < all; i0 += kRows) {
    const int rows = all - i0 < kRows ? int(all - i0) : kRows;
    for (int k = 0; k < count; ++k) {
      prefix_tile<E>(prefixes[k], k, rows, i0, products, tile);
      sum_tile<E>(prefixes[k], tile, rows, i0);
    }
  }
  order_streams();
}

// Adds a prefix's dS, times the factors of its logits, to `tile`.
template <Range kRange, class T>
GAPKERN_INLINE GradientSums add_gradient(const PrefixGradientBlock<T>& b, const T* logits, int64_t stride, T* tile,
                                         int rows, int64_t i0) {
  using V = typename Vec<T>::type;
  GradientSums sums;
  for (int r = 0; r < rows; ++r) {
    T* const out = tile + r * kStripe;
    const int64_t label = b.label + i0 + r;
    const V factor = splat<T>(b.row_factor[i0 + r]);
    const GradientRow<kRange, T> of_prefix(b, i0 + r);
    V dot{}, row{};
    for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
      const auto [d, product] = of_prefix.at(logits + r * stride, j);
      dot += product;
      row += d;
      store(b.column_sum + j, load(b.column_sum + j) + product);
      store(out + j, load(out + j) + d * factor * load(b.column_factor + j));
    }
    T of_row = sum<T>(dot);
    sums.of_all += sum<T>(row);
    if (label >= 0 && label < b.cols) {
      const T d = b.label_gradient[i0 + r], product = d * b.label_t[i0 + r];
      out[label] += d * b.row_factor[i0 + r] * b.column_factor[label];
      b.column_sum[label] += product;
      of_row += product;
      sums.of_all += d;
    }
    b.row_sum[i0 + r] = of_row;
    sums.of_scale += of_row;
  }
  return sums;
}

template <class E>
void prefixes_gradient(const PrefixGradientBlock<typename E::T>* prefixes, int count, typename E::T* tiles) {
  using T = typename E::T;
  constexpr int64_t kTile = int64_t(kRows) * kStripe;
  alignas(64) T work[kTile];  // products, then gradients by them
  const int64_t all = prefixes->rows;
  for (int k = 0; k < count; ++k) {
    for (int64_t j = 0; j < kStripe; ++j) prefixes[k].column_sum[j] = T(0);
    *prefixes[k].out.scale_sum = *prefixes[k].sum = 0;
  }
  for (int64_t i0 = 0; i0 < all; i0 += kRows) {
    const int rows = all - i0 < kRows ? int(all - i0) : kRows;
    for (int k = 0; k < count; ++k) {
      const PrefixGradientBlock<T>& b = prefixes[k];
      if (b.kept.t == nullptr && b.kept.codes == nullptr) prefix_tile<E>(b, k, rows, i0, work, tiles + k * kTile);
      decode<E>(b.kept, b.cols, tiles + k * kTile, rows, i0);
    }
    std::memset(work, 0, sizeof work);
    for (int k = count - 1; k >= 0; --k) {
      const PrefixGradientBlock<T>& b = prefixes[k];
      const T* const t = b.kept.t == nullptr ? tiles + k * kTile : b.kept.t + i0 * b.cols;
      const int64_t stride = b.kept.t == nullptr ? kStripe : b.cols;
      const Range range = b.exponents.range;
      const GradientSums sums = range == Range::tracked   ? add_gradient<Range::tracked>(b, t, stride, work, rows, i0)
                                : range == Range::shifted ? add_gradient<Range::shifted>(b, t, stride, work, rows, i0)
                                                          : add_gradient<Range::normal>(b, t, stride, work, rows, i0);
      *b.out.scale_sum += sums.of_scale;
      *b.sum += sums.of_all;
      if (b.out.by_rows != nullptr) store_gradient(E{}, b.out, work, rows, b.cols, i0);
    }
  }
}

constexpr auto set = kernel_set<PrefixKernels>([](auto arithmetic) {
  using E = decltype(arithmetic);
  return PrefixKernels<typename E::T>{&prefixes_forward<E>, &prefixes_gradient<E>};
});

}  // namespace

namespace GAPKERN_ISA {
const KernelSet<PrefixKernels>& prefix_kernels() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

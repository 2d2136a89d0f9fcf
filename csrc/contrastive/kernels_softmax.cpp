// The softmax statistics and the logit gradient behind the register-tile product; compiled once per instruction set. A
// tile of mr x stripe logits lives in the first-level cache and is never written out whole.
#include "contrastive/gradient_tile.h"
#include "contrastive/softmax_sums.h"

namespace gapkern::contrastive {
namespace {

template <class E>
void forward(const ForwardBlock<typename E::T>& b) {
  using T = typename E::T;
  alignas(64) T tile[kRows * kStripe];
  clear_columns(b);
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    logit_tile<E>(b, i0, tile);
    sum_tile<E>(b, tile, rows, i0);
  }
  order_streams();
}

// Turns t, which lies in rows of `stride`, into a tile of dS.
template <Range kRange, class T>
GAPKERN_INLINE GradientSums logit_gradient(const GradientBlock<T>& b, const T* logits, int64_t stride, T* tile,
                                           int rows, int64_t i0) {
  using V = typename Vec<T>::type;
  GradientSums sums;
  for (int r = 0; r < rows; ++r) {
    T* const out = tile + r * kStripe;
    const int64_t label = b.label + i0 + r;
    const GradientRow<kRange, T> of_row(b, i0 + r);
    V dot{}, row{};
    for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
      const auto [d, product] = of_row.at(logits + r * stride, j);
      dot += product;
      row += d;
      if (b.column_sum != nullptr) store(b.column_sum + j, load(b.column_sum + j) + d);
      store(out + j, d);
    }
    sums.end_row(b, i0 + r, label < b.cols ? label : -1, out, dot, row);
  }
  return sums;
}

template <class E>
void gradient(const GradientBlock<typename E::T>& b) {
  using T = typename E::T;
  alignas(64) T tile[kRows * kStripe];
  const Range range = b.exponents.range;
  if (b.column_sum != nullptr)
    for (int64_t j = 0; j < kStripe; ++j) b.column_sum[j] = T(0);
  GradientSums all;
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    if (b.kept.t == nullptr && b.kept.codes == nullptr) logit_tile<E>(b, i0, tile);
    decode<E>(b.kept, b.cols, tile, rows, i0);
    const T* const t = b.kept.t == nullptr ? tile : b.kept.t + i0 * b.cols;
    const int64_t stride = b.kept.t == nullptr ? kStripe : b.cols;
    const GradientSums sums = range == Range::tracked   ? logit_gradient<Range::tracked>(b, t, stride, tile, rows, i0)
                              : range == Range::shifted ? logit_gradient<Range::shifted>(b, t, stride, tile, rows, i0)
                                                        : logit_gradient<Range::normal>(b, t, stride, tile, rows, i0);
    all.of_scale += sums.of_scale;
    all.of_all += sums.of_all;
    if (b.out.by_rows != nullptr) store_gradient(E{}, b.out, tile, rows, b.cols, i0);
  }
  *b.out.scale_sum = all.of_scale;
  *b.sum = all.of_all;
}

constexpr auto set = kernel_set<SoftmaxKernels>([](auto arithmetic) {
  using E = decltype(arithmetic);
  return SoftmaxKernels<typename E::T>{&forward<E>, &gradient<E>};
});

}  // namespace

namespace GAPKERN_ISA {
const KernelSet<SoftmaxKernels>& softmax_kernels() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

// The sigmoid loss with positives by ids, and its gradient, behind the register-tile product; compiled once per
// instruction set, apart from kernels_sigmoid.cpp, whose calls are inlined.
#include "contrastive/gradient_tile.h"
#include "contrastive/mask.h"
#include "contrastive/sigmoid_tile.h"

namespace gapkern::contrastive {
namespace {

// The losses and dS of a vector of pairs by their logits l; those that are `positive` have the weights or targets a.
template <class T>
struct PairTerms {
  typename Vec<T>::type loss, gradient;
};

template <bool kSoft, class T, class V, class Lanes>
GAPKERN_INLINE PairTerms<T> pair_terms(V l, Lanes positive, V a) {
  const V zero{}, one = splat<T>(T(1));
  if constexpr (kSoft) {
    // With b = 1 - a, a softplus(-l) + b softplus(l): neither cancels where a target is almost 0 or 1.
    const V u = exp_of_negative<T>(l < zero ? l : -l), b = one - a;
    const V linear = positive ? l * (l < zero ? -a : b) : at_least(l, zero);
    const V of_positive = l < zero ? b * u - a : b - a * u;
    return {log1p<T>(u) + linear, (positive ? of_positive : l < zero ? u : one) / (u + one)};
  } else {
    const V k = positive ? -l : l, u = exp_of_negative<T>(k < zero ? k : -k);
    const V weight = positive ? a : one;
    const V d = (k < zero ? u : one) / (u + one) * weight;
    return {(at_least(k, zero) + log1p<T>(u)) * weight, positive ? -d : d};
  }
}

template <class E, bool kSoft>
void masked_sigmoid(const MaskedSigmoidBlock<typename E::T>& b) {
  using T = typename E::T;
  using V = typename Vec<T>::type;
  using Lanes = decltype(V{} < V{});
  alignas(64) T tile[kRows * kStripe];
  double loss = 0, bias_sum = 0, scale_sum = 0;
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    logit_tile<E>(b, i0, tile);
    for (int r = 0; r < rows; ++r) {
      T* t = tile + r * kStripe;
      const Lanes id = b.row_ids[i0 + r] - Lanes{};
      const V weight = splat<T>(b.row_weight[i0 + r]);
      V row_loss{}, row{}, dot{};
      const auto add = [&](int64_t j, const auto& counted) {
        const V value = load(t + j);
        Lanes column_id;
        std::memcpy(&column_id, b.column_ids + j, sizeof column_id);
        const PairTerms<T> pair =
            pair_terms<kSoft, T>(value * b.scale + b.bias, column_id == id, weight + load(b.column_weight + j));
        row_loss += counted(pair.loss);
        row += counted(pair.gradient);
        dot += counted(pair.gradient * value);
        store(t + j, counted(pair.gradient));
      };
      int64_t j = 0;
      for (; j + Vec<T>::size <= b.cols; j += Vec<T>::size) add(j, [](V v) { return v; });
      if (j < b.cols) add(j, [lanes = lanes_below<T>(j, b.cols)](V v) { return lanes ? v : V{}; });
      loss += sum<T>(row_loss);
      bias_sum += sum<T>(row);
      scale_sum += sum<T>(dot);
    }
    if (b.out.by_rows != nullptr) store_gradient(E{}, b.out, tile, rows, b.cols, i0);
  }
  *b.loss_sum = loss;
  *b.bias_sum = bias_sum;
  *b.out.scale_sum = scale_sum;
}

constexpr auto set = kernel_set<MaskedSigmoidKernels>([](auto arithmetic) {
  using E = decltype(arithmetic);
  return MaskedSigmoidKernels<typename E::T>{{&masked_sigmoid<E, false>, &masked_sigmoid<E, true>}};
});

}  // namespace

namespace GAPKERN_ISA {
const KernelSet<MaskedSigmoidKernels>& masked_sigmoid_kernels() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

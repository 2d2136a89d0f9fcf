// The sigmoid loss and its gradient behind the register-tile product; compiled once per instruction set.
#include "contrastive/gradient_tile.h"
#include "contrastive/mask.h"
#include "contrastive/sigmoid_tile.h"

namespace gapkern::contrastive {
namespace {

template <class E>
void sigmoid(const SigmoidBlock<typename E::T>& b) {
  using T = typename E::T;
  using V = typename Vec<T>::type;
  alignas(64) T tile[kRows * kStripe];
  double loss = 0, bias_sum = 0, scale_sum = 0;
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    logit_tile<E>(b, i0, tile);
    for (int r = 0; r < rows; ++r) {
      T* t = tile + r * kStripe;
      const int64_t label = b.label + i0 + r;
      const bool labelled = label >= 0 && label < b.cols;
      const T label_t = labelled ? t[label] : T(0);
      const AllButLabel<T> mask(b.cols, label, 1);
      V row_loss{}, row{}, dot{};
      for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
        const V value = load(t + j), l = value * b.scale + b.bias;
        const V u = exp_of_negative<T>(l < V{} ? l : -l);
        V softplus = at_least(l, V{}) + log1p<T>(u);
        V d = (l < V{} ? u : splat<T>(T(1))) / (u + T(1));
        V product = d * value;
        if (mask.partial(j)) {
          const auto counted = mask.lanes(j, 0);
          softplus = counted ? softplus : V{};
          d = counted ? d : V{};
          product = counted ? product : V{};
        }
        row_loss += softplus;
        row += d;
        dot += product;
        store(t + j, d);
      }
      loss += sum<T>(row_loss);
      bias_sum += sum<T>(row);
      scale_sum += sum<T>(dot);
      if (labelled) {
        const T l = label_t * b.scale + b.bias;
        const V u = exp_of_negative<T>(splat<T>(l < 0 ? l : -l));
        const V minus = (l < 0 ? splat<T>(T(1)) : u) / (u + T(1));  // sigmoid(-l)
        t[label] = -minus[0];
        loss += double(l < 0 ? -l : T(0)) + log1p<T>(u)[0];
        bias_sum -= minus[0];
        scale_sum -= double(minus[0]) * label_t;
      }
    }
    if (b.out.by_rows != nullptr) store_gradient(E{}, b.out, tile, rows, b.cols, i0);
  }
  *b.loss_sum = loss;
  *b.bias_sum = bias_sum;
  *b.out.scale_sum = scale_sum;
}

constexpr auto set = kernel_set<SigmoidKernels>([](auto arithmetic) {
  using E = decltype(arithmetic);
  return SigmoidKernels<typename E::T>{&sigmoid<E>};
});

}  // namespace

namespace GAPKERN_ISA {
const KernelSet<SigmoidKernels>& sigmoid_kernels() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

// The sigmoid loss on Hopper: one product whose epilogue has the losses, dS, and the sums of dS and of dS <x, y>.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

struct Loss {
  static CUTLASS_DEVICE float of(float acc, float scale, float bias, float label, float column) {
    return sigmoid_loss(acc, scale, bias, label, column);
  }
};
struct LossGradient {
  static CUTLASS_DEVICE float of(float acc, float scale, float bias, float label, float column) {
    return sigmoid_gradient(acc, scale, bias, label, column);
  }
};
struct Multiply {
  static CUTLASS_DEVICE float of(float a, float b) { return a * b; }
};

template <int... children>
using From = cute::seq<children...>;
template <class T>
struct Sigmoid {
  using Input = T;
  using Out = T;
  using Visitor = fusion::Sm90TopologicalVisitor<
      float,
      cute::tuple<From<>, From<>, From<>, From<>, From<>,  // 0: <x, y>, scale, bias, labels, columns
                  From<0, 1, 2, 3, 4>, From<5>,            // 5: the losses, their sums
                  From<0, 1, 2, 3, 4>, From<7>,            // 7: dS, its sums
                  From<7, 0>, From<9>,                     // 9: dS <x, y>, its sums
                  From<8>>,                                // 11: dS, rounded
      fusion::Sm90AccFetch, Scalar, Scalar, PerRow, PerColumn, Elementwise<Loss>::To<float>, RowSums,
      Elementwise<LossGradient>::To<float>, RowSums, Elementwise<Multiply>::To<float>, RowSums, Rounded<T>>;
};

cudaError_t launch_sigmoid(const Problem& p, const float* scale, const float* bias, const float* labels,
                           const float* numbers, const SigmoidSums& sums, void* ds, int64_t pitch,
                           cudaStream_t stream) {
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<Sigmoid<T>>::run(p,
                                 {{},
                                  scalar(scale),
                                  scalar(bias),
                                  per_row(labels),
                                  per_column(numbers),
                                  {},
                                  row_sums(sums.loss_part),
                                  {},
                                  row_sums(sums.grad_part),
                                  {},
                                  row_sums(sums.scale_part),
                                  {}},
                                 static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

// Backward on Hopper: the product again, and dS rounded once as it leaves the epilogue.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

struct Gradient {
  static CUTLASS_DEVICE float of(float acc, float k, float shift, float apart, float a, float b) {
    return logit_gradient(acc, k, shift, apart != 0, a, b);
  }
};
template <class T>
struct Gradients {
  using Input = T;
  using Out = T;
  using Visitor =
      fusion::Sm90EVT<Elementwise<Gradient>::To<T>, fusion::Sm90AccFetch, Scalar, Scalar, Scalar, PerRow, PerColumn>;
};

cudaError_t launch_gradient(const Problem& p, const float* control, const float* apart, const float* row_weight,
                            const float* column_weight, void* ds, int64_t pitch, cudaStream_t stream) {
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<Gradients<T>>::run(
        p,
        {{}, scalar(control), scalar(control + 1), scalar(apart), per_row(row_weight), per_column(column_weight), {}},
        static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

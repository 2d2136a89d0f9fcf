// The sigmoid loss on Hopper: one product whose epilogue has the losses, dS, and the sums of dS and of dS <x, y>.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

template <class T>
struct Sigmoid {
  using Input = T;
  using Out = T;
  using Arguments = SigmoidArguments;
  static constexpr bool kConditional = false;

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& to, const Place& at, Accumulators& values, const Scratch&,
                                 const Storing& store) {
    const float scale = nonzero(__ldg(to.scale)), bias = __ldg(to.bias);
    if (at.at_an_edge()) exclude(values, outside_of(at), excluded(scale));
    float losses[2] = {}, gradients[2] = {}, products[2] = {};
    int label[2];  // where it is among the columns from the thread's first on; -1 of none
    CUTLASS_PRAGMA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int column = at.row + 8 * h + to.label;
      label[h] = at.row + 8 * h < at.rows && column < at.columns ? column - at.column : -1;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int number = 0; number < kStores; ++number) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4 * kStoreBlocks; ++i) {
        const int n = number * kStoreBlocks + i / 4, h = i / 2 % 2, c = i % 2;
        float& value = element(values, n, h, c);
        const SigmoidTerms terms = sigmoid_terms(value, scale, bias, label[h] == 8 * n + c);
        losses[h] += terms.loss;
        gradients[h] += terms.gradient;
        products[h] = fmaf(terms.gradient, value, products[h]);
        value = terms.gradient;
      }
      store(number);
    }
    write_row_sums(losses, at, to.loss_part);
    write_row_sums(gradients, at, to.gradient_part);
    write_row_sums(products, at, to.scale_part);
  }
};

cudaError_t launch_sigmoid(const Problem& p, const SigmoidArguments& arguments, void* ds, int64_t pitch,
                           cudaStream_t stream) {
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<Sigmoid<T>>::run(p, arguments, static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

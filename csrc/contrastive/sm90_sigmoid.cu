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
    const float none = from_bits(0x7fc00000u);  // equal to no label
    const bool edge = at.at_an_edge();
    if (edge) exclude_outside(values, at, excluded(scale));
    float label[2], losses[2] = {}, gradients[2] = {}, products[2] = {};
    load_rows(to.labels, at, none, label);
    constexpr int blocks = 2;  // at a time: more and registers spill
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kBlocks; first += blocks) {
      float column[2 * blocks];
      load_columns(to.numbers, at, first, edge, none, column);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4 * blocks; ++i) {
        const int h = i / 2 % 2, c = i % 2;
        float& value = element(values, first + i / 4, h, c);
        const SigmoidTerms terms = sigmoid_terms(value, scale, bias, label[h] == column[i / 4 * 2 + c]);
        losses[h] += terms.loss;
        gradients[h] += terms.gradient;
        products[h] = fmaf(terms.gradient, value, products[h]);
        value = terms.gradient;
      }
      if ((first + blocks) % kStoreBlocks == 0) store(first / kStoreBlocks);
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

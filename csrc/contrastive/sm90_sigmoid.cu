// The sigmoid loss on Hopper: one product whose epilogue has the losses, dS, and the sums of dS and of dS <x, y>.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

template <class T, int term_count>
struct Sigmoid {
  using Input = T;
  using Out = T;
  using Arguments = SigmoidArguments;
  static constexpr int kTerms = term_count;
  static constexpr bool kConditional = false;

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& to, const Place& at, Accumulators& values, const Scratch&,
                                 const Storing& store) {
    const float scale = nonzero(__ldg(to.scale)), bias = __ldg(to.bias);
    float losses[2] = {}, gradients[2] = {}, products[2] = {};
    // Labels are taken out before the others' terms are formed, and their dS is put in behind: only their warps pay.
    const Some outside = outside_of(at), labels = labels_of(at, to.label, outside);
    const bool labelled = __any_sync(kLanes, labels.any());
    float of_label[2] = {};
    if (labelled) {
      CUTLASS_PRAGMA_UNROLL
      for (int h = 0; h < 2; ++h) {
        float product = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2 * kBlocks; ++i)
          if (labels.has(i / 2, h, i % 2)) product = element(values, i / 2, h, i % 2);
        const SigmoidTerms terms = sigmoid_of_label(product, scale, bias);
        if (labels.bits(h, 0) | labels.bits(h, 1)) {
          losses[h] = terms.loss;
          gradients[h] = of_label[h] = terms.gradient;
          products[h] = terms.gradient * product;
        }
      }
    }
    const Some left_out = outside | labels;
    if (__any_sync(kLanes, left_out.any())) exclude(values, left_out, excluded(scale));
    const int place = at.row + to.label - at.column;  // of the first row's label; the second's is 8 further
    CUTLASS_PRAGMA_UNROLL
    for (int number = 0; number < kStores; ++number) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4 * kStoreBlocks; ++i) {
        const int n = number * kStoreBlocks + i / 4, h = i / 2 % 2, c = i % 2;
        float& value = element(values, n, h, c);
        const SigmoidTerms terms = sigmoid_of_other(value, scale, bias);
        losses[h] += terms.loss;
        gradients[h] += terms.gradient;
        products[h] = fmaf(terms.gradient, value, products[h]);
        value = terms.gradient;
      }
      if (labelled) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4 * kStoreBlocks; ++i) {
          const int n = number * kStoreBlocks + i / 4, h = i / 2 % 2, c = i % 2;
          if (place == 8 * (n - h) + c) element(values, n, h, c) = of_label[h];
        }
      }
      store(number);
    }
    write_row_sums(losses, at, to.loss_part);
    write_row_sums(gradients, at, to.gradient_part);
    write_row_sums(products, at, to.scale_part);
  }
};

cudaError_t launch_sigmoid(const Problem& p, const SigmoidArguments& arguments, void* ds, int64_t pitch, int terms,
                           cudaStream_t stream) {
  if (terms == kTerms && p.element == Element::bfloat16)
    return Gemm<Sigmoid<cutlass::bfloat16_t, kTerms>>::run(p, arguments, static_cast<cutlass::bfloat16_t*>(ds), pitch,
                                                           stream);
  if (terms != 1) return cudaErrorNotSupported;
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<Sigmoid<T, 1>>::run(p, arguments, static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

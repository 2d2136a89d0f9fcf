// The sigmoid loss with positives by ids on Hopper: as sm90_sigmoid.cu, with a weight, or a target, for every positive
// pair.
#include "contrastive/sm90_classes.cuh"

namespace gapkern::contrastive::sm90 {

template <class T>
struct MaskedSigmoid {
  using Input = T;
  using Out = T;
  using Arguments = MaskedSigmoidArguments;
  static constexpr int kTerms = 1;
  static constexpr bool kConditional = false;

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& to, const Place& at, Accumulators& values, const Scratch&,
                                 const Storing& store) {
    const float scale = nonzero(__ldg(to.scale)), bias = __ldg(to.bias);
    float losses[2] = {}, gradients[2] = {}, products[2] = {};
    // Negatives all of them, whose terms are zero.
    const Some outside = outside_of(at);
    if (__any_sync(kLanes, outside.any())) exclude(values, outside, excluded(scale));
    const Mark rows[2] = {row_mark(to.rows, at, 0), row_mark(to.rows, at, 1)};
    const ColumnMarks columns(to.columns, at);
    CUTLASS_PRAGMA_UNROLL
    for (int number = 0; number < kStores; ++number) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kStoreBlocks; ++i) {
        const int n = number * kStoreBlocks + i;
        const MarkPair pair = columns.of(n);
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int h = j / 2, c = j % 2;
          const Mark& row = rows[h];
          const Mark& column = pair.of[c];
          float& value = element(values, n, h, c);
          const SigmoidTerms terms =
              sigmoid_of_pair(value, scale, bias, equal(row, column), row.value + column.value, to.soft);
          losses[h] += terms.loss;
          gradients[h] += terms.gradient;
          products[h] = fmaf(terms.gradient, value, products[h]);
          value = terms.gradient;
        }
      }
      store(number);
    }
    write_row_sums(losses, at, to.loss_part);
    write_row_sums(gradients, at, to.gradient_part);
    write_row_sums(products, at, to.scale_part);
  }
};

cudaError_t launch_masked_sigmoid(const Problem& p, const MaskedSigmoidArguments& arguments, void* ds, int64_t pitch,
                                  cudaStream_t stream) {
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<MaskedSigmoid<T>>::run(p, arguments, static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

// Backward on Hopper: the product again, and dS rounded once as it leaves the epilogue, or in terms.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

template <class T, int term_count>
struct Gradients {
  using Input = T;
  using Out = T;
  using Arguments = GradientArguments;
  static constexpr int kTerms = term_count;
  static constexpr bool kConditional = true;

  // Whether any of a warp's rows or columns has a separate weight. Brings the columns' weights into L1.
  static CUTLASS_DEVICE bool any_separate(const float (&row)[2], const float* columns, const Place& at) {
    uint32_t bits = to_bits(row[0]) | to_bits(row[1]);
    const int first = at.tile_column * kTileN + at.lane;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileN; i += 32) bits |= to_bits(__ldg(columns + first + i));
    return __any_sync(kLanes, bits & 1);
  }

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& from, const Place& at, Accumulators& values, const Scratch&,
                                 const Storing& store) {
    const float k = __ldg(from.control), shift = __ldg(from.control + 1);
    float a[2];
    CUTLASS_PRAGMA_UNROLL
    for (int h = 0; h < 2; ++h) a[h] = at.row + 8 * h < at.rows ? __ldg(from.row_weight + at.row + 8 * h) : 0.f;
    const float* weights = from.column_weight + at.column;
    const bool separate = any_separate(a, from.column_weight, at);
    const float separate_a[2] = {separated(a[0], shift), separated(a[1], shift)};
    CUTLASS_PRAGMA_UNROLL
    for (int number = 0; number < kStores; ++number) {
      float b[2 * kStoreBlocks];
      CUTLASS_PRAGMA_UNROLL
      for (int n = 0; n < kStoreBlocks; ++n) {
        const float2 pair = __ldg(reinterpret_cast<const float2*>(weights + 8 * (number * kStoreBlocks + n)));
        b[2 * n] = pair.x;
        b[2 * n + 1] = pair.y;
      }
      const auto for_each = [&](const auto& gradient) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4 * kStoreBlocks; ++i) {
          const int n = number * kStoreBlocks + i / 4, h = i / 2 % 2, c = i % 2;
          float& value = element(values, n, h, c);
          value = gradient(value, h, i / 4 * 2 + c);
        }
      };
      if (separate) {
        CUTLASS_PRAGMA_UNROLL
        for (float& weight : b) weight = separated(weight, shift);
        for_each([&](float x, int h, int j) { return gradient_of_separate(x, k, separate_a[h], b[j]); });
      } else {
        for_each([&](float x, int h, int j) { return gradient_of_common(x, k, shift, a[h], b[j]); });
      }
      store(number);
    }
  }
};

cudaError_t launch_gradient(const Problem& p, const GradientArguments& arguments, void* ds, int64_t pitch, int terms,
                            cudaStream_t stream) {
  if (terms == kTerms && p.element == Element::bfloat16)
    return Gemm<Gradients<cutlass::bfloat16_t, kTerms>>::run(p, arguments, static_cast<cutlass::bfloat16_t*>(ds), pitch,
                                                             stream);
  if (terms != 1) return cudaErrorNotSupported;
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<Gradients<T, 1>>::run(p, arguments, static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

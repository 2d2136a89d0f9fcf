// Backward over classes of pairs on Hopper: the product again, and dS by the weights of a pair's class.
#include "contrastive/sm90_classes.cuh"

namespace gapkern::contrastive::sm90 {

template <class T>
struct MaskedGradients {
  using Input = T;
  using Out = T;
  using Arguments = MaskedGradientArguments;
  static constexpr int kTerms = 1;
  static constexpr bool kConditional = false;

  // Whether any of a warp's rows or columns has a separate weight. Brings the columns' records into L1.
  static CUTLASS_DEVICE bool any_separate(const WeightedMark (&rows)[2], const float* columns, const Place& at) {
    uint32_t bits = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int h = 0; h < 2; ++h) bits |= to_bits(rows[h].negative) | to_bits(rows[h].positive);
    const auto* first = reinterpret_cast<const float4*>(columns) + at.tile_column * kTileN + at.lane;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileN; i += 32) {
      const WeightedMark column = weighted_mark(__ldg(first + i));
      bits |= to_bits(column.negative) | to_bits(column.positive);
    }
    return __any_sync(kLanes, bits & 1);
  }
  static CUTLASS_DEVICE WeightedMark separate(const WeightedMark& of, float shift) {
    return {of.mark, separated(of.negative, shift), separated(of.positive, shift)};
  }

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& from, const Place& at, Accumulators& values, const Scratch&,
                                 const Storing& store) {
    const float k = __ldg(from.control), shift = __ldg(from.control + 1);
    WeightedMark rows[2] = {weighted_row(from.rows, at, 0), weighted_row(from.rows, at, 1)};
    const WeightedColumnMarks columns(from.columns, at);
    const bool any = any_separate(rows, from.columns, at);
    if (any) {
      rows[0] = separate(rows[0], shift);
      rows[1] = separate(rows[1], shift);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int number = 0; number < kStores; ++number) {
      const auto for_each = [&](const auto& gradient) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2 * kStoreBlocks; ++i) {
          const int n = number * kStoreBlocks + i / 2, c = i % 2;
          const WeightedMark column = columns.of(n, c);
          CUTLASS_PRAGMA_UNROLL
          for (int h = 0; h < 2; ++h) {
            float& value = element(values, n, h, c);
            value = gradient(value, rows[h], column);
          }
        }
      };
      if (any) {
        for_each([&](float x, const WeightedMark& row, const WeightedMark& column) {
          const WeightedMark other = separate(column, shift);
          const bool is_equal = equal(row.mark, column.mark), is_left_out = !is_equal & above(x, row.mark, column.mark);
          const float a = is_equal ? row.positive : row.negative, b = is_equal ? other.positive : other.negative;
          const float found = gradient_of_separate(x, k, a, b);
          return is_left_out ? 0.f : found;
        });
      } else {
        for_each([&](float x, const WeightedMark& row, const WeightedMark& column) {
          const bool is_equal = equal(row.mark, column.mark);
          const float negative = above(x, row.mark, column.mark) ? 0.f : row.negative + column.negative;
          return exponential(x, k, shift) * (is_equal ? row.positive + column.positive : negative);
        });
      }
      store(number);
    }
  }
};

cudaError_t launch_masked_gradient(const Problem& p, const MaskedGradientArguments& arguments, void* ds, int64_t pitch,
                                   cudaStream_t stream) {
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<MaskedGradients<T>>::run(p, arguments, static_cast<T*>(ds), pitch, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

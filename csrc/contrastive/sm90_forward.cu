// Forward on Hopper: e = 2^(k <x_i, y_j> - c) formed once in the epilogue, and its sums over the rows and the columns
// of every tile, all but the labels: next to a label's exponential those of a small loss would be lost. No atomics: the
// tiles' sums are added later in their order.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

template <class T, class Stored>
struct Sums {
  using Input = T;
  using Out = Stored;
  using Arguments = SumsArguments;
  static constexpr int kTerms = 1;
  static constexpr bool kConditional = false;

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& to, const Place& at, Accumulators& values, const Scratch& scratch,
                                 const Storing& store) {
    const float k = nonzero(__ldg(to.control)), shift = __ldg(to.control + 1);
    const Some outside = outside_of(at), left_out = outside | labels_of(at, to.label, outside);
    if (__any_sync(kLanes, left_out.any())) exclude(values, left_out, excluded(k));
    float of_rows[2] = {}, of_columns[2 * kBlocks];
    CUTLASS_PRAGMA_UNROLL
    for (int number = 0; number < kStores; ++number) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 2 * kStoreBlocks * number; i < 2 * kStoreBlocks * (number + 1); ++i) {
        const int n = i / 2, c = i % 2;
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
          float& e = element(values, n, h, c);
          e = exponential(e, k, shift);
          of_rows[h] += e;
        }
        of_columns[i] = element(values, n, 0, c) + element(values, n, 1, c);
      }
      store(number);
    }
    write_row_sums(of_rows, at, to.row_part);
    // The lane that issued the stores waits until the scratch, their source, is read.
    if constexpr (!std::is_void_v<Out>) {
      Store<Out>::drain();
      __syncwarp();
    }
    write_column_sums(of_columns, at, scratch, to.column_part);
  }
};

cudaError_t launch_sums(const Problem& p, const SumsArguments& arguments, void* kept, int64_t pitch,
                        cudaStream_t stream) {
  if (!kept)
    return by_element(p, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return Gemm<Sums<T, void>>::run(p, arguments, nullptr, 0, stream);
    });
  if (p.element != Element::bfloat16) return cudaErrorNotSupported;
  using T = cutlass::bfloat16_t;
  return Gemm<Sums<T, T>>::run(p, arguments, static_cast<T*>(kept), pitch, stream);
}

}  // namespace gapkern::contrastive::sm90

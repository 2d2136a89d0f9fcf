// Forward over classes of pairs on Hopper: sums of e over the negatives and over the positives of the rows and columns
// of every tile, all but the labels. A pair's class costs two comparisons and a selection; nothing branches.
#include "contrastive/sm90_classes.cuh"

namespace gapkern::contrastive::sm90 {

// One predicated addition, where a selection before it would cost two more issue slots.
CUTLASS_DEVICE void add_where(float& sum, float term, bool counts) {
  if (counts) sum += term;
}

template <class T>
struct MaskedSums {
  using Input = T;
  using Out = void;
  using Arguments = MaskedSumsArguments;
  static constexpr int kTerms = 1;
  static constexpr bool kConditional = true;

  template <class Accumulators, class Storing>
  static CUTLASS_DEVICE void run(const Arguments& to, const Place& at, Accumulators& values, const Scratch& scratch,
                                 const Storing&) {
    const float k = nonzero(__ldg(to.control)), shift = __ldg(to.control + 1);
    const Some outside = outside_of(at), left_out = outside | labels_of(at, to.label, outside);
    if (__any_sync(kLanes, left_out.any())) exclude(values, left_out, excluded(k));
    const Mark rows[2] = {row_mark(to.rows, at, 0), row_mark(to.rows, at, 1)};
    const ColumnMarks columns(to.columns, at);
    float of_rows[2] = {}, of_positive_rows[2] = {}, of_columns[2 * kBlocks], of_positive_columns[2 * kBlocks];
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < kBlocks; ++n) {
      const MarkPair pair = columns.of(n);
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        float& of_column = of_columns[2 * n + c];
        float& of_positive_column = of_positive_columns[2 * n + c];
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float acc = element(values, n, h, c), e = exponential(acc, k, shift);
          const bool is_equal = equal(rows[h], pair.of[c]), is_other = is_equal | above(acc, rows[h], pair.of[c]);
          add_where(of_rows[h], e, !is_other);
          add_where(of_positive_rows[h], e, is_equal);
          if (h == 0) {
            of_column = is_other ? 0.f : e;
            of_positive_column = is_equal ? e : 0.f;
          } else {
            add_where(of_column, e, !is_other);
            add_where(of_positive_column, e, is_equal);
          }
        }
      }
    }
    write_row_sums(of_rows, at, to.negative.row_part);
    write_column_sums(of_columns, at, scratch, to.negative.column_part);
    if (__any_sync(kLanes, to.positive.row_part != nullptr)) {
      write_row_sums(of_positive_rows, at, to.positive.row_part);
      write_column_sums(of_positive_columns, at, scratch, to.positive.column_part);
    }
  }
};

cudaError_t launch_masked_sums(const Problem& p, const MaskedSumsArguments& arguments, cudaStream_t stream) {
  return by_element(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Gemm<MaskedSums<T>>::run(p, arguments, nullptr, 0, stream);
  });
}

}  // namespace gapkern::contrastive::sm90

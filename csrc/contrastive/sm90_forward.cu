// Forward on Hopper: 2^(k <x_i, y_j> - c) formed once in the epilogue, and its sums over the rows and the columns of
// every tile. No atomics: the tiles' sums are added later in their order.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

struct Exponential {
  static CUTLASS_DEVICE float of(float acc, float k, float shift) { return exponential(acc, k, shift); }
};
using Exponentials = fusion::Sm90EVT<Elementwise<Exponential>::To<float>, fusion::Sm90AccFetch, Scalar, Scalar>;
// Where nothing is stored the epilogue takes its element type from the tree's root.
struct ColumnSumsRoot : ColumnSums {
  using ElementAux = cutlass::bfloat16_t;
  using ColumnSums::ColumnSums;
};
using OverRows = fusion::Sm90EVT<RowSums, Exponentials>;

template <class T>
struct Sums {
  using Input = T;
  using Out = void;
  using Visitor = fusion::Sm90EVT<ColumnSumsRoot, OverRows>;
};
struct KeptSums {
  using Input = cutlass::bfloat16_t;
  using Out = Input;
  using Visitor = fusion::Sm90EVT<Rounded<Out>, fusion::Sm90EVT<ColumnSums, OverRows>>;
};

cudaError_t launch_sums(const Problem& p, const float* control, float* row_part, float* column_part, void* kept,
                        int64_t pitch, cudaStream_t stream) {
  const OverRows::Arguments rows{{{}, scalar(control), scalar(control + 1), {}}, row_sums(row_part)};
  if (!kept)
    return by_element(p, [&](auto* type) {
      using Design = Sums<std::remove_pointer_t<decltype(type)>>;
      return Gemm<Design>::run(p, {rows, column_sums(column_part)}, nullptr, 0, stream);
    });
  if (p.element != Element::bfloat16) return cudaErrorNotSupported;
  return Gemm<KeptSums>::run(p, {{rows, column_sums(column_part)}, {}}, static_cast<KeptSums::Out*>(kept), pitch,
                             stream);
}

}  // namespace gapkern::contrastive::sm90

// Forward on Hopper: 2^(k <x_i, y_j> - c) formed once in the epilogue, and its sums over the rows and the columns of
// every tile. No atomics: the tiles' sums are added later in their order.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

template <class T>
struct Exponential;
template <int count>
struct Exponential<cutlass::Array<float, count>> {
  using Values = cutlass::Array<float, count>;
  CUTLASS_DEVICE Values operator()(const Values& acc, const Values& k, const Values& shift) const {
    Values e;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < count; ++i) e[i] = exponential(acc[i], k[0], shift[0]);
    return e;
  }
};

using Exponentials =
    fusion::Sm90EVT<fusion::Sm90Compute<Exponential, float, float, kRounding>, fusion::Sm90AccFetch, Scalar, Scalar>;
using RowSums = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRounding,
                                         cute::Stride<cute::_1, cute::_0, cute::_0>, 4, false, false, true>;
using ColumnSums =
    fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRounding,
                             cute::Stride<cute::_0, cute::_1, cute::_0>, 4, false, false, true>;
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
  using Visitor = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Out, float, kRounding>,
                                  fusion::Sm90EVT<ColumnSums, OverRows>>;
};

static OverRows::Arguments over_rows(const float* control, float* row_part) {
  return {{{}, {{0.f}, {control}}, {{0.f}, {control + 1}}, {}}, {row_part, 0.f, {}}};
}

cudaError_t launch_sums(const Problem& p, const float* control, float* row_part, float* column_part, void* kept,
                        int64_t pitch, cudaStream_t stream) {
  if (kept) {
    if (p.element != Element::bfloat16) return cudaErrorNotSupported;
    return Gemm<KeptSums>::run(p, {{over_rows(control, row_part), {column_part, 0.f, {}}}, {}},
                               static_cast<KeptSums::Out*>(kept), pitch, stream);
  }
  const Sums<cutlass::bfloat16_t>::Visitor::Arguments visitor{over_rows(control, row_part), {column_part, 0.f, {}}};
  if (p.element == Element::bfloat16) return Gemm<Sums<cutlass::bfloat16_t>>::run(p, visitor, nullptr, 0, stream);
  return Gemm<Sums<cutlass::half_t>>::run(p, visitor, nullptr, 0, stream);
}

}  // namespace gapkern::contrastive::sm90

// Backward on Hopper: the product again, and dS rounded once as it leaves the epilogue.
#include "contrastive/sm90_cutlass.cuh"

namespace gapkern::contrastive::sm90 {

template <class T>
struct Gradient;
template <int count>
struct Gradient<cutlass::Array<float, count>> {
  using Values = cutlass::Array<float, count>;
  CUTLASS_DEVICE Values operator()(const Values& acc, const Values& k, const Values& shift, const Values& apart,
                                   const Values& a, const Values& b) const {
    Values ds;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < count; ++i) ds[i] = logit_gradient(acc[i], k[0], shift[0], apart[0] != 0, a[i], b[i]);
    return ds;
  }
};

using RowWeight = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<cute::_1, cute::_0, cute::_0>>;
using ColumnWeight = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;
template <class T>
struct Gradients {
  using Input = T;
  using Out = T;
  using Visitor = fusion::Sm90EVT<fusion::Sm90Compute<Gradient, T, float, kRounding>, fusion::Sm90AccFetch, Scalar,
                                  Scalar, Scalar, RowWeight, ColumnWeight>;
};

template <class T>
static cudaError_t launch(const Problem& p, const float* control, const float* apart, const float* row_weight,
                          const float* column_weight, void* ds, int64_t pitch, cudaStream_t stream) {
  const typename Gradients<T>::Visitor::Arguments visitor{
      {}, {{0.f}, {control}}, {{0.f}, {control + 1}}, {{0.f}, {apart}}, {row_weight, 0.f, {}}, {column_weight, 0.f, {}},
      {}};
  return Gemm<Gradients<T>>::run(p, visitor, static_cast<T*>(ds), pitch, stream);
}

cudaError_t launch_gradient(const Problem& p, const float* control, const float* apart, const float* row_weight,
                            const float* column_weight, void* ds, int64_t pitch, cudaStream_t stream) {
  const auto f = p.element == Element::bfloat16 ? launch<cutlass::bfloat16_t> : launch<cutlass::half_t>;
  return f(p, control, apart, row_weight, column_weight, ds, pitch, stream);
}

}  // namespace gapkern::contrastive::sm90

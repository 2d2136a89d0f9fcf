// The contrastive losses' chunks on CUDA: what lies between the library's products.
#include "contrastive/chunk.h"
#include "contrastive/kernels.cuh"

namespace gapkern::contrastive {

void combine(const Tensor& part, int64_t classes, int64_t tiles, int64_t count, Tensor& out) {
  for (int64_t of = 0; of < classes; ++of) {
    lse_combine<<<blocks(count, 128, int64_t(1) << 31), 128, 0, stream_of(part)>>>(
        static_cast<const Partial*>(part.data_ptr()) + of * tiles * count, tiles, count,
        out.mutable_data_ptr<double>() + of * count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

namespace {

template <class R>
void launch_lse(const ChunkArguments& a, int64_t label_offset, Tensor& row_part, Tensor& col_part) {
  const auto kernel = a.packed ? lse_tiles<R, true> : lse_tiles<R, false>;
  kernel<<<a.grid(), kTileThreads, 0, stream_of(a.products)>>>(chunk_of<R>(a), a.scale.const_data_ptr<R>(),
                                                               label_offset, static_cast<Partial*>(row_part.data_ptr()),
                                                               static_cast<Partial*>(col_part.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> chunk_lse(const Tensor& products, const Tensor& row_norms, const Tensor& col_norms,
                                     const Tensor& logit_scale, int64_t label_offset) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const ChunkArguments a = check_chunk(products, row_norms, col_norms, logit_scale);
  Tensor row_part = partials(products, a.across, a.rows), col_part = partials(products, a.down, a.columns);
  if (products.scalar_type() == ScalarType::Double)
    launch_lse<double>(a, label_offset, row_part, col_part);
  else
    launch_lse<float>(a, label_offset, row_part, col_part);
  Tensor row = torch::stable::new_empty(products, {a.rows}, ScalarType::Double);
  Tensor col = torch::stable::new_empty(products, {a.columns}, ScalarType::Double);
  combine(row_part, 1, a.across, a.rows, row);
  combine(col_part, 1, a.down, a.columns, col);
  return {row, col};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_gradient(const Tensor& products, const Tensor& row_norms,
                                                          const Tensor& col_norms, const Tensor& logit_scale,
                                                          const Tensor& row_lse, const Tensor& col_lse,
                                                          const Tensor& grad_row, const Tensor& grad_col,
                                                          const Tensor& grad_label, int64_t label_offset,
                                                          const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const ChunkArguments a = check_chunk(products, row_norms, col_norms, logit_scale);
  ChunkGradient out = allocate(a, like);
  by_types(products, like, [&](auto* real, auto* result) {
    using R = std::remove_pointer_t<decltype(real)>;
    using O = std::remove_pointer_t<decltype(result)>;
    const ScalarType type = products.scalar_type();
    const Tensor of_rows = as_type(row_lse, ScalarType::Double), of_columns = as_type(col_lse, ScalarType::Double);
    const Tensor by_row = as_type(grad_row, type), by_column = as_type(grad_col, type);
    const Tensor at_label = as_type(grad_label, type);
    for (const Tensor& v : {of_rows, by_row, at_label})
      expect(products, v, a.rows, "row_lse2, grad_row and grad_label");
    for (const Tensor& v : {of_columns, by_column}) expect(products, v, a.columns, "col_lse2 and grad_col");
    const Weights<R> weights{of_rows.const_data_ptr<double>(), by_row.const_data_ptr<R>(),
                             at_label.const_data_ptr<R>(),     of_columns.const_data_ptr<double>(),
                             by_column.const_data_ptr<R>(),    label_offset};
    const auto kernel = a.packed ? lse_gradient<R, O, true> : lse_gradient<R, O, false>;
    kernel<<<a.grid(), kTileThreads, 0, stream_of(products)>>>(chunk_of<R>(a), a.scale.const_data_ptr<R>(), weights,
                                                               out.template sums<R>(),
                                                               static_cast<O*>(out.ds.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out.ds, out.of_scale, out.rows, out.columns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_sigmoid(const Tensor& products, const Tensor& logit_scale,
                                                         const Tensor& logit_bias, int64_t label_offset,
                                                         const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const Tensor none = torch::stable::new_empty(products, {0}, products.scalar_type());
  const ChunkArguments a = check_chunk(products, none, none, logit_scale);
  ChunkGradient out = allocate(a, like);
  Tensor loss = torch::stable::empty_like(out.of_scale), of_bias = torch::stable::empty_like(out.of_scale);
  expect(products, logit_bias, 1, "logit_bias");
  by_types(products, like, [&](auto* real, auto* result) {
    using R = std::remove_pointer_t<decltype(real)>;
    using O = std::remove_pointer_t<decltype(result)>;
    const Tensor bias = as_type(logit_bias, products.scalar_type());
    const auto kernel = a.packed ? sigmoid_tiles<R, O, true> : sigmoid_tiles<R, O, false>;
    kernel<<<a.grid(), kTileThreads, 0, stream_of(products)>>>(
        chunk_of<R>(a), a.scale.const_data_ptr<R>(), bias.const_data_ptr<R>(), label_offset, out.template sums<R>(),
        loss.mutable_data_ptr<double>(), of_bias.mutable_data_ptr<double>(), static_cast<O*>(out.ds.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, out.ds, out.of_scale, of_bias};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("contrastive_chunk_lse", TORCH_BOX(&gapkern::contrastive::chunk_lse));
  m.impl("contrastive_chunk_gradient", TORCH_BOX(&gapkern::contrastive::chunk_gradient));
  m.impl("contrastive_chunk_sigmoid", TORCH_BOX(&gapkern::contrastive::chunk_sigmoid));
}

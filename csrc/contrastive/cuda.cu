// The contrastive losses' chunks on CUDA: what lies between the library's products.
#include "common/cuda_host.h"
#include "contrastive/kernels.cuh"

namespace gapkern::contrastive {
namespace {

int64_t tiles(int64_t count, int64_t per_tile) { return (count + per_tile - 1) / per_tile; }

struct Arguments {
  Tensor products, row_norms, col_norms, scale;
  int64_t rows, columns, across, down;
  bool packed;
  dim3 grid() const { return dim3(unsigned(across), unsigned(down)); }
};

// All in the type of the arithmetic; norms are empty for the dot product.
Arguments check(const Tensor& products, const Tensor& row_norms, const Tensor& col_norms, const Tensor& scale) {
  STD_TORCH_CHECK(products.dim() == 2 && products.numel() > 0, "products: expected a filled matrix");
  const ScalarType type = products.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "products: expected float32 or float64");
  Arguments a{torch::stable::contiguous(products),
              as_type(row_norms, type),
              as_type(col_norms, type),
              as_type(scale, type),
              products.size(0),
              products.size(1),
              0,
              0,
              false};
  expect(products, a.scale, 1, "logit_scale");
  const bool norms = a.row_norms.numel() > 0;
  expect(products, a.row_norms, norms ? a.rows : 0, "row_norms");
  expect(products, a.col_norms, norms ? a.columns : 0, "col_norms");
  a.across = tiles(a.columns, kTileColumns);
  a.down = tiles(a.rows, kTileRows);
  STD_TORCH_CHECK(a.down <= 65535, "products: expected at most ", 65535 * kTileRows, " rows, got ", a.rows);
  a.packed = packs(a.products, a.columns);
  return a;
}

template <class R>
Chunk<R> chunk_of(const Arguments& a) {
  const bool norms = a.row_norms.numel() > 0;
  return {a.products.const_data_ptr<R>(), norms ? a.row_norms.const_data_ptr<R>() : nullptr,
          norms ? a.col_norms.const_data_ptr<R>() : nullptr, a.rows, a.columns};
}

Tensor partials(const Tensor& like, int64_t tiles, int64_t count) {
  return torch::stable::new_empty(like, {tiles, count, 2}, ScalarType::Double);
}

void combine(const Tensor& part, Tensor& out) {
  const int64_t count = part.size(1);
  lse_combine<<<blocks(count, 128, int64_t(1) << 31), 128, 0, stream_of(part)>>>(
      static_cast<const Partial*>(part.data_ptr()), part.size(0), count, out.mutable_data_ptr<double>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class R>
void launch_lse(const Arguments& a, int64_t label_offset, Tensor& row_part, Tensor& col_part) {
  const auto kernel = a.packed ? lse_tiles<R, true> : lse_tiles<R, false>;
  kernel<<<a.grid(), kTileThreads, 0, stream_of(a.products)>>>(chunk_of<R>(a), a.scale.const_data_ptr<R>(),
                                                               label_offset, static_cast<Partial*>(row_part.data_ptr()),
                                                               static_cast<Partial*>(col_part.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> chunk_lse(const Tensor& products, const Tensor& row_norms, const Tensor& col_norms,
                                     const Tensor& logit_scale, int64_t label_offset) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const Arguments a = check(products, row_norms, col_norms, logit_scale);
  Tensor row_part = partials(products, a.across, a.rows), col_part = partials(products, a.down, a.columns);
  if (products.scalar_type() == ScalarType::Double)
    launch_lse<double>(a, label_offset, row_part, col_part);
  else
    launch_lse<float>(a, label_offset, row_part, col_part);
  Tensor row = torch::stable::new_empty(products, {a.rows}, ScalarType::Double);
  Tensor col = torch::stable::new_empty(products, {a.columns}, ScalarType::Double);
  combine(row_part, row);
  combine(col_part, col);
  return {row, col};
}

// dS and the partial sums of its tiles, allocated.
struct Gradient {
  Tensor ds, of_scale, rows, columns;
  template <class R>
  TileSums<R> sums() {
    const bool wanted = rows.numel() > 0;
    return {of_scale.mutable_data_ptr<double>(), wanted ? rows.mutable_data_ptr<R>() : nullptr,
            wanted ? columns.mutable_data_ptr<R>() : nullptr};
  }
};

Gradient allocate(const Arguments& a, const Tensor& like) {
  const Tensor& p = a.products;
  const bool norms = a.row_norms.numel() > 0;
  return {torch::stable::new_empty(p, {a.rows, a.columns}, like.scalar_type()),
          torch::stable::new_empty(p, {a.across * a.down}, ScalarType::Double),
          torch::stable::new_empty(p, {norms ? a.across : 0, a.rows}, p.scalar_type()),
          torch::stable::new_empty(p, {norms ? a.down : 0, a.columns}, p.scalar_type())};
}

// Calls f with null pointers to the type of the arithmetic and of the result.
template <class F>
void by_types(const Tensor& products, const Tensor& like, const F& f) {
  if (products.scalar_type() == ScalarType::Double) {
    STD_TORCH_CHECK(like.scalar_type() == ScalarType::Double, "like: expected float64 as products");
    return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  }
  STD_TORCH_CHECK(like.scalar_type() != ScalarType::Double, "like: expected a dtype no wider than products'");
  by_dtype(like, [&](auto* out) {
    using O = std::remove_pointer_t<decltype(out)>;
    if constexpr (!std::is_same_v<O, double>) f(static_cast<float*>(nullptr), out);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_gradient(const Tensor& products, const Tensor& row_norms,
                                                          const Tensor& col_norms, const Tensor& logit_scale,
                                                          const Tensor& row_lse, const Tensor& col_lse,
                                                          const Tensor& grad_row, const Tensor& grad_col,
                                                          const Tensor& grad_label, int64_t label_offset,
                                                          const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const Arguments a = check(products, row_norms, col_norms, logit_scale);
  Gradient out = allocate(a, like);
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
  const Arguments a = check(products, none, none, logit_scale);
  Gradient out = allocate(a, like);
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

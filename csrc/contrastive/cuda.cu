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
  STD_TORCH_CHECK(a.scale.numel() == 1, "logit_scale: expected one element, got ", a.scale.numel());
  const bool norms = a.row_norms.numel() > 0;
  STD_TORCH_CHECK(!norms || (a.row_norms.numel() == a.rows && a.col_norms.numel() == a.columns),
                  "row_norms and col_norms: expected an element for each row and column of products");
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
void launch_lse(const Arguments& a, Tensor& row_part, Tensor& col_part) {
  const auto kernel = a.packed ? lse_tiles<R, true> : lse_tiles<R, false>;
  kernel<<<a.grid(), kTileThreads, 0, stream_of(a.products)>>>(chunk_of<R>(a), a.scale.const_data_ptr<R>(),
                                                               static_cast<Partial*>(row_part.data_ptr()),
                                                               static_cast<Partial*>(col_part.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> chunk_lse(const Tensor& products, const Tensor& row_norms, const Tensor& col_norms,
                                     const Tensor& logit_scale) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const Arguments a = check(products, row_norms, col_norms, logit_scale);
  Tensor row_part = partials(products, a.across, a.rows), col_part = partials(products, a.down, a.columns);
  if (products.scalar_type() == ScalarType::Double)
    launch_lse<double>(a, row_part, col_part);
  else
    launch_lse<float>(a, row_part, col_part);
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
                                                          const Tensor& grad_positive, int64_t label_offset,
                                                          const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const Arguments a = check(products, row_norms, col_norms, logit_scale);
  Gradient out = allocate(a, like);
  by_types(products, like, [&](auto* real, auto* result) {
    using R = std::remove_pointer_t<decltype(real)>;
    using O = std::remove_pointer_t<decltype(result)>;
    const ScalarType type = products.scalar_type();
    const Tensor vectors[] = {as_type(row_lse, type), as_type(grad_row, type), as_type(grad_positive, type),
                              as_type(col_lse, type), as_type(grad_col, type)};
    for (int i = 0; i < 5; ++i)
      STD_TORCH_CHECK(vectors[i].numel() == (i < 3 ? a.rows : a.columns),
                      "lse and grad: expected an element for each row and column of products");
    const Weights<R> weights{vectors[0].const_data_ptr<R>(), vectors[1].const_data_ptr<R>(),
                             vectors[2].const_data_ptr<R>(), vectors[3].const_data_ptr<R>(),
                             vectors[4].const_data_ptr<R>(), label_offset};
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

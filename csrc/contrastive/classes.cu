// The contrastive losses' chunks on CUDA where pairs are of classes: what lies between the library's products.
#include "contrastive/chunk.h"
#include "contrastive/classes.cuh"

namespace gapkern::contrastive {
namespace {

// Tensors without elements are absent; those given are in the kernels' types.
struct Given {
  Tensor row_ids, column_ids, row_limit, column_limit, guide, guide_row_limit, guide_column_limit;
  int64_t label_offset;
  bool positive;

  template <class R>
  ChunkClasses<R> classes() const {
    return {pointer<int64_t>(row_ids),
            pointer<int64_t>(column_ids),
            pointer<R>(row_limit),
            pointer<R>(column_limit),
            pointer<R>(guide),
            pointer<R>(guide_row_limit),
            pointer<R>(guide_column_limit),
            label_offset,
            positive};
  }
  template <class T>
  static const T* pointer(const Tensor& t) {
    return t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
  }
};

void check_columns(const ChunkArguments& a) {
  STD_TORCH_CHECK(a.columns < int64_t(1) << 31, "products: expected fewer than 2^31 columns, got ", a.columns);
}

void expect_or_none(const Tensor& like, const Tensor& x, int64_t count, const char* name) {
  expect(like, x, x.numel() > 0 ? count : 0, name);
}

Given check_classes(const ChunkArguments& a, const Tensor& row_ids, const Tensor& col_ids, const Tensor& row_limit,
                    const Tensor& col_limit, const Tensor& guide, const Tensor& guide_row_limit,
                    const Tensor& guide_col_limit, int64_t label_offset, bool positive) {
  const Tensor& like = a.products;
  const ScalarType type = like.scalar_type();
  check_columns(a);
  Given g{as_type(row_ids, ScalarType::Long),
          as_type(col_ids, ScalarType::Long),
          as_type(row_limit, type),
          as_type(col_limit, type),
          as_type(guide, type),
          as_type(guide_row_limit, type),
          as_type(guide_col_limit, type),
          label_offset,
          positive && row_ids.numel() > 0};
  expect_or_none(like, g.row_ids, a.rows, "row_ids");
  expect(like, g.column_ids, g.row_ids.numel() > 0 ? a.columns : 0, "col_ids");
  expect_or_none(like, g.row_limit, a.rows, "row_limit");
  expect_or_none(like, g.column_limit, a.columns, "col_limit");
  expect_or_none(like, g.guide, a.rows * a.columns, "guide");
  expect_or_none(like, g.guide_row_limit, a.rows, "guide_row_limit");
  expect_or_none(like, g.guide_column_limit, a.columns, "guide_col_limit");
  return g;
}

// Whether both matrices can be read 16 bytes at a time.
bool packs_both(const ChunkArguments& a, const Given& g) {
  return a.packed && (g.guide.numel() == 0 || packs(g.guide, a.columns));
}

template <class R>
void launch_lse(const ChunkArguments& a, const Given& g, Tensor& row_part, Tensor& col_part) {
  class_tiles<R><<<a.grid(), kTileThreads, 0, stream_of(a.products)>>>(
      chunk_of<R>(a), packs_both(a, g), g.classes<R>(), a.scale.const_data_ptr<R>(),
      static_cast<Partial*>(row_part.data_ptr()), static_cast<Partial*>(col_part.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> chunk_lse(const Tensor& products, const Tensor& row_norms, const Tensor& col_norms,
                                     const Tensor& logit_scale, const Tensor& row_ids, const Tensor& col_ids,
                                     const Tensor& row_limit, const Tensor& col_limit, const Tensor& guide,
                                     const Tensor& guide_row_limit, const Tensor& guide_col_limit, int64_t label_offset,
                                     bool positive) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const ChunkArguments a = check_chunk(products, row_norms, col_norms, logit_scale);
  const Given g = check_classes(a, row_ids, col_ids, row_limit, col_limit, guide, guide_row_limit, guide_col_limit,
                                label_offset, positive);
  const int64_t classes = g.positive ? 2 : 1;
  Tensor row_part = partials(products, classes * a.across, a.rows);
  Tensor col_part = partials(products, classes * a.down, a.columns);
  if (products.scalar_type() == ScalarType::Double)
    launch_lse<double>(a, g, row_part, col_part);
  else
    launch_lse<float>(a, g, row_part, col_part);
  const auto combined = [&](const Tensor& part, int64_t tiles, int64_t count) {
    Tensor out = torch::stable::new_empty(products, {classes, count}, ScalarType::Double);
    combine(part, classes, tiles, count, out);
    return out;
  };
  return {combined(row_part, a.across, a.rows), combined(col_part, a.down, a.columns)};
}

// Log-sum-exps and gradients [classes, count], of rows or of columns.
struct Side {
  Tensor lse, grad;
  Side(const ChunkArguments& a, const Tensor& lse2, const Tensor& gradient, int64_t classes, int64_t count,
       const char* name)
      : lse(as_type(lse2, ScalarType::Double)), grad(as_type(gradient, a.products.scalar_type())) {
    for (const Tensor& v : {lse, grad}) expect(a.products, v, classes * count, name);
  }
};

template <class R>
WeightsOfClass<R> weights_of(const Side& rows, const Side& columns, const ChunkArguments& a, int64_t of) {
  return {rows.lse.const_data_ptr<double>() + of * a.rows, rows.grad.const_data_ptr<R>() + of * a.rows,
          columns.lse.const_data_ptr<double>() + of * a.columns, columns.grad.const_data_ptr<R>() + of * a.columns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> chunk_gradient(
    const Tensor& products, const Tensor& row_norms, const Tensor& col_norms, const Tensor& logit_scale,
    const Tensor& row_ids, const Tensor& col_ids, const Tensor& row_limit, const Tensor& col_limit, const Tensor& guide,
    const Tensor& guide_row_limit, const Tensor& guide_col_limit, int64_t label_offset, bool positive,
    const Tensor& row_lse2, const Tensor& col_lse2, const Tensor& grad_row, const Tensor& grad_col,
    const Tensor& grad_label, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const ChunkArguments a = check_chunk(products, row_norms, col_norms, logit_scale);
  const Given g = check_classes(a, row_ids, col_ids, row_limit, col_limit, guide, guide_row_limit, guide_col_limit,
                                label_offset, positive);
  const int64_t classes = g.positive ? 2 : 1;
  const Side rows(a, row_lse2, grad_row, classes, a.rows, "row_lse2 and grad_row");
  const Side columns(a, col_lse2, grad_col, classes, a.columns, "col_lse2 and grad_col");
  const Tensor at_label = as_type(grad_label, products.scalar_type());
  expect_or_none(products, at_label, a.rows, "grad_label");
  ChunkGradient out = allocate(a, like);
  Tensor of_all = torch::stable::empty_like(out.of_scale);
  by_types(products, like, [&](auto* real, auto* result) {
    using R = std::remove_pointer_t<decltype(real)>;
    using O = std::remove_pointer_t<decltype(result)>;
    const WeightsOfClasses<R> weights{weights_of<R>(rows, columns, a, 0), weights_of<R>(rows, columns, a, classes - 1),
                                      Given::pointer<R>(at_label)};
    class_gradient<R, O><<<a.grid(), kTileThreads, 0, stream_of(products)>>>(
        chunk_of<R>(a), packs_both(a, g), g.classes<R>(), a.scale.const_data_ptr<R>(), weights, out.template sums<R>(),
        of_all.mutable_data_ptr<double>(), static_cast<O*>(out.ds.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out.ds, out.of_scale, of_all, out.rows, out.columns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_sigmoid(const Tensor& products, const Tensor& logit_scale,
                                                         const Tensor& logit_bias, const Tensor& row_ids,
                                                         const Tensor& col_ids, const Tensor& row_weights,
                                                         const Tensor& col_weights, bool soft_targets,
                                                         const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  const ScalarType type = products.scalar_type();
  const Tensor none = torch::stable::new_empty(products, {0}, type);
  const ChunkArguments a = check_chunk(products, none, none, logit_scale);
  check_columns(a);
  const Tensor bias = as_type(logit_bias, type);
  const Tensor of_rows = as_type(row_ids, ScalarType::Long), of_columns = as_type(col_ids, ScalarType::Long);
  const Tensor by_row = as_type(row_weights, type), by_column = as_type(col_weights, type);
  expect(products, bias, 1, "logit_bias");
  for (const Tensor& v : {of_rows, by_row}) expect(products, v, a.rows, "row_ids and row_weights");
  for (const Tensor& v : {of_columns, by_column}) expect(products, v, a.columns, "col_ids and col_weights");
  ChunkGradient out = allocate(a, like);
  Tensor loss = torch::stable::empty_like(out.of_scale), of_bias = torch::stable::empty_like(out.of_scale);
  by_types(products, like, [&](auto* real, auto* result) {
    using R = std::remove_pointer_t<decltype(real)>;
    using O = std::remove_pointer_t<decltype(result)>;
    const WeightedIds<R> ids{of_rows.const_data_ptr<int64_t>(), of_columns.const_data_ptr<int64_t>(),
                             by_row.const_data_ptr<R>(), by_column.const_data_ptr<R>(), soft_targets};
    sigmoid_of_ids<R, O><<<a.grid(), kTileThreads, 0, stream_of(products)>>>(
        chunk_of<R>(a), a.packed, ids, a.scale.const_data_ptr<R>(), bias.const_data_ptr<R>(), out.template sums<R>(),
        loss.mutable_data_ptr<double>(), of_bias.mutable_data_ptr<double>(), static_cast<O*>(out.ds.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, out.ds, out.of_scale, of_bias};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("contrastive_masked_chunk_lse", TORCH_BOX(&gapkern::contrastive::chunk_lse));
  m.impl("contrastive_masked_chunk_gradient", TORCH_BOX(&gapkern::contrastive::chunk_gradient));
  m.impl("contrastive_masked_chunk_sigmoid", TORCH_BOX(&gapkern::contrastive::chunk_sigmoid));
}

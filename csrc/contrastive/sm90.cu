// The contrastive losses on Hopper, the CUDA side of gapkern/ops/contrastive/sm90.py: products with their exponentials
// in the epilogue (contrastive/sm90_gemm.h) and the small kernels around them (contrastive/sm90.cuh).
#include "contrastive/sm90.cuh"
#include "contrastive/sm90_host.h"

namespace gapkern::contrastive::sm90 {
namespace {

void expect_terms(const Inputs& in, int64_t terms) {
  STD_TORCH_CHECK(terms == 1 || (terms == kTerms && in.bfloat16()), "terms: expected 1, or ", kTerms,
                  " of bfloat16, got ", terms);
}

Tensor shift(const Tensor& row_norms, const Tensor& col_norms, const Tensor& logit_scale) {
  const torch::stable::accelerator::DeviceGuard guard(row_norms.get_device_index());
  expect(row_norms, logit_scale, 1, "logit_scale");
  expect_device_of(row_norms, col_norms, "col_norms");
  const Tensor rows = as_type(row_norms, ScalarType::Float), columns = as_type(col_norms, ScalarType::Float);
  const Tensor scale = as_type(logit_scale, ScalarType::Float);
  Tensor control = floats(row_norms, 2);
  choose_shift<<<1, kShiftThreads, 0, stream_of(rows)>>>(
      rows.const_data_ptr<float>(), rows.numel(), columns.const_data_ptr<float>(), columns.numel(),
      scale.const_data_ptr<float>(), control.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return control;
}

// sums [k, count] of parts [k, tiles, stride].
void add_up(const Tensor& part, int64_t tiles, Tensor& sums, int64_t count) {
  const int64_t kinds = sums.numel() / count, stride = part.numel() / (kinds * tiles);
  for (int64_t k = 0; k < kinds; ++k)
    sum_parts<<<blocks(count, 128, int64_t(1) << 31), 128, 0, stream_of(part)>>>(
        part.const_data_ptr<float>() + k * tiles * stride, tiles, stride, count, out(sums) + k * count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> sums(const Tensor& images, const Tensor& texts, const Tensor& control, Tensor kept,
                                int64_t label_offset) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  expect(images, control, 2, "control");
  expect_labels(in, label_offset);
  const int64_t down = tiles(in.rows, kTileM), across = tiles(in.columns, kTileN), pitch = pitch_of(in.columns);
  if (kept.numel() > 0) {
    expect(images, kept, in.rows * pitch, "kept");
    STD_TORCH_CHECK(in.bfloat16() && kept.scalar_type() == ScalarType::BFloat16, "kept: expected bfloat16");
    STD_TORCH_CHECK(kept.is_contiguous() && packs(kept, pitch), "kept: expected rows at multiples of 16 bytes");
  }
  const int64_t parts = kTileM / kPartRows * down;
  Tensor row_part = floats(images, across * down * kTileM), column_part = floats(images, parts * across * kTileN);
  SumsArguments arguments{};
  arguments.control = control.const_data_ptr<float>();
  arguments.label = int(label_offset);
  arguments.row_part = row_part.mutable_data_ptr<float>();
  arguments.column_part = column_part.mutable_data_ptr<float>();
  succeed(launch_sums(in.problem(), arguments, kept.numel() > 0 ? kept.data_ptr() : nullptr, pitch, stream_of(images)),
          "sums");
  Tensor of_rows = doubles(images, in.rows), of_columns = doubles(images, in.columns);
  add_up(row_part, across, of_rows, in.rows);
  add_up(column_part, parts, of_columns, in.columns);
  return {of_rows, of_columns};
}

std::tuple<Tensor, Tensor> lse(const Tensor& row_sums, const Tensor& col_sums, const Tensor& images,
                               const Tensor& texts, const Tensor& control, int64_t label_offset) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts, Float32::taken);
  expect(images, control, 2, "control");
  expect_labels(in, label_offset);
  const Tensor all_sums[] = {row_sums, col_sums};
  Tensor results[] = {doubles(images, in.rows), doubles(images, in.columns)};
  for (int side = 0; side < 2; ++side) {
    const int64_t count = side ? in.columns : in.rows, terms = side ? in.rows : in.columns;
    expect(images, all_sums[side], count, "row_sums and col_sums");
    finish_lse<<<blocks(count, 128, int64_t(1) << 31), 128, 0, stream_of(images)>>>(
        all_sums[side].const_data_ptr<double>(), count, terms, control.const_data_ptr<float>(), out(results[side]));
    in.with<Float32::taken>(
        [&](auto products) {
          repair_lse<<<unsigned(tiles(count, kSide)), kThreads, 0, stream_of(images)>>>(
              products, side ? -label_offset : label_offset, control.const_data_ptr<float>(), out(results[side]));
        },
        side == 1);
  }
  return {results[0], results[1]};
}

Tensor positive(const Tensor& images, const Tensor& texts, int64_t label_offset) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts, Float32::taken);
  expect_labels(in, label_offset);
  Tensor result = doubles(images, in.rows);
  in.with<Float32::taken>([&](auto products) {
    label_products<<<unsigned(tiles(in.rows, kWarps)), kThreads, 0, stream_of(images)>>>(products, label_offset,
                                                                                         out(result));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> weights(const Tensor& row_lse2, const Tensor& col_lse2, const Tensor& grad_row,
                                           const Tensor& grad_col, const Tensor& control) {
  const torch::stable::accelerator::DeviceGuard guard(row_lse2.get_device_index());
  const int64_t rows = row_lse2.numel(), columns = col_lse2.numel();
  expect_device_of(row_lse2, col_lse2, "col_lse2");
  expect(row_lse2, grad_row, rows, "grad_row");
  expect(row_lse2, grad_col, columns, "grad_col");
  expect(row_lse2, control, 2, "control");
  const Tensor lse[] = {as_type(row_lse2, ScalarType::Double), as_type(col_lse2, ScalarType::Double)};
  const Tensor grad[] = {as_type(grad_row, ScalarType::Double), as_type(grad_col, ScalarType::Double)};
  const int64_t padded = tiles(columns, kTileN) * kTileN;
  Tensor weight[] = {floats(row_lse2, rows), floats(row_lse2, padded)}, separate = floats(row_lse2, 1);
  const int64_t of_rows = tiles(rows, kThreads), of_columns = tiles(padded, kThreads);
  Tensor separate_of_block = floats(row_lse2, of_rows + of_columns);
  const cudaStream_t stream = stream_of(row_lse2);
  for (int side = 0; side < 2; ++side)
    form_weights<<<unsigned(side ? of_columns : of_rows), kThreads, 0, stream>>>(
        lse[side].const_data_ptr<double>(), grad[side].const_data_ptr<double>(), side ? columns : rows,
        side ? padded : rows, side ? rows : columns, control.const_data_ptr<float>(),
        weight[side].mutable_data_ptr<float>(), separate_of_block.mutable_data_ptr<float>() + (side ? of_rows : 0));
  any_separate_weight<<<1, kThreads, 0, stream>>>(separate_of_block.const_data_ptr<float>(), of_rows + of_columns,
                                                  separate.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {weight[0], weight[1], separate};
}

Tensor gradient(const Tensor& images, const Tensor& texts, const Tensor& control, const Tensor& separate,
                const Tensor& row_weight, const Tensor& col_weight, const Tensor& kept, const Tensor& grad_label,
                int64_t label_offset, int64_t terms) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  const int64_t pitch = pitch_of(in.columns);
  const cudaStream_t stream = stream_of(images);
  expect_terms(in, terms);
  expect_labels(in, label_offset);
  expect(images, control, 2, "control");
  expect(images, separate, 1, "separate");
  expect(images, row_weight, in.rows, "row_weight");
  expect(images, col_weight, tiles(in.columns, kTileN) * kTileN, "col_weight");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(col_weight.data_ptr()) % 8 == 0,
                  "col_weight: expected a multiple of 8 bytes");
  expect(images, grad_label, in.rows, "grad_label");
  const Tensor at_labels = as_type(grad_label, ScalarType::Double);
  Tensor ds = torch::stable::new_empty(images, {terms * in.rows, pitch}, images.scalar_type());
  GradientArguments arguments{};
  arguments.control = control.const_data_ptr<float>();
  arguments.row_weight = row_weight.const_data_ptr<float>();
  arguments.column_weight = col_weight.const_data_ptr<float>();
  if (kept.numel() > 0) {
    expect(images, kept, in.rows * pitch, "kept");
    STD_TORCH_CHECK(terms == 1, "kept: expected none for ", terms, " terms");
    STD_TORCH_CHECK(kept.scalar_type() == ScalarType::BFloat16 && kept.is_contiguous() && packs(kept, pitch),
                    "kept: expected bfloat16 rows at multiples of 16 bytes");
    Weighing weighing{};
    weighing.control = arguments.control;
    weighing.separate = arguments.condition = separate.const_data_ptr<float>();
    weighing.row_weight = arguments.row_weight;
    weighing.column_weight = arguments.column_weight;
    in.with([&](auto products) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(products.x)>>;
      gradient_of_kept<<<blocks(in.rows * pitch, 8 * kThreads), kThreads, 0, stream>>>(
          static_cast<const BFloat16*>(kept.data_ptr()), weighing, in.rows, in.columns, pitch,
          static_cast<T*>(ds.data_ptr()));
    });
  }
  succeed(launch_gradient(in.problem(), arguments, ds.data_ptr(), pitch, int(terms), stream), "gradient");
  write_labels(in, at_labels, label_offset, terms, ds);
  return ds;
}

std::tuple<Tensor, Tensor> sigmoid(const Tensor& images, const Tensor& texts, const Tensor& logit_scale,
                                   const Tensor& logit_bias, int64_t label_offset, int64_t terms) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  expect_terms(in, terms);
  expect(images, logit_scale, 1, "logit_scale");
  expect(images, logit_bias, 1, "logit_bias");
  const Tensor scale = as_type(logit_scale, ScalarType::Float), bias = as_type(logit_bias, ScalarType::Float);
  const int64_t across = tiles(in.columns, kTileN), stride = tiles(in.rows, kTileM) * kTileM;
  const int64_t pitch = pitch_of(in.columns);
  Tensor part = floats(images, 3 * across * stride), ds = torch::stable::new_empty(images, {terms * in.rows, pitch});
  Tensor sums = torch::stable::new_empty(images, {3, in.rows}, ScalarType::Double);
  SigmoidArguments arguments{};
  arguments.scale = scale.const_data_ptr<float>();
  arguments.bias = bias.const_data_ptr<float>();
  // Beyond these no row has a label.
  arguments.label = int(label_offset < -in.rows ? -in.rows : label_offset > in.columns ? in.columns : label_offset);
  arguments.loss_part = part.mutable_data_ptr<float>();
  arguments.gradient_part = arguments.loss_part + across * stride;
  arguments.scale_part = arguments.gradient_part + across * stride;
  succeed(launch_sigmoid(in.problem(), arguments, ds.data_ptr(), pitch, int(terms), stream_of(images)), "sigmoid");
  add_up(part, across, sums, in.rows);
  return {sums, ds};
}

}  // namespace

void write_labels(const Inputs& in, const Tensor& grad_label, int64_t label_offset, int64_t terms, Tensor& ds) {
  const int64_t first = label_offset < 0 ? -label_offset : 0, pitch = pitch_of(in.columns);
  const int64_t last = in.columns - label_offset < in.rows ? in.columns - label_offset : in.rows;
  if (first >= last) return;
  STD_TORCH_CHECK(terms == 1 || last - first == in.rows, "label_offset: expected a label of every row for ", terms,
                  " terms");
  in.with([&](auto products) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(products.x)>>;
    set_labels<<<blocks(last - first, 128, int64_t(1) << 31), 128, 0, stream_of(ds)>>>(
        grad_label.const_data_ptr<double>() + first, label_offset + first, last - first, pitch, int(terms),
        static_cast<T*>(ds.data_ptr()) + first * pitch);
  });
}

}  // namespace gapkern::contrastive::sm90

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("contrastive_sm90_shift", TORCH_BOX(&gapkern::contrastive::sm90::shift));
  m.impl("contrastive_sm90_sums", TORCH_BOX(&gapkern::contrastive::sm90::sums));
  m.impl("contrastive_sm90_lse", TORCH_BOX(&gapkern::contrastive::sm90::lse));
  m.impl("contrastive_sm90_positive", TORCH_BOX(&gapkern::contrastive::sm90::positive));
  m.impl("contrastive_sm90_weights", TORCH_BOX(&gapkern::contrastive::sm90::weights));
  m.impl("contrastive_sm90_gradient", TORCH_BOX(&gapkern::contrastive::sm90::gradient));
  m.impl("contrastive_sm90_sigmoid", TORCH_BOX(&gapkern::contrastive::sm90::sigmoid));
}

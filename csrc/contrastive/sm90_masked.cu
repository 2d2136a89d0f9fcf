// Classes of pairs on Hopper, the CUDA side of gapkern/ops/contrastive/sm90_masked.py: products with the classes in
// their epilogues (contrastive/sm90_masked_gemm.h) and the small kernels around them (contrastive/sm90_masked.cuh).
#include "contrastive/sm90_host.h"
#include "contrastive/sm90_masked.cuh"
#include "contrastive/sm90_masked_gemm.h"

namespace gapkern::contrastive::sm90 {
namespace {

constexpr int64_t kMark = 2, kWeightedMark = 4, kControl = 3;

int clamped(const Inputs& in, int64_t label_offset) {
  return int(label_offset < -in.rows ? -in.rows : label_offset > in.columns ? in.columns : label_offset);
}

const float* floats_of(const Tensor& x) { return x.const_data_ptr<float>(); }

void expect_marks(const Inputs& in, const Tensor& rows, const Tensor& columns, int64_t length) {
  expect(in.images, rows, in.rows * length, "row_marks");
  expect(in.images, columns, tiles(in.columns, kTileN) * kTileN * length, "col_marks");
  for (const Tensor* marks : {&rows, &columns})
    STD_TORCH_CHECK(marks->scalar_type() == ScalarType::Float && marks->is_contiguous() && packs(*marks, 4),
                    "row_marks and col_marks: expected contiguous float32 at a multiple of 16 bytes");
}

// Log-sum-exps or sums [classes, count] of one class or two.
int64_t classes_of(const Tensor& of, int64_t count, const char* name) {
  const int64_t classes = count > 0 ? of.numel() / count : 0;
  STD_TORCH_CHECK((classes == 1 || classes == 2) && of.numel() == classes * count && of.is_contiguous() &&
                      of.scalar_type() == ScalarType::Double,
                  name, ": expected one or two classes of ", count, " contiguous float64");
  return classes;
}

void add_up(const Tensor& part, int64_t tiles, const float* condition, Tensor& sums, int64_t count) {
  const int64_t classes = sums.numel() / count, stride = part.numel() / (classes * tiles);
  for (int64_t k = 0; k < classes; ++k)
    sum_class_parts<<<blocks(count, 128, int64_t(1) << 31), 128, 0, stream_of(part)>>>(
        floats_of(part) + k * tiles * stride, tiles, stride, count, condition, out(sums) + k * count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> masked_sums(const Tensor& images, const Tensor& texts, const Tensor& control,
                                       const Tensor& condition, const Tensor& row_marks, const Tensor& col_marks,
                                       int64_t label_offset, bool positive) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  expect(images, control, kControl, "control");
  expect_marks(in, row_marks, col_marks, kMark);
  if (condition.numel() > 0) expect(images, condition, 1, "condition");
  const int64_t across = tiles(in.columns, kTileN), down = tiles(in.rows, kTileM) * kTileM;
  const int64_t parts = down / kPartRows, padded = across * kTileN, classes = positive ? 2 : 1;
  Tensor row_part = floats(images, classes * across * down), column_part = floats(images, classes * parts * padded);
  MaskedSumsArguments arguments{};
  arguments.control = floats_of(control);
  arguments.condition = condition.numel() > 0 ? floats_of(condition) : nullptr;
  arguments.label = clamped(in, label_offset);
  arguments.rows = floats_of(row_marks);
  arguments.columns = floats_of(col_marks);
  arguments.negative = {row_part.mutable_data_ptr<float>(), column_part.mutable_data_ptr<float>()};
  if (positive)
    arguments.positive = {arguments.negative.row_part + across * down, arguments.negative.column_part + parts * padded};
  succeed(launch_masked_sums(in.problem(), arguments, stream_of(images)), "sums over classes");
  Tensor of_rows = torch::stable::new_empty(images, {classes, in.rows}, ScalarType::Double);
  Tensor of_columns = torch::stable::new_empty(images, {classes, in.columns}, ScalarType::Double);
  add_up(row_part, across, arguments.condition, of_rows, in.rows);
  add_up(column_part, parts, arguments.condition, of_columns, in.columns);
  return {of_rows, of_columns};
}

std::tuple<Tensor, Tensor> masked_merge(const Tensor& row_sums, const Tensor& col_sums, const Tensor& control,
                                        Tensor row_lse, Tensor col_lse) {
  const torch::stable::accelerator::DeviceGuard guard(row_sums.get_device_index());
  const cudaStream_t stream = stream_of(row_sums);
  const int64_t rows = row_sums.size(-1), columns = col_sums.size(-1);
  const Tensor sums[] = {row_sums, col_sums};
  Tensor lse[] = {row_lse, col_lse};
  expect(row_sums, control, kControl, "control");
  const int64_t classes = classes_of(row_sums, rows, "row_sums");
  int64_t of_side[2];
  for (int side = 0; side < 2; ++side) {
    const int64_t count = side ? columns : rows;
    STD_TORCH_CHECK(classes_of(sums[side], count, "col_sums") == classes &&
                        classes_of(lse[side], count, "row_lse and col_lse") == classes,
                    "row_sums, col_sums, row_lse and col_lse: expected the same classes");
    expect_device_of(row_sums, sums[side], "col_sums");
    expect_device_of(row_sums, lse[side], "row_lse and col_lse");
    of_side[side] = tiles(classes * count, kThreads);
  }
  const int64_t all = of_side[0] + of_side[1];
  Tensor pending_of_block = floats(row_sums, all), condition = floats(row_sums, 1), next = floats(row_sums, kControl);
  for (int side = 0; side < 2; ++side)
    merge_classes<<<unsigned(of_side[side]), kThreads, 0, stream>>>(
        sums[side].const_data_ptr<double>(), sums[side].numel(), side ? rows : columns, floats_of(control),
        out(lse[side]), pending_of_block.mutable_data_ptr<float>() + (side ? of_side[0] : 0));
  next_pass<<<1, kThreads, 0, stream>>>(floats_of(pending_of_block), all, floats_of(control),
                                        rows > columns ? rows : columns, condition.mutable_data_ptr<float>(),
                                        next.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {condition, next};
}

void masked_repair(const Tensor& images, const Tensor& texts, const Tensor& control, const Tensor& row_marks,
                   const Tensor& col_marks, int64_t label_offset, Tensor row_lse, Tensor col_lse) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  expect(images, control, kControl, "control");
  expect_marks(in, row_marks, col_marks, kMark);
  Tensor lse[] = {row_lse, col_lse};
  for (int side = 0; side < 2; ++side) {
    const int64_t count = side ? in.columns : in.rows;
    const bool positive = classes_of(lse[side], count, "row_lse and col_lse") == 2;
    expect_device_of(images, lse[side], "row_lse and col_lse");
    in.with(
        [&](auto products) {
          repair_classes<<<unsigned(tiles(count, kSide)), kThreads, 0, stream_of(images)>>>(
              products, side ? -clamped(in, label_offset) : clamped(in, label_offset), floats_of(control),
              floats_of(side ? col_marks : row_marks), floats_of(side ? row_marks : col_marks), out(lse[side]),
              positive ? out(lse[side]) + count : nullptr);
        },
        side == 1);
  }
}

Tensor masked_gradient(const Tensor& images, const Tensor& texts, const Tensor& control, const Tensor& row_marks,
                       const Tensor& col_marks, const Tensor& grad_label, int64_t label_offset) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  const int64_t pitch = pitch_of(in.columns);
  expect(images, control, kControl, "control");
  expect_marks(in, row_marks, col_marks, kWeightedMark);
  expect(images, grad_label, in.rows, "grad_label");
  Tensor ds = torch::stable::new_empty(images, {in.rows, pitch});
  MaskedGradientArguments arguments{};
  arguments.control = floats_of(control);
  arguments.rows = floats_of(row_marks);
  arguments.columns = floats_of(col_marks);
  succeed(launch_masked_gradient(in.problem(), arguments, ds.data_ptr(), pitch, stream_of(images)),
          "gradient of classes");
  write_labels(in, as_type(grad_label, ScalarType::Double), clamped(in, label_offset), 1, ds);
  return ds;
}

std::tuple<Tensor, Tensor> masked_sigmoid(const Tensor& images, const Tensor& texts, const Tensor& logit_scale,
                                          const Tensor& logit_bias, const Tensor& row_marks, const Tensor& col_marks,
                                          bool soft_targets) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Inputs in(images, texts);
  expect(images, logit_scale, 1, "logit_scale");
  expect(images, logit_bias, 1, "logit_bias");
  expect_marks(in, row_marks, col_marks, kMark);
  const Tensor scale = as_type(logit_scale, ScalarType::Float), bias = as_type(logit_bias, ScalarType::Float);
  const int64_t across = tiles(in.columns, kTileN), stride = tiles(in.rows, kTileM) * kTileM;
  const int64_t pitch = pitch_of(in.columns);
  Tensor part = floats(images, 3 * across * stride), ds = torch::stable::new_empty(images, {in.rows, pitch});
  Tensor sums = torch::stable::new_empty(images, {3, in.rows}, ScalarType::Double);
  MaskedSigmoidArguments arguments{};
  arguments.scale = floats_of(scale);
  arguments.bias = floats_of(bias);
  arguments.rows = floats_of(row_marks);
  arguments.columns = floats_of(col_marks);
  arguments.soft = soft_targets;
  arguments.loss_part = part.mutable_data_ptr<float>();
  arguments.gradient_part = arguments.loss_part + across * stride;
  arguments.scale_part = arguments.gradient_part + across * stride;
  succeed(launch_masked_sigmoid(in.problem(), arguments, ds.data_ptr(), pitch, stream_of(images)),
          "sigmoid of classes");
  add_up(part, across, nullptr, sums, in.rows);
  return {sums, ds};
}

}  // namespace
}  // namespace gapkern::contrastive::sm90

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("contrastive_sm90_masked_sums", TORCH_BOX(&gapkern::contrastive::sm90::masked_sums));
  m.impl("contrastive_sm90_masked_merge", TORCH_BOX(&gapkern::contrastive::sm90::masked_merge));
  m.impl("contrastive_sm90_masked_repair", TORCH_BOX(&gapkern::contrastive::sm90::masked_repair));
  m.impl("contrastive_sm90_masked_gradient", TORCH_BOX(&gapkern::contrastive::sm90::masked_gradient));
  m.impl("contrastive_sm90_masked_sigmoid", TORCH_BOX(&gapkern::contrastive::sm90::masked_sigmoid));
}

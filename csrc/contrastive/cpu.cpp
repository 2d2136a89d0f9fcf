// The softmax operators on the CPU: arguments, tensors, registration. The passes are forward.h and backward.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "contrastive/backward.h"
#include "contrastive/forward.h"

namespace gapkern::contrastive {
namespace {

struct Outputs {
  Tensor row_lse, column_lse, label;     // [N], [M], [N] float64
  Tensor row_stats, column_stats, kept;  // [3, N], [2, M] float64, [K, M]
};

template <class T>
void forward(const Arguments& a, Outputs& out) {
  Problem<T> p(a);
  if (p.range.wants_double()) return forward<double>(a.in_double(), out);
  const int64_t kept_rows = kept_rows_in(a, out.kept);
  const Softmax<T> state =
      softmax<T>(p, out.row_stats.mutable_data_ptr<double>(), out.column_stats.mutable_data_ptr<double>(),
                 kept_rows ? out.kept.template mutable_data_ptr<T>() : nullptr, kept_rows);
  const LogSumExps values{.rows = out.row_lse.mutable_data_ptr<double>(),
                          .columns = out.column_lse.mutable_data_ptr<double>(),
                          .label = out.label.mutable_data_ptr<double>()};
  ForwardPass<T>(p, state, values).run();
  if (state.within(p.range)) return;
  p.range.track();
  ForwardPass<T>(p, state, values).run();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_lse(const Tensor& images, const Tensor& texts,
                                                                           const Tensor& logit_scale,
                                                                           std::string similarity, int64_t label_offset,
                                                                           std::string precision, int64_t work_bytes) {
  const Arguments a = check(images, texts, logit_scale, similarity, label_offset, precision);
  const int64_t n = a.n(), m = a.m(), item = item_bytes(a.type);
  STD_TORCH_CHECK(label_offset >= 0 && label_offset + n <= m,
                  "label_offset: expected 0 <= label_offset <= M - N = ", m - n, ", got ", label_offset);
  Outputs out{.row_lse = empty(images, {n}, ScalarType::Double),
              .column_lse = empty(images, {m}, ScalarType::Double),
              .label = empty(images, {n}, ScalarType::Double),
              .row_stats = empty(images, {3, n}, ScalarType::Double),
              .column_stats = empty(images, {2, m}, ScalarType::Double),
              .kept = cached(images, std::min(n, std::max<int64_t>(work_bytes, 0) / (m * item)), m, a.type)};
  if (a.type == ScalarType::Double)
    forward<double>(a, out);
  else
    forward<float>(a, out);
  return {out.row_lse, out.column_lse, out.label, out.row_stats, out.column_stats, out.kept};
}

// What the backward operator takes beside `Arguments`, contiguous and, but for kept, float64.
struct Saved {
  Tensor grad_row, grad_column, grad_label;  // [N], [M], [N]
  Tensor row_stats, column_stats, kept;      // [3, N], [2, M], [K, M]
};

struct Needs {
  bool images, texts, logit_scale;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Arguments& a, const Saved& saved, const Needs& needs) {
  Problem<T> p(a);
  if (p.range.wants_double()) return backward<double>(a.in_double(), saved, needs);
  const int64_t kept_rows = kept_rows_in(a, saved.kept);
  const Softmax<const T> state =
      softmax<const T>(p, saved.row_stats.const_data_ptr<double>(), saved.column_stats.const_data_ptr<double>(),
                       kept_rows ? saved.kept.template const_data_ptr<T>() : nullptr, kept_rows);
  if (!state.within(p.range)) p.range.track();
  Tensor images = gradient_of(p.images, needs.images, a.type), texts = gradient_of(p.texts, needs.texts, a.type);
  double scale = 0;
  const OutputGradients in{.rows = saved.grad_row.const_data_ptr<double>(),
                           .columns = saved.grad_column.const_data_ptr<double>(),
                           .label = saved.grad_label.const_data_ptr<double>()};
  const InputGradients<T> out{.images = needs.images ? images.template mutable_data_ptr<T>() : nullptr,
                              .texts = needs.texts ? texts.template mutable_data_ptr<T>() : nullptr,
                              .logit_scale = &scale};
  BackwardPass<T>(p, state, in, out, p.distances).run();
  Tensor logit_scale = empty(p.images, {needs.logit_scale ? 1 : 0}, ScalarType::Double);
  if (needs.logit_scale) *logit_scale.mutable_data_ptr<double>() = scale;
  return {images, texts, logit_scale};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_lse_backward(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& grad_positive, const Tensor& images,
    const Tensor& texts, const Tensor& logit_scale, const Tensor& row_stats, const Tensor& col_stats,
    const Tensor& kept, std::string similarity, int64_t label_offset, std::string precision, std::vector<bool> needs) {
  const Arguments a = check(images, texts, logit_scale, similarity, label_offset, precision);
  STD_TORCH_CHECK(needs.size() == 3, "needs: expected three flags");
  STD_TORCH_CHECK(grad_row.numel() == a.n() && grad_positive.numel() == a.n() && grad_col.numel() == a.m() &&
                      row_stats.numel() == 3 * a.n() && col_stats.numel() == 2 * a.m(),
                  "contrastive_lse_backward: gradients do not match images and texts");
  const Saved saved{.grad_row = as_type(grad_row, ScalarType::Double),
                    .grad_column = as_type(grad_col, ScalarType::Double),
                    .grad_label = as_type(grad_positive, ScalarType::Double),
                    .row_stats = as_type(row_stats, ScalarType::Double),
                    .column_stats = as_type(col_stats, ScalarType::Double),
                    .kept = torch::stable::contiguous(kept)};
  const Needs wanted{.images = needs[0], .texts = needs[1], .logit_scale = needs[2]};
  const auto [dx, dy, dscale] =
      a.type == ScalarType::Double ? backward<double>(a, saved, wanted) : backward<float>(a, saved, wanted);
  return {as_type(dx, images.scalar_type()), as_type(dy, texts.scalar_type()),
          as_type(dscale, logit_scale.scalar_type())};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("contrastive_lse", TORCH_BOX(&gapkern::contrastive::contrastive_lse));
  m.impl("contrastive_lse_backward", TORCH_BOX(&gapkern::contrastive::contrastive_lse_backward));
}

// The operators over classes of pairs on the CPU: arguments, tensors, registration. The passes are classes_forward.h
// and classes_backward.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "contrastive/classes_backward.h"
#include "contrastive/classes_forward.h"

namespace gapkern::contrastive {
namespace {

// Of a side with itself half the chunk's products are left, and half its memory.
int64_t chunk_bytes(const ClassesOptions& o) { return o.own ? kChunkBytes / 2 : kChunkBytes; }

// From here on pages cost nothing beside the products, and what is held in between would count: a loss has several
// blocks of logits.
void release_where_large(const Arguments& a) {
  if (a.n() * a.m() >= int64_t(1) << 26) empty_cache();
}

void check_count(const char* name, const Tensor& given, int64_t count) {
  STD_TORCH_CHECK(given.numel() == 0 || given.numel() == count, name, ": expected ", count, " elements or none, got ",
                  given.numel());
}

// Their tensors contiguous and in the kernels' types.
ClassesOptions check_classes(const Arguments& a, ClassesOptions o, const std::string& equal) {
  STD_TORCH_CHECK(equal == "positive" || equal == "left_out", "equal: expected 'positive' or 'left_out', got '", equal,
                  "'");
  o.positive = equal == "positive" && o.row_ids.numel() > 0;
  check_count("row_ids", o.row_ids, a.n());
  check_count("col_ids", o.column_ids, a.m());
  check_count("row_limit", o.row_limit, a.n());
  check_count("col_limit", o.column_limit, a.m());
  check_count("guide_row_limit", o.guide_row_limit, a.n());
  check_count("guide_col_limit", o.guide_column_limit, a.m());
  STD_TORCH_CHECK((o.row_ids.numel() > 0) == (o.column_ids.numel() > 0), "col_ids: expected together with row_ids");
  if (o.guide_images.numel() > 0)
    STD_TORCH_CHECK(o.guide_images.dim() == 2 && o.guide_texts.dim() == 2 && o.guide_images.size(0) == a.n() &&
                        o.guide_texts.size(0) == a.m() && o.guide_images.size(1) == o.guide_texts.size(1),
                    "guide_x and guide_y: expected one row for each of x and y, of one width");
  o.row_ids = as_type(o.row_ids, ScalarType::Long);
  o.column_ids = as_type(o.column_ids, ScalarType::Long);
  for (Tensor* limit : {&o.row_limit, &o.column_limit, &o.guide_row_limit, &o.guide_column_limit})
    *limit = as_type(*limit, ScalarType::Double);
  return o;
}

Label parse_label(const std::string& name) {
  STD_TORCH_CHECK(name == "counted" || name == "left_out" || name == "none",
                  "label: expected 'counted', 'left_out' or 'none', got '", name, "'");
  return name == "counted" ? Label::counted : name == "left_out" ? Label::left_out : Label::none;
}

template <class T>
ClassesOptions in_type(const Arguments& a, ClassesOptions o) {
  o.guide_images = as_type(o.guide_images, a.type);
  o.guide_texts = as_type(o.guide_texts, a.type);
  return o;
}

// In row_stats [5, n], column_stats [4, m] and kept. Of a side with itself column_stats are the row's.
template <class T>
ClassesState<T> state_in(const Problem<std::remove_const_t<T>>& p, const ClassesOptions& o,
                         typename ClassesState<T>::Real* rows, typename ClassesState<T>::Real* columns, T* kept,
                         int64_t kept_rows) {
  const auto side = [](auto* values, int64_t count, int c) {
    return Statistics<typename ClassesState<T>::Real>{
        .reference = values + 2 * c * count, .log2 = values + (2 * c + 1) * count, .count = count};
  };
  ClassesState<T> state{};
  for (int c = 0; c < kClasses; ++c) {
    state.rows[c] = side(rows, p.n, c);
    state.columns[c] = side(columns, p.m, c);
  }
  if (!o.own && o.label == Label::counted) state.label_t = rows + 4 * p.n;
  // Codes of logits would decide otherwise near a limit.
  if (kept_rows == 0 || (unit_of_kept(p) != 0 && o.limited())) return state;
  state.kept = o.own ? KeptLogits<T>::of_own(p, kept) : KeptLogits<T>(p, kept, kept_rows);
  return state;
}

struct ClassesOutputs {
  Tensor rows[kClasses], columns[kClasses], label;
  Tensor row_stats, column_stats, kept;
};

template <class T>
void forward(const Arguments& a, const ClassesOptions& given, ClassesOutputs& out) {
  Problem<T> p(a, chunk_bytes(given));
  if (p.range.wants_double()) return forward<double>(a.in_double(), given, out);
  const ClassesOptions o = in_type<T>(a, given);
  const Classes<T> classes(p, o);
  const int64_t kept_rows = kept_rows_in(a, out.kept);
  double* const rows = out.row_stats.mutable_data_ptr<double>();
  const ClassesState<T> state = state_in<T>(p, o, rows, o.own ? rows : out.column_stats.mutable_data_ptr<double>(),
                                            kept_rows ? out.kept.template mutable_data_ptr<T>() : nullptr, kept_rows);
  ClassesLogSumExps values{};
  for (int c = 0; c < kClasses; ++c) {
    values.rows[c] = out.rows[c].mutable_data_ptr<double>();
    if (!o.own) values.columns[c] = out.columns[c].mutable_data_ptr<double>();
  }
  if (state.label_t != nullptr) values.label = out.label.mutable_data_ptr<double>();
  ClassesForwardPass<T>(p, classes, state, values).run();
  if (state.within(p.range)) return;
  p.range.track();
  ClassesForwardPass<T>(p, classes, state, values).run();
}

void forward(const Arguments& a, const ClassesOptions& o, ClassesOutputs& out) {
  a.type == ScalarType::Double ? forward<double>(a, o, out) : forward<float>(a, o, out);
  release_where_large(a);
}

struct ClassesSaved {
  Tensor grad_rows[kClasses], grad_columns[kClasses], grad_label;  // float64
  Tensor row_stats, column_stats, kept;
};

struct ClassesGradients {
  Tensor images, texts, logit_scale;
};

template <class T>
ClassesGradients backward(const Arguments& a, const ClassesOptions& given, const ClassesSaved& saved,
                          const std::vector<bool>& needs) {
  Problem<T> p(a, chunk_bytes(given));
  if (p.range.wants_double()) return backward<double>(a.in_double(), given, saved, needs);
  const ClassesOptions o = in_type<T>(a, given);
  const Classes<T> classes(p, o);
  const int64_t kept_rows = kept_rows_in(a, saved.kept);
  const double* const rows = saved.row_stats.const_data_ptr<double>();
  const ClassesState<const T> state =
      state_in<const T>(p, o, rows, o.own ? rows : saved.column_stats.const_data_ptr<double>(),
                        kept_rows ? saved.kept.template const_data_ptr<T>() : nullptr, kept_rows);
  if (!state.within(p.range)) p.range.track();
  ClassesGradients out{.images = gradient_of(p.images, needs[0], a.type),
                       .texts = gradient_of(p.texts, !o.own && needs[1], a.type),
                       .logit_scale = empty(p.images, {needs[2] ? 1 : 0}, ScalarType::Double)};
  ClassesOutputGradients in{};
  for (int c = 0; c < kClasses; ++c) {
    in.rows[c] = saved.grad_rows[c].const_data_ptr<double>();
    in.columns[c] = o.own ? in.rows[c] : saved.grad_columns[c].const_data_ptr<double>();
  }
  if (state.label_t != nullptr) in.label = saved.grad_label.const_data_ptr<double>();
  T* const images = needs[0] ? out.images.template mutable_data_ptr<T>() : nullptr;
  T* const texts = o.own ? images : needs[1] ? out.texts.template mutable_data_ptr<T>() : nullptr;
  const double scale = ClassesBackwardPass<T>(p, classes, state, in, images, texts).run();
  if (needs[2]) *out.logit_scale.mutable_data_ptr<double>() = scale;
  return out;
}

ClassesGradients backward(const Arguments& a, const ClassesOptions& o, const ClassesSaved& saved,
                          const std::vector<bool>& needs) {
  ClassesGradients found =
      a.type == ScalarType::Double ? backward<double>(a, o, saved, needs) : backward<float>(a, o, saved, needs);
  release_where_large(a);
  return found;
}

Tensor in_double(const Tensor& t) { return as_type(t, ScalarType::Double); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_masked_lse(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& row_ids, const Tensor& col_ids,
    const Tensor& row_limit, const Tensor& col_limit, const Tensor& guide_x, const Tensor& guide_y,
    const Tensor& guide_row_limit, const Tensor& guide_col_limit, std::string similarity, int64_t label_offset,
    std::string label, std::string equal, std::string precision, int64_t work_bytes) {
  const Arguments a = check(x, y, logit_scale, similarity, label_offset, precision);
  const ClassesOptions o = check_classes(a,
                                         {row_ids, col_ids, row_limit, col_limit, guide_x, guide_y, guide_row_limit,
                                          guide_col_limit, false, false, parse_label(label)},
                                         equal);
  const int64_t n = a.n(), m = a.m(),
                kept_rows = std::min(n, std::max<int64_t>(work_bytes, 0) / (m * item_bytes(a.type)));
  const auto vector = [&](int64_t count) { return empty(x, {count}, ScalarType::Double); };
  ClassesOutputs out{.rows = {vector(n), vector(n)},
                     .columns = {vector(m), vector(m)},
                     .label = vector(o.label == Label::counted ? n : 0),
                     .row_stats = empty(x, {5, n}, ScalarType::Double),
                     .column_stats = empty(x, {4, m}, ScalarType::Double),
                     .kept = cached(x, kept_rows, m, a.type)};
  double* const label_t = out.row_stats.mutable_data_ptr<double>() + 4 * n;
  std::fill(label_t, label_t + n, 0.);
  forward(a, o, out);
  return {out.rows[kNegative], out.columns[kNegative], out.rows[kPositive], out.columns[kPositive],
          out.label,           out.row_stats,          out.column_stats,    out.kept};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_masked_lse_backward(
    const Tensor& grad_row_negative, const Tensor& grad_col_negative, const Tensor& grad_row_positive,
    const Tensor& grad_col_positive, const Tensor& grad_label_logit, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor& row_stats, const Tensor& col_stats, const Tensor& kept, const Tensor& x,
    const Tensor& y, const Tensor& logit_scale, const Tensor& row_ids, const Tensor& col_ids, const Tensor& row_limit,
    const Tensor& col_limit, const Tensor& guide_x, const Tensor& guide_y, const Tensor& guide_row_limit,
    const Tensor& guide_col_limit, std::string similarity, int64_t label_offset, std::string label, std::string equal,
    std::string precision, std::vector<bool> needs) {
  const Arguments a = check(x, y, logit_scale, similarity, label_offset, precision);
  const ClassesOptions o = check_classes(a,
                                         {row_ids, col_ids, row_limit, col_limit, guide_x, guide_y, guide_row_limit,
                                          guide_col_limit, false, false, parse_label(label)},
                                         equal);
  STD_TORCH_CHECK(needs.size() == 3, "needs: expected three flags");
  STD_TORCH_CHECK(grad_row_negative.numel() == a.n() && grad_row_positive.numel() == a.n() &&
                      grad_col_negative.numel() == a.m() && grad_col_positive.numel() == a.m() &&
                      row_stats.numel() == 5 * a.n() && col_stats.numel() == 4 * a.m() &&
                      grad_label_logit.numel() == (o.label == Label::counted ? a.n() : 0),
                  "contrastive_masked_lse_backward: gradients do not match x and y");
  const ClassesSaved saved{.grad_rows = {in_double(grad_row_negative), in_double(grad_row_positive)},
                           .grad_columns = {in_double(grad_col_negative), in_double(grad_col_positive)},
                           .grad_label = in_double(grad_label_logit),
                           .row_stats = in_double(row_stats),
                           .column_stats = in_double(col_stats),
                           .kept = torch::stable::contiguous(kept)};
  const ClassesGradients found = backward(a, o, saved, needs);
  return {as_type(found.images, x.scalar_type()), as_type(found.texts, y.scalar_type()),
          as_type(found.logit_scale, logit_scale.scalar_type())};
}

// Of x with itself.
ClassesOptions own_classes(const Arguments& a, const Tensor& ids, const Tensor& limit, const std::string& equal) {
  const Tensor none = empty(a.images, {0}, a.images.scalar_type());
  return check_classes(a, {ids, ids, limit, none, none, none, none, none, false, true, Label::left_out}, equal);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_self_lse(const Tensor& x, const Tensor& logit_scale,
                                                                const Tensor& ids, const Tensor& limit,
                                                                std::string similarity, std::string equal,
                                                                std::string precision, int64_t work_bytes) {
  const Arguments a = check(x, x, logit_scale, similarity, 0, precision);
  const ClassesOptions o = own_classes(a, ids, limit, equal);
  const int64_t n = a.n(), columns = KeptLogits<float>::own_columns(n);
  const int64_t kept_rows = n * columns * item_bytes(a.type) <= work_bytes ? n : 0;
  ClassesOutputs out{.rows = {empty(x, {n}, ScalarType::Double), empty(x, {n}, ScalarType::Double)},
                     .row_stats = empty(x, {4, n}, ScalarType::Double),
                     .kept = cached(x, kept_rows, columns, a.type)};
  forward(a, o, out);
  return {out.rows[kNegative], out.rows[kPositive], out.row_stats, out.kept};
}

std::tuple<Tensor, Tensor> contrastive_self_lse_backward(const Tensor& grad_negative, const Tensor& grad_positive,
                                                         const Tensor&, const Tensor&, const Tensor& stats,
                                                         const Tensor& kept, const Tensor& x, const Tensor& logit_scale,
                                                         const Tensor& ids, const Tensor& limit, std::string similarity,
                                                         std::string equal, std::string precision,
                                                         std::vector<bool> needs) {
  const Arguments a = check(x, x, logit_scale, similarity, 0, precision);
  const ClassesOptions o = own_classes(a, ids, limit, equal);
  STD_TORCH_CHECK(needs.size() == 2, "needs: expected two flags");
  STD_TORCH_CHECK(grad_negative.numel() == a.n() && grad_positive.numel() == a.n() && stats.numel() == 4 * a.n(),
                  "contrastive_self_lse_backward: gradients do not match x");
  const ClassesSaved saved{.grad_rows = {in_double(grad_negative), in_double(grad_positive)},
                           .row_stats = in_double(stats),
                           .kept = torch::stable::contiguous(kept)};
  const ClassesGradients found = backward(a, o, saved, {needs[0], false, needs[1]});
  return {as_type(found.images, x.scalar_type()), as_type(found.logit_scale, logit_scale.scalar_type())};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("contrastive_masked_lse", TORCH_BOX(&gapkern::contrastive::contrastive_masked_lse));
  m.impl("contrastive_masked_lse_backward", TORCH_BOX(&gapkern::contrastive::contrastive_masked_lse_backward));
  m.impl("contrastive_self_lse", TORCH_BOX(&gapkern::contrastive::contrastive_self_lse));
  m.impl("contrastive_self_lse_backward", TORCH_BOX(&gapkern::contrastive::contrastive_self_lse_backward));
}

// The softmax operators on the CPU: the reductions between blocks. Blocking is blocking.h, the arithmetic inside a
// block kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <array>
#include <limits>
#include <tuple>

#include "contrastive/blocking.h"

namespace gapkern::contrastive {
namespace {

// sum * 2^(k reference): a sum of exponentials about the largest logit seen so far.
struct Exponentials {
  double sum = 0;
  double reference = 0;
  bool empty = true;

  void add(double other_sum, double other_reference, double k) {
    if (other_sum == 0) return;
    if (empty || other_reference == reference) {
      sum += other_sum;
      reference = other_reference;
      empty = false;
      return;
    }
    const double above = k * (other_reference - reference);
    if (above > 0) {
      sum = sum * std::exp2(-above) + other_sum;
      reference = other_reference;
    } else {
      sum += other_sum * std::exp2(above);
    }
  }
};

// What the forward pass says of one side: the log-sum-exps, and for the backward pass their two parts apart, since
// their sum would round where |k t| is large.
struct Side {
  double* lse;
  double* reference;
  double* log2;
  void set(int64_t i, const Exponentials& e, double scale) const {
    reference[i] = e.reference;
    log2[i] = std::log2(e.sum);
    lse[i] = scale * e.reference + log2[i] / kLog2e;
  }
  // With the label's exponential, which no sum has yet. Relative to it, where it is the larger, log2 is the loss.
  void set(int64_t i, const Exponentials& e, double scale, double label_t) const {
    const double above = scale * kLog2e * (e.reference - label_t), others = std::log2(e.sum) + above;
    if (e.empty || others <= 0) {
      reference[i] = label_t;
      log2[i] = e.empty ? 0 : std::log1p(std::exp2(others)) * kLog2e;
    } else {
      reference[i] = e.reference;
      log2[i] = std::log2(e.sum + std::exp2(-above));
    }
    lse[i] = scale * reference[i] + log2[i] / kLog2e;
  }
};

// Whether every sum of a side is within the range that was tried.
template <class T>
bool all_hold(const Problem<T>& p, const double* reference, const double* log2, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!p.holds(reference[i], log2[i])) return false;
  return true;
}

template <class T>
void forward(const Problem<T>& p, const Side& row_side, const Side& column_side, double* label_t, double* positive,
             T* kept, int64_t kept_rows) {
  const Shape& s = p.engine.shape;
  const Buffer texts = p.pack_texts();
  const int64_t chunk = p.forward_chunk, blocks = divide_up(chunk, p.block);
  const Buffer images(round_up(chunk, s.mr) * p.panel_bytes());
  const int64_t padded = p.stripes * kStripe;
  std::vector<T> row_sum(p.stripes * chunk), row_largest(p.tracked() ? p.stripes * chunk : 0);
  std::vector<T> col_sum(blocks * padded), col_largest(p.tracked() ? blocks * padded : 0);
  std::vector<T> labels(p.n);
  std::vector<Exponentials> columns(p.m);
  const double k = p.k(), sign = k < 0 ? -1 : 1;

  for (int64_t row0 = 0; row0 < p.n; row0 += chunk) {
    const int64_t rows = std::min(chunk, p.n - row0), here = divide_up(rows, p.block);
    p.pack_images(row0, rows, images);
    parallel(p.stripes * here, [&](int64_t item) {
      const auto [t, b] = p.place(item, here);
      const int64_t i0 = b * p.block, col0 = t * p.stripe;
      ForwardBlock<T> f{p.block_at(images, texts, row0, rows, t, b)};
      f.exponents = p.exponents();
      f.row_sum = row_sum.data() + t * chunk + i0;
      f.column_sum = col_sum.data() + b * padded + t * kStripe;
      if (p.tracked()) {
        f.row_largest = row_largest.data() + t * chunk + i0;
        f.column_largest = col_largest.data() + b * padded + t * kStripe;
      }
      // Whole blocks are kept or none, so that the backward pass finds each block in one place.
      const bool keeps = row0 + i0 + f.rows <= kept_rows;
      if (keeps && p.coded())
        f.codes = p.kept_block(reinterpret_cast<int16_t*>(kept), row0 + i0, f.rows, col0);
      else if (keeps)
        f.keep = p.kept_block(kept, row0 + i0, f.rows, col0);
      f.unit = p.unit;
      f.positive = labels.data() + row0 + i0;
      p.engine.forward(f);
    });
    parallel(divide_up(rows, 64), [&](int64_t g) {
      for (int64_t i = g * 64; i < std::min(rows, g * 64 + 64); ++i) {
        Exponentials total;
        for (int64_t t = 0; t < p.stripes; ++t)
          total.add(row_sum[t * chunk + i], p.tracked() ? sign * row_largest[t * chunk + i] : p.reference(), k);
        label_t[row0 + i] = double(labels[row0 + i]);
        row_side.set(row0 + i, total, p.scale, label_t[row0 + i]);
        positive[row0 + i] = p.scale * label_t[row0 + i];
      }
    });
    parallel(p.stripes, [&](int64_t t) {
      for (int64_t b = 0; b < here; ++b)
        for (int64_t j = 0; j < p.stripe_columns(t); ++j) {
          const int64_t at = b * padded + t * kStripe + j;
          columns[t * p.stripe + j].add(col_sum[at], p.tracked() ? sign * col_largest[at] : p.reference(), k);
        }
    });
  }
  for (int64_t j = 0; j < p.m; ++j) {
    const int64_t row = j - p.label_offset;
    if (row >= 0 && row < p.n)
      column_side.set(j, columns[j], p.scale, label_t[row]);
    else
      column_side.set(j, columns[j], p.scale);
  }
}

// One side of the backward pass, and its weights and references for GradientBlock.
template <class T>
struct SideWeights {
  const double *gradient, *reference_of, *log2_of;
  std::vector<T> weight, reference, log2;
  // stats: references and log2 of the sums, [count] each.
  SideWeights(const Problem<T>& p, const double* gradient, const double* stats, int64_t count, double factor)
      : gradient(gradient),
        reference_of(stats),
        log2_of(stats + count),
        weight(count + kSlack, T(0)),
        reference(p.tracked() ? count + kSlack : 0, T(0)),
        log2(reference) {
    for (int64_t i = 0; i < count; ++i) {
      const double down = p.tracked() ? 0 : p.shift - p.k() * reference_of[i] - log2_of[i];
      weight[i] = T(factor * gradient[i] * std::exp2(down));
      if (!p.tracked()) continue;
      reference[i] = T(reference_of[i]);
      log2[i] = T(log2_of[i]);
    }
  }
  // The part of dS at a label that is this side's.
  double at_label(double k, int64_t i, double label_t) const {
    return gradient[i] * std::exp2(k * (label_t - reference_of[i]) - log2_of[i]);
  }
};

template <class T>
struct Gradients {
  T* images;  // null: not wanted
  T* texts;
  double* logit_scale;
};

template <class T>
void backward(const Problem<T>& p, const double* grad_row, const double* grad_col, const double* grad_positive,
              const double* row_stats, const double* col_stats, const T* kept, int64_t kept_rows, Gradients<T> out) {
  const Shape& s = p.engine.shape;
  const bool euclidean = p.similarity == Similarity::sqeuclidean;
  // An ordinary logit_scale goes into dS, whose products are then the gradients.
  const bool ordinary = std::abs(p.scale) >= 1e-4 && std::abs(p.scale) <= 1e4;
  const double factor = !euclidean && ordinary ? p.scale : 1;
  const SideWeights<T> row_side(p, grad_row, row_stats, p.n, factor), col_side(p, grad_col, col_stats, p.m, factor);
  std::vector<T> label_t(p.n), label_gradient(p.n);
  for (int64_t i = 0; i < p.n; ++i) {
    const double t = row_stats[2 * p.n + i];
    label_t[i] = T(t);
    label_gradient[i] = T(
        factor * (row_side.at_label(p.k(), i, t) + col_side.at_label(p.k(), i + p.label_offset, t) + grad_positive[i]));
  }
  const int64_t blocks = divide_up(p.chunk, p.block);
  Buffer texts;
  if (kept_rows < p.n) texts = p.pack_texts();
  const Buffer images(round_up(p.chunk, s.mr) * p.panel_bytes());
  LogitGradients<T> gradients(p, out.images, out.texts);

  std::vector<double> scale_sums(p.stripes * blocks), sums(p.stripes * blocks);
  std::vector<T> row_sum(euclidean ? p.stripes * p.chunk : 0), col_sum(euclidean ? blocks * p.stripes * kStripe : 0);
  std::vector<double> row_total(euclidean ? p.n : 0, 0.), col_total(euclidean ? p.m : 0, 0.);
  double scale_total = 0, total = 0;

  for (int64_t row0 = 0; row0 < p.n; row0 += p.chunk) {
    const int64_t rows = std::min(p.chunk, p.n - row0), here = divide_up(rows, p.block);
    if (row0 + rows > kept_rows) p.pack_images(row0, rows, images);
    parallel(p.stripes * here, [&](int64_t item) {
      const auto [t, b] = p.place(item, here);
      const int64_t i0 = b * p.block, col0 = t * p.stripe;
      GradientBlock<T> g{p.block_at(images, texts, row0, rows, t, b)};
      g.exponents = p.exponents();
      g.row_weight = row_side.weight.data() + row0 + i0;
      g.column_weight = col_side.weight.data() + col0;
      if (p.tracked()) {
        g.row_reference = row_side.reference.data() + row0 + i0;
        g.row_log2 = row_side.log2.data() + row0 + i0;
        g.column_reference = col_side.reference.data() + col0;
        g.column_log2 = col_side.log2.data() + col0;
      }
      g.label_t = label_t.data() + row0 + i0;
      g.label_gradient = label_gradient.data() + row0 + i0;
      const bool there = row0 + i0 + g.rows <= kept_rows;
      if (there && p.coded())
        g.codes = p.kept_block(reinterpret_cast<const int16_t*>(kept), row0 + i0, g.rows, col0);
      else if (there)
        g.kept = p.kept_block(kept, row0 + i0, g.rows, col0);
      g.unit = p.unit;
      g.out = gradients.output(t, i0, &scale_sums[item]);
      g.sum = &sums[item];
      if (euclidean) {
        g.row_sum = row_sum.data() + t * p.chunk + i0;
        g.column_sum = col_sum.data() + (b * p.stripes + t) * kStripe;
      }
      p.engine.gradient(g);
    });
    for (int64_t item = 0; item < p.stripes * here; ++item) {
      scale_total += scale_sums[item];
      total += sums[item];
    }
    for (int64_t t = 0; euclidean && t < p.stripes; ++t) {
      for (int64_t i = 0; i < rows; ++i) row_total[row0 + i] += row_sum[t * p.chunk + i];
      for (int64_t b = 0; b < here; ++b)
        for (int64_t j = 0; j < p.stripe_columns(t); ++j)
          col_total[t * p.stripe + j] += col_sum[(b * p.stripes + t) * kStripe + j];
    }
    gradients.multiply(row0, rows);
  }
  // What dS amounts to is known: softmaxes sum to 1. Sums about the labels' mean forgive what dS has too much of, as
  // where kept logits are coarse, and which the labels do not cancel.
  double exact = 0, mean_t = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    exact += grad_row[i] + grad_positive[i];
    mean_t += row_stats[2 * p.n + i] / double(p.n);
  }
  for (int64_t j = 0; j < p.m; ++j) exact += grad_col[j];
  *out.logit_scale = (scale_total - mean_t * (total - factor * exact)) / factor;
  gradients.finish(factor, row_total, col_total);
}

// Room for logits of another type, as where float64 solves a problem of float32, stays unused.
int64_t kept_rows_in(const Arguments& a, const Tensor& kept) { return kept.scalar_type() == a.type ? kept.size(0) : 0; }

template <class T>
void run_forward(const Arguments& a, const Tensor& images, const Tensor& texts, int64_t label_offset, Tensor& row_lse,
                 Tensor& col_lse, Tensor& positive, Tensor& row_stats, Tensor& col_stats, Tensor& kept) {
  const Tensor x = as_type(images, a.type), y = as_type(texts, a.type);
  Problem<T> p = problem_of<T>(a, x, y, label_offset);
  if (p.wants_double())
    return run_forward<double>(a.in_double(), images, texts, label_offset, row_lse, col_lse, positive, row_stats,
                               col_stats, kept);
  const auto side = [](Tensor& lse, Tensor& stats) -> Side {
    double* both = stats.mutable_data_ptr<double>();
    return {lse.mutable_data_ptr<double>(), both, both + stats.size(1)};
  };
  const Side rows = side(row_lse, row_stats), columns = side(col_lse, col_stats);
  double* const label_t = row_stats.mutable_data_ptr<double>() + 2 * p.n;
  const int64_t kept_rows = kept_rows_in(a, kept);
  T* const keep = kept_rows ? kept.template mutable_data_ptr<T>() : nullptr;
  forward<T>(p, rows, columns, label_t, positive.mutable_data_ptr<double>(), keep, kept_rows);
  if (p.range != Range::shifted) return;
  if (all_hold(p, rows.reference, rows.log2, p.n) && all_hold(p, columns.reference, columns.log2, p.m)) return;
  p.track();
  forward<T>(p, rows, columns, label_t, positive.mutable_data_ptr<double>(), keep, kept_rows);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_lse(const Tensor& images, const Tensor& texts,
                                                                           const Tensor& logit_scale,
                                                                           std::string similarity, int64_t label_offset,
                                                                           std::string precision, int64_t work_bytes) {
  const Arguments a = check(images, texts, logit_scale, similarity, precision);
  const int64_t n = images.size(0), m = texts.size(0);
  STD_TORCH_CHECK(label_offset >= 0 && label_offset + n <= m,
                  "label_offset: expected 0 <= label_offset <= M - N = ", m - n, ", got ", label_offset);
  const int64_t item = a.type == ScalarType::Double ? 8 : 4;
  Tensor row_lse = empty(images, {n}, ScalarType::Double), col_lse = empty(images, {m}, ScalarType::Double);
  Tensor positive = empty(images, {n}, ScalarType::Double);
  Tensor row_stats = empty(images, {3, n}, ScalarType::Double), col_stats = empty(images, {2, m}, ScalarType::Double);
  Tensor kept = reused(images, std::min(n, std::max<int64_t>(work_bytes, 0) / (m * item)), m, a.type);
  if (a.type == ScalarType::Double)
    run_forward<double>(a, images, texts, label_offset, row_lse, col_lse, positive, row_stats, col_stats, kept);
  else
    run_forward<float>(a, images, texts, label_offset, row_lse, col_lse, positive, row_stats, col_stats, kept);
  return {row_lse, col_lse, positive, row_stats, col_stats, kept};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Arguments& a, const Tensor& grad_row, const Tensor& grad_col,
                                                const Tensor& grad_positive, const Tensor& images, const Tensor& texts,
                                                const Tensor& logit_scale, const Tensor& row_stats,
                                                const Tensor& col_stats, const Tensor& kept, int64_t label_offset,
                                                const std::vector<bool>& needs) {
  const Tensor x = as_type(images, a.type), y = as_type(texts, a.type);
  Problem<T> p = problem_of<T>(a, x, y, label_offset);
  if (p.wants_double())
    return run_backward<double>(a.in_double(), grad_row, grad_col, grad_positive, images, texts, logit_scale, row_stats,
                                col_stats, kept, label_offset, needs);
  Tensor dx = gradient_of(x, needs[0], a.type), dy = gradient_of(y, needs[1], a.type);
  double dscale = 0;
  const Tensor gr = as_type(grad_row, ScalarType::Double), gc = as_type(grad_col, ScalarType::Double);
  const Tensor gp = as_type(grad_positive, ScalarType::Double);
  const Tensor rs = as_type(row_stats, ScalarType::Double), cs = as_type(col_stats, ScalarType::Double);
  const double *of_rows = rs.const_data_ptr<double>(), *of_columns = cs.const_data_ptr<double>();
  if (p.range == Range::shifted &&
      !(all_hold(p, of_rows, of_rows + p.n, p.n) && all_hold(p, of_columns, of_columns + p.m, p.m)))
    p.track();
  const Tensor saved = torch::stable::contiguous(kept);
  const int64_t kept_rows = kept_rows_in(a, kept);
  backward<T>(p, gr.const_data_ptr<double>(), gc.const_data_ptr<double>(), gp.const_data_ptr<double>(), of_rows,
              of_columns, kept_rows ? saved.template const_data_ptr<T>() : nullptr, kept_rows,
              {needs[0] ? dx.template mutable_data_ptr<T>() : nullptr,
               needs[1] ? dy.template mutable_data_ptr<T>() : nullptr, &dscale});
  Tensor ds = empty(x, needs[2] ? std::vector<int64_t>{1} : std::vector<int64_t>{0}, ScalarType::Double);
  if (needs[2]) *ds.mutable_data_ptr<double>() = dscale;
  const auto cast = [](const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, type);
  };
  return {cast(dx, images.scalar_type()), cast(dy, texts.scalar_type()), cast(ds, logit_scale.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_lse_backward(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& grad_positive, const Tensor& images,
    const Tensor& texts, const Tensor& logit_scale, const Tensor& row_stats, const Tensor& col_stats,
    const Tensor& kept, std::string similarity, int64_t label_offset, std::string precision, std::vector<bool> needs) {
  const Arguments a = check(images, texts, logit_scale, similarity, precision);
  STD_TORCH_CHECK(needs.size() == 3, "needs: expected three flags");
  STD_TORCH_CHECK(grad_row.numel() == images.size(0) && grad_positive.numel() == images.size(0) &&
                      grad_col.numel() == texts.size(0) && row_stats.numel() == 3 * images.size(0) &&
                      col_stats.numel() == 2 * texts.size(0),
                  "contrastive_lse_backward: gradients do not match images and texts");
  if (a.type == ScalarType::Double)
    return run_backward<double>(a, grad_row, grad_col, grad_positive, images, texts, logit_scale, row_stats, col_stats,
                                kept, label_offset, needs);
  return run_backward<float>(a, grad_row, grad_col, grad_positive, images, texts, logit_scale, row_stats, col_stats,
                             kept, label_offset, needs);
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("contrastive_lse", TORCH_BOX(&gapkern::contrastive::contrastive_lse));
  m.impl("contrastive_lse_backward", TORCH_BOX(&gapkern::contrastive::contrastive_lse_backward));
}

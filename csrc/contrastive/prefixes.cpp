// The softmax operators of prefixes on the CPU: a problem for each segment of the embeddings, whose passes go together.
#include "contrastive/prefixes.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <tuple>

#include "contrastive/backward.h"
#include "contrastive/forward.h"

namespace gapkern::contrastive {
namespace {

constexpr int64_t kPadding = 64;  // whole vectors are read

struct PrefixArguments : Arguments {
  std::vector<int64_t> ends;           // of the segments; the last is D
  Tensor row_factors, column_factors;  // [P, N], [P, M] float64

  int64_t count() const { return int64_t(ends.size()); }
  int64_t begin(int64_t k) const { return k == 0 ? 0 : ends[k - 1]; }
  PrefixArguments in_double() const {
    PrefixArguments a = *this;
    static_cast<Arguments&>(a) = Arguments::in_double();
    return a;
  }
};

PrefixArguments check_prefixes(const Tensor& images, const Tensor& texts, const Tensor& logit_scale,
                               const Tensor& row_factors, const Tensor& col_factors, const std::vector<int64_t>& dims,
                               const std::string& precision) {
  PrefixArguments a{check(images, texts, logit_scale, "dot", 0, precision), dims};
  STD_TORCH_CHECK(a.n() <= a.m(), "texts: expected at least N = ", a.n(), " rows, got ", a.m());
  for (int64_t k = 0; k < a.count(); ++k)
    STD_TORCH_CHECK(dims[k] > a.begin(k), "dims: expected increasing widths, got ", dims[k], " after ", a.begin(k));
  STD_TORCH_CHECK(a.count() > 0 && dims.back() == images.size(1), "dims: expected the last to be D = ", images.size(1));
  STD_TORCH_CHECK(row_factors.numel() == a.count() * a.n() && col_factors.numel() == a.count() * a.m(),
                  "row_factors and col_factors: expected one for each prefix and row, (", a.count(), ", N) and (",
                  a.count(), ", M)");
  a.row_factors = as_type(row_factors, ScalarType::Double);
  a.column_factors = as_type(col_factors, ScalarType::Double);
  return a;
}

// Columns [begin, end) of `from` to those of `to`, of rows of `from_width` and of `to_width`.
template <class T>
void copy_columns(const T* from, int64_t from_width, T* to, int64_t to_width, int64_t rows, int64_t count) {
  parallel(divide_up(rows, 64), [&](int64_t g) {
    for (int64_t i = g * 64; i < std::min(rows, g * 64 + 64); ++i)
      std::memcpy(to + i * to_width, from + i * from_width, size_t(count) * sizeof(T));
  });
}

// One side's factors of t in the type of the arithmetic.
template <class T>
class Factors {
 public:
  Factors(const double* values, int64_t count) : exact_(values), values_(count + kPadding, T(0)) {
    for (int64_t i = 0; i < count; ++i) values_[i] = T(values[i]);
  }
  const T* at(int64_t i) const { return values_.data() + i; }
  double exact(int64_t i) const { return exact_[i]; }

 private:
  const double* const exact_;
  std::vector<T> values_;
};

// Raises to the larger; NaN stays.
void raise(double& to, double value) {
  if (!(value <= to)) to = value;
}

// The segments' problems, each with the range of the logits of the prefix that it ends.
template <class T>
class Segments {
 public:
  explicit Segments(const PrefixArguments& a) : kernels_(kernels_for(a)) {
    const Tensor images = as_type(a.images, a.type), texts = as_type(a.texts, a.type);
    std::vector<double> row_norms(a.n(), 0.), column_norms(a.m(), 0.);
    for (int64_t k = 0; k < a.count(); ++k) {
      Arguments segment = a;
      segment.images = part(images, a.begin(k), a.ends[k], a.type);
      segment.texts = part(texts, a.begin(k), a.ends[k], a.type);
      problems_.push_back(std::make_unique<Problem<T>>(segment, kChunkBytes / a.count()));
      rows_.emplace_back(a.row_factors.const_data_ptr<double>() + k * a.n(), a.n());
      columns_.emplace_back(a.column_factors.const_data_ptr<double>() + k * a.m(), a.m());
      Problem<T>& p = *problems_.back();
      p.bound_products(largest(p.x, p, row_norms, rows_.back()) * largest(p.y, p, column_norms, columns_.back()));
      forward_chunk_ = k == 0 ? p.blocking.forward_chunk : std::min(forward_chunk_, p.blocking.forward_chunk);
    }
  }

  int count() const { return int(problems_.size()); }
  Problem<T>& operator[](int64_t k) const { return *problems_[k]; }
  const Factors<T>& rows(int64_t k) const { return rows_[k]; }
  const Factors<T>& columns(int64_t k) const { return columns_[k]; }
  const PrefixKernels<T>& kernels() const { return kernels_; }
  // Stripes, blocks and the backward pass's chunks are the same of all.
  const Blocking& blocking() const { return problems_[0]->blocking; }
  int64_t forward_chunk() const { return forward_chunk_; }
  bool wants_double() const {
    return std::any_of(problems_.begin(), problems_.end(), [](const auto& p) { return p->range.wants_double(); });
  }

  // The block with its factors.
  template <class Block>
  void scale(Block& b, int64_t k, const Chunk& chunk, const BlockIndex& at) const {
    b.row_factor = rows_[k].at(chunk.row0 + at.block * blocking().block);
    b.column_factor = columns_[k].at(at.stripe * blocking().stripe);
  }

 private:
  static PrefixKernels<T> kernels_for(const PrefixArguments& a) {
    const KernelSet<PrefixKernels>& set = GAPKERN_FOR_ACTIVE_ISA(prefix_kernels);
    if constexpr (sizeof(T) == 8)
      return set.f64;
    else
      return a.bf16_products ? set.bf16 : set.f32;
  }

  static Tensor part(const Tensor& side, int64_t begin, int64_t end, ScalarType type) {
    const int64_t rows = side.size(0), width = end - begin;
    Tensor out = cached(side, rows, width, type);
    copy_columns(side.template const_data_ptr<T>() + begin, side.size(1), out.template mutable_data_ptr<T>(), width,
                 rows, width);
    return out;
  }

  // Adds the segment's squared norms to those of the prefix before; the largest norm times its factor.
  static double largest(const T* side, const Problem<T>& p, std::vector<double>& norms, const Factors<T>& factors) {
    parallel(divide_up(int64_t(norms.size()), 64), [&](int64_t g) {
      for (int64_t i = g * 64; i < std::min(int64_t(norms.size()), g * 64 + 64); ++i)
        norms[i] += p.engine.squared_norm(side + i * p.d, nullptr, p.d);
    });
    double found = 0;
    for (size_t i = 0; i < norms.size(); ++i) raise(found, std::sqrt(norms[i]) * std::abs(factors.exact(int64_t(i))));
    return found;
  }

  const PrefixKernels<T> kernels_;
  std::vector<std::unique_ptr<Problem<T>>> problems_;
  std::vector<Factors<T>> rows_, columns_;
  int64_t forward_chunk_ = 0;
};

struct Outputs {
  Tensor row_lse, column_lse, label;     // [P, N], [P, M], [P, N] float64
  Tensor row_stats, column_stats, kept;  // [P, 3, N], [P, 2, M] float64, [P K, M]
};

// Of prefix k.
template <class T>
Softmax<T> state_of(const Problem<std::remove_const_t<T>>& p, int64_t k, int64_t prefixes,
                    typename Softmax<T>::Real* row_stats, typename Softmax<T>::Real* column_stats, T* kept,
                    int64_t kept_rows) {
  const int64_t rows = kept_rows / prefixes;
  return softmax<T>(p, row_stats + k * 3 * p.n, column_stats + k * 2 * p.m, rows == 0 ? nullptr : kept + k * rows * p.m,
                    rows);
}

template <class T>
void run(const Segments<T>& segments, const std::vector<Softmax<T>>& states, const std::vector<LogSumExps>& values) {
  std::vector<std::unique_ptr<ForwardPass<T>>> passes;
  for (int k = 0; k < segments.count(); ++k)
    passes.push_back(std::make_unique<ForwardPass<T>>(segments[k], states[k], values[k]));
  for (auto& pass : passes) pass->begin();
  segments.blocking().for_each_chunk(segments.forward_chunk(), [&](const Chunk& chunk) {
    for (auto& pass : passes) pass->pack(chunk);
    segments.blocking().for_each_block(chunk, [&](const BlockIndex& at, int64_t) {
      std::vector<PrefixForwardBlock<T>> blocks;
      for (int k = 0; k < segments.count(); ++k)
        segments.scale(blocks.emplace_back(PrefixForwardBlock<T>{passes[k]->block(chunk, at)}), k, chunk, at);
      segments.kernels().prefixes_forward(blocks.data(), segments.count());
    });
    for (auto& pass : passes) pass->finish(chunk);
  });
  for (auto& pass : passes) pass->end();
}

template <class T>
void forward(const PrefixArguments& a, Outputs& out) {
  const Segments<T> segments(a);
  if (segments.wants_double()) return forward<double>(a.in_double(), out);
  const int64_t n = a.n(), m = a.m(), kept_rows = kept_rows_in(a, out.kept);
  std::vector<Softmax<T>> states;
  std::vector<LogSumExps> values;
  for (int64_t k = 0; k < a.count(); ++k) {
    states.push_back(state_of<T>(segments[k], k, a.count(), out.row_stats.mutable_data_ptr<double>(),
                                 out.column_stats.mutable_data_ptr<double>(),
                                 kept_rows ? out.kept.template mutable_data_ptr<T>() : nullptr, kept_rows));
    values.push_back({.rows = out.row_lse.mutable_data_ptr<double>() + k * n,
                      .columns = out.column_lse.mutable_data_ptr<double>() + k * m,
                      .label = out.label.mutable_data_ptr<double>() + k * n});
  }
  run(segments, states, values);
  bool again = false;
  for (int64_t k = 0; k < a.count(); ++k) {
    if (states[k].within(segments[k].range)) continue;
    segments[k].range.track();
    again = true;
  }
  if (again) run(segments, states, values);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_prefix_lse(
    const Tensor& images, const Tensor& texts, const Tensor& logit_scale, const Tensor& row_factors,
    const Tensor& col_factors, std::vector<int64_t> dims, std::string precision, int64_t work_bytes) {
  const PrefixArguments a = check_prefixes(images, texts, logit_scale, row_factors, col_factors, dims, precision);
  const int64_t n = a.n(), m = a.m(), count = a.count(), item = a.type == ScalarType::Double ? 8 : 4;
  const int64_t kept_rows = std::min(n, std::max<int64_t>(work_bytes, 0) / (count * m * item));
  Outputs out{.row_lse = empty(images, {count, n}, ScalarType::Double),
              .column_lse = empty(images, {count, m}, ScalarType::Double),
              .label = empty(images, {count, n}, ScalarType::Double),
              .row_stats = empty(images, {count, 3, n}, ScalarType::Double),
              .column_stats = empty(images, {count, 2, m}, ScalarType::Double),
              .kept = cached(images, count * kept_rows, m, a.type)};
  if (a.type == ScalarType::Double)
    forward<double>(a, out);
  else
    forward<float>(a, out);
  return {out.row_lse, out.column_lse, out.label, out.row_stats, out.column_stats, out.kept};
}

// What the backward operator takes beside `PrefixArguments`, contiguous and, but for kept, float64.
struct Saved {
  Tensor grad_row, grad_column, grad_label;  // [P, N], [P, M], [P, N]
  Tensor row_stats, column_stats, kept;
};

struct Gradients {
  Tensor images, texts, logit_scale, row_factors, column_factors;
};

// dL / df = dS t s / f, summed over the row; the same of columns.
template <class T>
void factor_gradient(const Factors<T>& factors, const std::vector<double>& totals, double scale, double* out) {
  for (size_t i = 0; i < totals.size(); ++i) out[i] = scale * totals[i] / factors.exact(int64_t(i));
}

template <class T>
Gradients backward(const PrefixArguments& a, const Saved& saved, const std::vector<bool>& needs) {
  const Segments<T> segments(a);
  if (segments.wants_double()) return backward<double>(a.in_double(), saved, needs);
  const int64_t n = a.n(), m = a.m(), d = a.ends.back(), kept_rows = kept_rows_in(a, saved.kept);
  std::vector<Softmax<const T>> states;
  std::vector<OutputGradients> in;
  std::vector<InputGradients<T>> out;
  std::vector<Tensor> images, texts;
  std::vector<double> scales(a.count(), 0.);
  for (int64_t k = 0; k < a.count(); ++k) {
    Problem<T>& p = segments[k];
    states.push_back(state_of<const T>(p, k, a.count(), saved.row_stats.const_data_ptr<double>(),
                                       saved.column_stats.const_data_ptr<double>(),
                                       kept_rows ? saved.kept.template const_data_ptr<T>() : nullptr, kept_rows));
    if (!states[k].within(p.range)) p.range.track();
    in.push_back({.rows = saved.grad_row.const_data_ptr<double>() + k * n,
                  .columns = saved.grad_column.const_data_ptr<double>() + k * m,
                  .label = saved.grad_label.const_data_ptr<double>() + k * n});
    images.push_back(gradient_of(p.images, needs[0], a.type));
    texts.push_back(gradient_of(p.texts, needs[1], a.type));
    out.push_back({.images = needs[0] ? images[k].template mutable_data_ptr<T>() : nullptr,
                   .texts = needs[1] ? texts[k].template mutable_data_ptr<T>() : nullptr,
                   .logit_scale = &scales[k]});
  }
  std::vector<std::unique_ptr<BackwardPass<T>>> passes;
  for (int k = 0; k < segments.count(); ++k)
    passes.push_back(std::make_unique<BackwardPass<T>>(segments[k], states[k], in[k], out[k], true));
  for (auto& pass : passes) pass->begin();
  const Blocking& cut = segments.blocking();
  const int64_t tiles = a.count() * segments[0].engine.shape.mr * kStripe * int64_t(sizeof(T));
  cut.for_each_chunk(cut.chunk, [&](const Chunk& chunk) {
    for (auto& pass : passes) pass->pack(chunk);
    cut.for_each_block(chunk, [&](const BlockIndex& at, int64_t item) {
      std::vector<PrefixGradientBlock<T>> blocks;
      for (int k = 0; k < segments.count(); ++k)
        segments.scale(blocks.emplace_back(PrefixGradientBlock<T>{passes[k]->block(chunk, at, item)}), k, chunk, at);
      const Scratch scratch(tiles);
      segments.kernels().prefixes_gradient(blocks.data(), segments.count(), reinterpret_cast<T*>(scratch.at()));
    });
    for (auto& pass : passes) pass->finish(chunk);
  });
  Gradients all{.images = gradient_of(a.images, needs[0], a.type),
                .texts = gradient_of(a.texts, needs[1], a.type),
                .logit_scale = empty(a.images, {needs[2] ? 1 : 0}, ScalarType::Double),
                .row_factors = gradient_of(a.row_factors, needs[3], ScalarType::Double),
                .column_factors = gradient_of(a.column_factors, needs[4], ScalarType::Double)};
  double scale = 0;
  for (int64_t k = 0; k < a.count(); ++k) {
    BackwardPass<T>& pass = *passes[k];
    pass.end();
    scale += scales[k];
    const int64_t width = segments[k].d, begin = a.begin(k);
    if (needs[0]) copy_columns(out[k].images, width, all.images.template mutable_data_ptr<T>() + begin, d, n, width);
    if (needs[1]) copy_columns(out[k].texts, width, all.texts.template mutable_data_ptr<T>() + begin, d, m, width);
    const double by_t = a.scale / pass.factor();
    if (needs[3])
      factor_gradient(segments.rows(k), pass.row_totals(), by_t, all.row_factors.mutable_data_ptr<double>() + k * n);
    if (needs[4])
      factor_gradient(segments.columns(k), pass.column_totals(), by_t,
                      all.column_factors.mutable_data_ptr<double>() + k * m);
  }
  if (needs[2]) *all.logit_scale.mutable_data_ptr<double>() = scale;
  return all;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_prefix_lse_backward(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& grad_positive, const Tensor& images,
    const Tensor& texts, const Tensor& logit_scale, const Tensor& row_factors, const Tensor& col_factors,
    const Tensor& row_stats, const Tensor& col_stats, const Tensor& kept, std::vector<int64_t> dims,
    std::string precision, std::vector<bool> needs) {
  const PrefixArguments a = check_prefixes(images, texts, logit_scale, row_factors, col_factors, dims, precision);
  const int64_t rows = a.count() * a.n(), columns = a.count() * a.m();
  STD_TORCH_CHECK(needs.size() == 5, "needs: expected five flags");
  STD_TORCH_CHECK(grad_row.numel() == rows && grad_positive.numel() == rows && grad_col.numel() == columns &&
                      row_stats.numel() == 3 * rows && col_stats.numel() == 2 * columns,
                  "contrastive_prefix_lse_backward: gradients do not match images and texts");
  const Saved saved{.grad_row = as_type(grad_row, ScalarType::Double),
                    .grad_column = as_type(grad_col, ScalarType::Double),
                    .grad_label = as_type(grad_positive, ScalarType::Double),
                    .row_stats = as_type(row_stats, ScalarType::Double),
                    .column_stats = as_type(col_stats, ScalarType::Double),
                    .kept = torch::stable::contiguous(kept)};
  const Gradients found =
      a.type == ScalarType::Double ? backward<double>(a, saved, needs) : backward<float>(a, saved, needs);
  return {as_type(found.images, images.scalar_type()), as_type(found.texts, texts.scalar_type()),
          as_type(found.logit_scale, logit_scale.scalar_type()), found.row_factors, found.column_factors};
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("contrastive_prefix_lse", TORCH_BOX(&gapkern::contrastive::contrastive_prefix_lse));
  m.impl("contrastive_prefix_lse_backward", TORCH_BOX(&gapkern::contrastive::contrastive_prefix_lse_backward));
}

// The contrastive operators on the CPU: blocking, threads and the reductions between blocks. The arithmetic inside a
// block is kernels.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "contrastive/contrastive.h"
#include "contrastive/kernels.h"

namespace gapkern::contrastive {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kLog2e = 1.4426950408889634074;
// Without a reference, 2^(k t) for |k t| <= 80 leaves room for sums over 2^30 terms and for the weights of the backward
// pass, far from both ends of float32.
constexpr double kSafeExponent = 80;
constexpr int64_t kSlack = 64;                      // vector reads and writes behind the last column
constexpr int64_t kChunkBytes = int64_t(32) << 20;  // logit gradients at hand, at most

const EngineSet& engine_set() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
      return avx512bf16::engines();
    case Isa::avx512:
      return avx512::engines();
    case Isa::avx2:
      return avx2::engines();
#endif
    default:
      return portable::engines();
  }
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

template <class F>
void parallel(int64_t count, const F& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Uninitialised, aligned to a cache line.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64))))) {
    STD_TORCH_CHECK(memory_ != nullptr, "contrastive_lse: out of memory, wanted ", bytes, " bytes of work space");
  }
  template <class T = char>
  T* at(int64_t bytes = 0) const {
    return reinterpret_cast<T*>(memory_.get() + bytes);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
};

// A value with a power-of-two reference: sum * 2^max.
struct Scaled {
  double sum = 0;
  double max = -std::numeric_limits<double>::infinity();
  void add(double other_sum, double other_max) {
    if (other_max == max) {
      sum += other_sum;
    } else if (other_max > max) {
      sum = sum * std::exp2(max - other_max) + other_sum;
      max = other_max;
    } else {
      sum += other_sum * std::exp2(other_max - max);
    }
  }
  double log2() const { return std::log2(sum) + max; }
};

// One N x M problem: its blocking, its packed operands and its logits.
template <class T>
class Problem {
 public:
  Problem(const Engine<T>& engine, const T* x, const T* y, int64_t n, int64_t m, int64_t d, double scale,
          Similarity similarity, int64_t label_offset)
      : engine(engine), x(x), y(y), n(n), m(m), d(d), scale(scale), similarity(similarity), label_offset(label_offset) {
    const Shape& s = engine.shape;
    stripes = divide_up(m, kStripe);
    stripe = round_up(divide_up(m, stripes), s.nr);
    stripes = divide_up(m, stripe);
    block = s.mr >= 12 ? s.mr * 8 : s.mr * 16;
    words = divide_up(d, s.group);
    const int64_t fitting = kChunkBytes / (stripes * (kStripe + 16) * 4) / block;
    chunk = std::min(round_up(n, s.mr * 2), block * std::clamp<int64_t>(fitting, 1, 4));
    measure();
  }

  Logits<T> logits(int64_t row, int64_t col) const {
    const bool terms = similarity == Similarity::sqeuclidean;
    return {T(scale * kLog2e), terms ? T(2) : T(1), terms ? row_terms.data() + row : nullptr,
            terms ? col_terms.data() + col : nullptr};
  }

  const T* centre_or_null() const { return similarity == Similarity::sqeuclidean ? centre.data() : nullptr; }

  Buffer pack_texts() const {
    const Shape& s = engine.shape;
    const int64_t panels = divide_up(m, s.nr);
    Buffer packed(panels * s.nr * words * s.word);
    parallel(panels, [&](int64_t p) {
      engine.pack_panel(y + p * s.nr * d, m - p * s.nr, s.nr, d, centre_or_null(),
                        packed.at(p * s.nr * words * s.word));
    });
    return packed;
  }

  void pack_images(int64_t row0, int64_t rows, const Buffer& packed) const {
    const Shape& s = engine.shape;
    parallel(divide_up(rows, s.mr), [&](int64_t p) {
      engine.pack_panel(x + (row0 + p * s.mr) * d, rows - p * s.mr, s.mr, d, centre_or_null(),
                        packed.at(p * s.mr * words * s.word));
    });
  }

  // The rows of `side` as right-hand sides of a product; depth steps are rows.
  void pack_slices(const T* side, int64_t rows, const Buffer& packed) const {
    const Shape& s = engine.shape;
    const int64_t bytes = slice_bytes(rows);
    parallel(divide_up(d, s.nr),
             [&](int64_t i) { engine.pack_slice(side, rows, d, i, centre_or_null(), packed.at(i * bytes)); });
  }
  int64_t slice_bytes(int64_t rows) const {
    return divide_up(rows, engine.shape.group) * engine.shape.nr * engine.shape.word;
  }
  int64_t slices_bytes(int64_t rows) const { return divide_up(d, engine.shape.nr) * slice_bytes(rows); }
  int64_t panel_bytes() const { return words * engine.shape.word; }  // per row or column of a panel
  int64_t stripe_columns(int64_t t) const { return std::min(stripe, m - t * stripe); }

  const Engine<T>& engine;
  const T *x, *y;
  int64_t n, m, d;
  double scale;
  Similarity similarity;
  int64_t label_offset;
  int64_t stripe, stripes, block, chunk, words;
  bool tracked = false;
  std::vector<T> row_terms, col_terms, centre;

 private:
  // Squared Euclidean distances are taken about the texts' mean, which leaves them unchanged and keeps
  // ||x||^2 - 2 <x, y> + ||y||^2 from cancelling; then the largest |k t| decides whether exponentials need a reference.
  void measure() {
    if (similarity == Similarity::sqeuclidean) {
      centre.assign(d, T(0));
      std::vector<double> total(d, 0.);
      for (int64_t j = 0; j < m; ++j)
        for (int64_t c = 0; c < d; ++c) total[c] += y[j * d + c];
      for (int64_t c = 0; c < d; ++c) centre[c] = T(total[c] / double(m));
    }
    const double largest_x = norms(x, n, row_terms), largest_y = norms(y, m, col_terms);
    const double reach = std::sqrt(largest_x) + std::sqrt(largest_y);
    const double t = similarity == Similarity::dot ? std::sqrt(largest_x * largest_y) : reach * reach;
    tracked = !(std::abs(scale) * kLog2e * t <= kSafeExponent);
  }

  double norms(const T* side, int64_t rows, std::vector<T>& terms) const {
    terms.assign(rows + kSlack, T(0));
    parallel(divide_up(rows, 64), [&](int64_t b) {
      for (int64_t i = b * 64; i < std::min(rows, b * 64 + 64); ++i)
        terms[i] = T(-engine.squared_norm(side + i * d, centre_or_null(), d));
    });
    double lowest = 0;
    for (int64_t i = 0; i < rows; ++i)
      if (!(terms[i] >= lowest)) lowest = terms[i];
    return -lowest;
  }
};

template <class T>
void forward(const Problem<T>& p, double* row_lse, double* col_lse, double* positive, T* kept, int64_t kept_rows) {
  const Shape& s = p.engine.shape;
  const Buffer texts = p.pack_texts();
  const int64_t blocks = divide_up(p.chunk, p.block);
  const Buffer images(round_up(p.chunk, s.mr) * p.panel_bytes());
  const int64_t padded = p.stripes * kStripe;
  std::vector<T> row_sum(p.stripes * p.chunk), row_max(p.tracked ? p.stripes * p.chunk : 0);
  std::vector<T> col_sum(blocks * padded), col_max(p.tracked ? blocks * padded : 0);
  std::vector<T> label_t(p.n, std::numeric_limits<T>::quiet_NaN());
  std::vector<Scaled> columns(p.m);
  if (!p.tracked)
    for (Scaled& c : columns) c.max = 0;

  for (int64_t row0 = 0; row0 < p.n; row0 += p.chunk) {
    const int64_t rows = std::min(p.chunk, p.n - row0), here = divide_up(rows, p.block);
    p.pack_images(row0, rows, images);
    parallel(p.stripes * here, [&](int64_t item) {
      const int64_t t = item / here, b = item % here, i0 = b * p.block, col0 = t * p.stripe;
      ForwardBlock<T> f{};
      f.images = images.at(i0 * p.panel_bytes());
      f.texts = texts.at(col0 * p.panel_bytes());
      f.rows = std::min(p.block, rows - i0);
      f.cols = p.stripe_columns(t);
      f.depth = p.d;
      f.logits = p.logits(row0 + i0, col0);
      f.tracked = p.tracked;
      f.row_sum = row_sum.data() + t * p.chunk + i0;
      f.column_sum = col_sum.data() + b * padded + t * kStripe;
      if (p.tracked) {
        f.row_max = row_max.data() + t * p.chunk + i0;
        f.column_max = col_max.data() + b * padded + t * kStripe;
      }
      // Whole blocks are kept or none, so that the backward pass finds each block in one place.
      if (row0 + i0 + f.rows <= kept_rows) {
        f.keep = kept + (row0 + i0) * p.m + col0;
        f.keep_stride = p.m;
      }
      f.label = row0 + i0 + p.label_offset - col0;
      f.positive = label_t.data() + row0 + i0;
      p.engine.forward(f);
    });
    parallel(divide_up(rows, 64), [&](int64_t g) {
      for (int64_t i = g * 64; i < std::min(rows, g * 64 + 64); ++i) {
        Scaled total;
        if (!p.tracked) total.max = 0;
        for (int64_t t = 0; t < p.stripes; ++t)
          total.add(row_sum[t * p.chunk + i], p.tracked ? row_max[t * p.chunk + i] : T(0));
        row_lse[row0 + i] = total.log2() / kLog2e;
        positive[row0 + i] = p.scale * double(label_t[row0 + i]);
      }
    });
    parallel(p.stripes, [&](int64_t t) {
      for (int64_t b = 0; b < here; ++b)
        for (int64_t j = 0; j < p.stripe_columns(t); ++j) {
          const int64_t at = b * padded + t * kStripe + j;
          columns[t * p.stripe + j].add(col_sum[at], p.tracked ? col_max[at] : T(0));
        }
    });
  }
  for (int64_t j = 0; j < p.m; ++j) col_lse[j] = columns[j].log2() / kLog2e;
}

// The weights and references of one side for GradientBlock.
template <class T>
struct SideWeights {
  std::vector<T> weight, lse;
  SideWeights(const Problem<T>& p, const double* gradient, const double* lse_nat, int64_t count)
      : weight(count + kSlack, T(0)), lse(p.tracked ? count + kSlack : 0, T(0)) {
    for (int64_t i = 0; i < count; ++i) {
      const double log2 = lse_nat[i] * kLog2e;
      weight[i] = T(p.tracked ? gradient[i] : gradient[i] * std::exp2(-log2));
      if (p.tracked) lse[i] = T(log2);
    }
  }
};

template <class T>
struct Gradients {
  T* images;  // null: not wanted; zeros on entry
  T* texts;
  double* logit_scale;
};

template <class T>
void backward(const Problem<T>& p, const double* grad_row, const double* grad_col, const double* grad_positive,
              const double* row_lse, const double* col_lse, const T* kept, int64_t kept_rows, Gradients<T> out) {
  const Shape& s = p.engine.shape;
  const SideWeights<T> row_side(p, grad_row, row_lse, p.n), col_side(p, grad_col, col_lse, p.m);
  std::vector<T> label_weight(grad_positive, grad_positive + p.n);
  const bool euclidean = p.similarity == Similarity::sqeuclidean, products = out.images || out.texts;
  const int64_t blocks = divide_up(p.chunk, p.block), along = row_stride(s.group), down = column_stride(s.group);
  const int64_t rows_words = p.chunk * along, columns_words = p.chunk / s.group * down;

  Buffer texts, text_slices, images, image_slices, by_rows, by_columns;
  if (kept_rows < p.n) texts = p.pack_texts();
  images = Buffer(round_up(p.chunk, s.mr) * p.panel_bytes());
  if (out.images) {
    text_slices = Buffer(p.slices_bytes(p.m));
    p.pack_slices(p.y, p.m, text_slices);
  }
  if (out.texts) image_slices = Buffer(p.slices_bytes(p.chunk));
  // The register tile reads up to mr rows (or columns) past the last; what it finds there is not used.
  if (products) by_rows = Buffer((p.stripes * rows_words + s.mr * along) * s.word);
  if (products && s.group > 1) by_columns = Buffer((p.stripes * columns_words + s.mr) * s.word);

  std::vector<double> scale_sums(p.stripes * blocks);
  std::vector<T> row_sum(euclidean ? p.stripes * p.chunk : 0), col_sum(euclidean ? blocks * p.stripes * kStripe : 0);
  std::vector<double> row_total(euclidean ? p.n : 0, 0.), col_total(euclidean ? p.m : 0, 0.);
  double scale_total = 0;

  for (int64_t row0 = 0; row0 < p.n; row0 += p.chunk) {
    const int64_t rows = std::min(p.chunk, p.n - row0), here = divide_up(rows, p.block);
    if (row0 + rows > kept_rows) p.pack_images(row0, rows, images);
    if (out.texts) p.pack_slices(p.x + row0 * p.d, rows, image_slices);

    parallel(p.stripes * here, [&](int64_t item) {
      const int64_t t = item / here, b = item % here, i0 = b * p.block, col0 = t * p.stripe;
      GradientBlock<T> g{};
      g.images = images.at(i0 * p.panel_bytes());
      g.texts = texts.at(col0 * p.panel_bytes());
      g.rows = std::min(p.block, rows - i0);
      g.cols = p.stripe_columns(t);
      g.depth = p.d;
      g.logits = p.logits(row0 + i0, col0);
      g.tracked = p.tracked;
      g.row_weight = row_side.weight.data() + row0 + i0;
      g.column_weight = col_side.weight.data() + col0;
      if (p.tracked) {
        g.row_lse = row_side.lse.data() + row0 + i0;
        g.column_lse = col_side.lse.data() + col0;
      }
      g.positive = label_weight.data() + row0 + i0;
      g.label = row0 + i0 + p.label_offset - col0;
      if (row0 + i0 + g.rows <= kept_rows) {
        g.kept = kept + (row0 + i0) * p.m + col0;
        g.kept_stride = p.m;
      }
      if (products) {
        g.by_rows = by_rows.at((t * rows_words + i0 * along) * s.word);
        if (s.group > 1) g.by_columns = by_columns.at((t * columns_words + i0 / s.group * down) * s.word);
      }
      g.scale_sum = &scale_sums[item];
      if (euclidean) {
        g.row_sum = row_sum.data() + t * p.chunk + i0;
        g.column_sum = col_sum.data() + (b * p.stripes + t) * kStripe;
      }
      p.engine.gradient(g);
    });
    for (int64_t item = 0; item < p.stripes * here; ++item) scale_total += scale_sums[item];
    for (int64_t t = 0; euclidean && t < p.stripes; ++t) {
      for (int64_t i = 0; i < rows; ++i) row_total[row0 + i] += row_sum[t * p.chunk + i];
      for (int64_t b = 0; b < here; ++b)
        for (int64_t j = 0; j < p.stripe_columns(t); ++j)
          col_total[t * p.stripe + j] += col_sum[(b * p.stripes + t) * kStripe + j];
    }

    if (out.images) {
      const int64_t panels = divide_up(rows, s.mr);
      torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = 0; t < p.stripes; ++t) {
          ProductBlock<T> product{};
          product.a = by_rows.at((t * rows_words + begin * s.mr * along) * s.word);
          product.slices = text_slices.at();
          product.slice_depth = divide_up(p.m, s.group);
          product.first = t * p.stripe / s.group;
          product.depth = divide_up(p.stripe_columns(t), s.group);
          product.rows = std::min(rows, end * s.mr) - begin * s.mr;
          product.width = p.d;
          product.c = out.images + (row0 + begin * s.mr) * p.d;
          p.engine.product_rows(product);
        }
      });
    }
    if (out.texts) {
      const Buffer& a = s.group > 1 ? by_columns : by_rows;
      const int64_t per_stripe = divide_up(p.stripe, s.mr);
      torch::stable::parallel_for(0, p.stripes * per_stripe, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin / per_stripe; t * per_stripe < end; ++t) {
          const int64_t from = std::max(begin - t * per_stripe, int64_t(0)) * s.mr;
          const int64_t to = std::min({(end - t * per_stripe) * s.mr, p.stripe_columns(t)});
          if (from >= to) continue;
          ProductBlock<T> product{};
          product.a = a.at((t * columns_words + from) * s.word);
          product.slices = image_slices.at();
          product.slice_depth = product.depth = divide_up(rows, s.group);
          product.rows = to - from;
          product.width = p.d;
          product.c = out.texts + (t * p.stripe + from) * p.d;
          p.engine.product_columns(product);
        }
      });
    }
  }

  *out.logit_scale = scale_total;
  // dX_i = s (sum_j dS_ij y_j), and for the Euclidean form 2 s (sum_j dS_ij y_j - x_i sum_j dS_ij).
  const auto finish = [&](T* gradient, const T* side, int64_t count, const std::vector<double>& totals) {
    if (gradient == nullptr) return;
    parallel(divide_up(count, 16), [&](int64_t g) {
      for (int64_t i = g * 16; i < std::min(count, g * 16 + 16); ++i)
        for (int64_t c = 0; c < p.d; ++c) {
          T& v = gradient[i * p.d + c];
          if (euclidean)
            v = T(2 * p.scale) * (v - T(totals[i]) * (side[i * p.d + c] - p.centre[c]));
          else
            v *= T(p.scale);
        }
    });
  };
  finish(out.images, p.x, p.n, row_total);
  finish(out.texts, p.y, p.m, col_total);
}

Tensor as_type(const Tensor& t, ScalarType type) {
  Tensor converted = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return torch::stable::contiguous(converted);
}

struct Arguments {
  Similarity similarity;
  ScalarType type;  // of the arithmetic
  bool pairs;       // bfloat16 products
  double scale;
};

Arguments check(const Tensor& images, const Tensor& texts, const Tensor& logit_scale, const std::string& similarity,
                const std::string& precision) {
  STD_TORCH_CHECK(images.dim() == 2 && texts.dim() == 2, "images and texts: expected two dimensions, got ",
                  images.dim(), " and ", texts.dim());
  STD_TORCH_CHECK(images.size(1) == texts.size(1), "texts: expected D = ", images.size(1), " as in images, got ",
                  texts.size(1));
  STD_TORCH_CHECK(images.size(0) > 0 && texts.size(0) > 0 && images.size(1) > 0,
                  "images and texts: expected at least one row and one column");
  STD_TORCH_CHECK(images.scalar_type() == texts.scalar_type(), "texts: expected the dtype of images");
  STD_TORCH_CHECK(logit_scale.numel() == 1, "logit_scale: expected one element, got ", logit_scale.numel());
  Arguments a{};
  STD_TORCH_CHECK(parse_similarity(similarity, &a.similarity), "similarity: expected 'dot' or 'sqeuclidean', got '",
                  similarity, "'");
  STD_TORCH_CHECK(precision == "highest" || precision == "high" || precision == "medium",
                  "precision: expected 'highest', 'high' or 'medium', got '", precision, "'");
  const ScalarType dtype = images.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "images: expected float32, float64, bfloat16 or float16");
  a.type = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const bool low = dtype == ScalarType::BFloat16 || (dtype == ScalarType::Float && precision != "highest");
  a.pairs = low && a.similarity == Similarity::dot && engine_set().bf16 != nullptr;
  a.scale = *as_type(logit_scale, ScalarType::Double).const_data_ptr<double>();
  return a;
}

template <class T>
const Engine<T>& engine_for(const Arguments& a);
template <>
const Engine<double>& engine_for<double>(const Arguments&) {
  return *engine_set().f64;
}
template <>
const Engine<float>& engine_for<float>(const Arguments& a) {
  return a.pairs ? *engine_set().bf16 : *engine_set().f32;
}

Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

template <class T>
void run_forward(const Arguments& a, const Tensor& images, const Tensor& texts, int64_t label_offset, Tensor& row_lse,
                 Tensor& col_lse, Tensor& positive, Tensor& kept) {
  const Tensor x = as_type(images, a.type), y = as_type(texts, a.type);
  const Problem<T> p(engine_for<T>(a), x.template const_data_ptr<T>(), y.template const_data_ptr<T>(), x.size(0),
                     y.size(0), x.size(1), a.scale, a.similarity, label_offset);
  forward<T>(p, row_lse.mutable_data_ptr<double>(), col_lse.mutable_data_ptr<double>(),
             positive.mutable_data_ptr<double>(), kept.size(0) ? kept.template mutable_data_ptr<T>() : nullptr,
             kept.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_lse(const Tensor& images, const Tensor& texts,
                                                           const Tensor& logit_scale, std::string similarity,
                                                           int64_t label_offset, std::string precision,
                                                           int64_t work_bytes) {
  const Arguments a = check(images, texts, logit_scale, similarity, precision);
  const int64_t n = images.size(0), m = texts.size(0);
  STD_TORCH_CHECK(label_offset >= 0 && label_offset + n <= m,
                  "label_offset: expected 0 <= label_offset <= M - N = ", m - n, ", got ", label_offset);
  const int64_t item = a.type == ScalarType::Double ? 8 : 4;
  Tensor row_lse = empty(images, {n}, ScalarType::Double), col_lse = empty(images, {m}, ScalarType::Double);
  Tensor positive = empty(images, {n}, ScalarType::Double);
  Tensor kept = empty(images, {std::min(n, std::max<int64_t>(work_bytes, 0) / (m * item)), m}, a.type);
  if (a.type == ScalarType::Double)
    run_forward<double>(a, images, texts, label_offset, row_lse, col_lse, positive, kept);
  else
    run_forward<float>(a, images, texts, label_offset, row_lse, col_lse, positive, kept);
  return {row_lse, col_lse, positive, kept};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Arguments& a, const Tensor& grad_row, const Tensor& grad_col,
                                                const Tensor& grad_positive, const Tensor& images, const Tensor& texts,
                                                const Tensor& logit_scale, const Tensor& row_lse, const Tensor& col_lse,
                                                const Tensor& kept, int64_t label_offset,
                                                const std::vector<bool>& needs) {
  const Tensor x = as_type(images, a.type), y = as_type(texts, a.type);
  const Problem<T> p(engine_for<T>(a), x.template const_data_ptr<T>(), y.template const_data_ptr<T>(), x.size(0),
                     y.size(0), x.size(1), a.scale, a.similarity, label_offset);
  const auto zeros = [&](bool wanted, int64_t rows) {
    const std::vector<int64_t> size = wanted ? std::vector<int64_t>{rows, p.d} : std::vector<int64_t>{0};
    return torch::stable::new_zeros(x, size, a.type);
  };
  Tensor dx = zeros(needs[0], p.n), dy = zeros(needs[1], p.m);
  double dscale = 0;
  const Tensor gr = as_type(grad_row, ScalarType::Double), gc = as_type(grad_col, ScalarType::Double);
  const Tensor gp = as_type(grad_positive, ScalarType::Double);
  const Tensor rl = as_type(row_lse, ScalarType::Double), cl = as_type(col_lse, ScalarType::Double);
  const Tensor saved = torch::stable::contiguous(kept);
  backward<T>(p, gr.const_data_ptr<double>(), gc.const_data_ptr<double>(), gp.const_data_ptr<double>(),
              rl.const_data_ptr<double>(), cl.const_data_ptr<double>(),
              saved.size(0) ? saved.template const_data_ptr<T>() : nullptr, saved.size(0),
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
    const Tensor& texts, const Tensor& logit_scale, const Tensor& row_lse, const Tensor& col_lse, const Tensor& kept,
    std::string similarity, int64_t label_offset, std::string precision, std::vector<bool> needs) {
  const Arguments a = check(images, texts, logit_scale, similarity, precision);
  STD_TORCH_CHECK(needs.size() == 3, "needs: expected three flags");
  STD_TORCH_CHECK(grad_row.numel() == images.size(0) && grad_positive.numel() == images.size(0) &&
                      grad_col.numel() == texts.size(0),
                  "contrastive_lse_backward: gradients do not match images and texts");
  if (a.type == ScalarType::Double)
    return run_backward<double>(a, grad_row, grad_col, grad_positive, images, texts, logit_scale, row_lse, col_lse,
                                kept, label_offset, needs);
  return run_backward<float>(a, grad_row, grad_col, grad_positive, images, texts, logit_scale, row_lse, col_lse, kept,
                             label_offset, needs);
}

}  // namespace
}  // namespace gapkern::contrastive

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("contrastive_lse", TORCH_BOX(&gapkern::contrastive::contrastive_lse));
  m.impl("contrastive_lse_backward", TORCH_BOX(&gapkern::contrastive::contrastive_lse_backward));
}

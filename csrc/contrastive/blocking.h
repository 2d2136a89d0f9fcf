// How an N x M problem is cut into blocks on the CPU: packed operands, chunks of rows, stripes of columns, threads.
#pragma once
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "contrastive/arguments.h"

namespace gapkern::contrastive {

inline constexpr double kLog2e = 1.4426950408889634074, kLog2eLow = 2.0355273740931033e-17;
// Without a reference, 2^(k t) for |k t| <= 80 leaves room for sums over 2^30 terms and for the weights of the backward
// pass, far from both ends of float32.
inline constexpr double kSafeExponent = 80;
// Beyond, up to here, exponents shifted so that the largest possible one is again kSafeExponent are tried: good if
// every sum comes out above 2^kLeastExponent, as it does for trained embeddings at the largest logit_scale in use, 100.
// Terms below float32's range are then far below such a sum's rounding.
inline constexpr double kTriedExponent = 200;
inline constexpr double kLeastExponent = -75;
// Where exponents may lie beyond, float32 has 13 bits left behind the point, and so has every softmax: the arithmetic
// is float64's. Unit vectors come there at a logit_scale of 710, or 177 with distances. Bfloat16 products need no more
// bits than bfloat16 has.
inline constexpr double kFloatExponent = 1024, kPairsExponent = 65536;
inline constexpr int64_t kSlack = 64;                       // vector reads and writes behind the last column
inline constexpr int64_t kSliceBytes = int64_t(256) << 10;  // packed slices a thread uses together
inline constexpr int64_t kChunkBytes = int64_t(32) << 20;   // logit gradients at hand, at most
inline constexpr int64_t kTogether = 4;                     // blocks that share a stripe while it is in the cache
inline constexpr int64_t kPackedBytes = int64_t(8) << 20;   // packed rows at hand in the forward pass

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

template <class F>
void parallel(int64_t count, const F& body) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Uninitialised, aligned to a cache line.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : memory_(static_cast<char*>(take_block(bytes))) {
    STD_TORCH_CHECK(memory_ != nullptr, "contrastive_lse: out of memory, wanted ", bytes, " bytes of work space");
  }
  template <class T = char>
  T* at(int64_t bytes = 0) const {
    return reinterpret_cast<T*>(memory_.get() + bytes);
  }

 private:
  struct Free {
    void operator()(char* p) const { give_block(p); }
  };
  std::unique_ptr<char, Free> memory_;
};

// One N x M problem: its blocking, its packed operands and its logits.
template <class T>
class Problem {
 public:
  Problem(const Engine<T>& engine, const T* x, const T* y, int64_t n, int64_t m, int64_t d, double scale,
          Similarity similarity, int64_t label_offset)
      : engine(engine), x(x), y(y), n(n), m(m), d(d), scale(scale), similarity(similarity), label_offset(label_offset) {
    const Shape& s = engine.shape;
    stripes = divide_up(m, m <= kNarrowUpTo ? kNarrowStripe : kStripe);
    stripe = round_up(divide_up(m, stripes), s.nr);
    stripes = divide_up(m, stripe);
    block = s.mr >= 12 ? s.mr * 8 : s.mr * 16;
    words = divide_up(d, s.group);
    const int64_t fitting = kChunkBytes / (stripes * (kStripe + 16) * 4) / block;
    chunk = std::min(round_up(n, s.mr * 2), block * std::clamp<int64_t>(fitting, 1, 2 * kTogether));
    const int64_t packed = kPackedBytes / (words * s.word) / block * block;
    forward_chunk = std::max(chunk, std::min(round_up(n, s.mr * 2), packed));
    measure();
  }

  double k() const { return scale * kLog2e; }
  Exponents<T> exponents() const {
    const T high = T(k());
    return {range, high, T((k() - double(high)) + (std::fma(scale, kLog2e, -k()) + scale * kLog2eLow)), T(shift)};
  }

  // Block b of the chunk of `rows` rows at row0, against stripe t.
  LogitBlock<T> block_at(const Buffer& images, const Buffer& texts, int64_t row0, int64_t rows, int64_t t,
                         int64_t b) const {
    const int64_t i0 = b * block, col0 = t * stripe;
    return {images.at(i0 * panel_bytes()),
            texts.at(col0 * panel_bytes()),
            std::min(block, rows - i0),
            stripe_columns(t),
            d,
            similarity == Similarity::sqeuclidean,
            row0 + i0 + label_offset - col0};
  }

  struct Place {
    int64_t stripe, block;
  };
  // The block of `count` that is worked on as the item-th: a few blocks meet all stripes before the next few, so that
  // both stay in the second-level cache.
  Place place(int64_t item, int64_t count) const {
    const int64_t first = item / (stripes * kTogether) * kTogether, size = std::min(kTogether, count - first);
    const int64_t rest = item - first * stripes;
    return {rest / size, first + rest % size};
  }

  const T* centre_or_null() const { return similarity == Similarity::sqeuclidean ? centre.data() : nullptr; }

  Buffer pack_texts() const {
    const Shape& s = engine.shape;
    const int64_t panels = divide_up(m, s.nr);
    Buffer packed(panels * s.nr * words * s.word);
    parallel(panels, [&](int64_t p) {
      engine.pack_panel(y + p * s.nr * d, m - p * s.nr, s.nr, d, packed.at(p * s.nr * words * s.word));
    });
    return packed;
  }

  void pack_images(int64_t row0, int64_t rows, const Buffer& packed) const {
    const Shape& s = engine.shape;
    parallel(divide_up(rows, s.mr), [&](int64_t p) {
      engine.pack_panel(x + (row0 + p * s.mr) * d, rows - p * s.mr, s.mr, d, packed.at(p * s.mr * words * s.word));
    });
  }

  // Logits of bfloat16 products are kept as multiples of a unit, 16 bits each, where that is finer than the rounding of
  // their exponentials to bfloat16.
  bool coded() const { return unit > 0; }

  // Where the logits of a block are kept: blocks are written and read in one piece each.
  template <class K>
  K* kept_block(K* kept, int64_t row, int64_t rows, int64_t column) const {
    return kept + row * m + rows * column;
  }

  int64_t slices() const { return divide_up(d, engine.shape.nr); }
  int slice_columns(int64_t i) const { return int(std::min<int64_t>(engine.shape.nr, d - i * engine.shape.nr)); }
  int64_t slice_bytes(int64_t rows) const {
    return divide_up(rows, engine.shape.group) * engine.shape.nr * engine.shape.word;
  }
  bool tracked() const { return range == Range::tracked; }
  // Whether float64 should solve it instead.
  bool wants_double() const {
    return sizeof(T) < 8 && exponent > (engine.shape.group > 1 ? kPairsExponent : kFloatExponent);
  }
  // The logit, in units of t, whose exponential is 1.
  double reference() const { return shift == 0 ? 0 : shift / k(); }
  // Whether 2^log2 of a sum relative to a reference stays clear of the lower end once it is shifted.
  bool holds(double reference, double log2) const { return k() * reference - shift + log2 >= kLeastExponent; }
  int64_t panel_bytes() const { return words * engine.shape.word; }  // per row or column of a panel
  int64_t stripe_columns(int64_t t) const { return std::min(stripe, m - t * stripe); }

  void track() {
    range = Range::tracked;
    shift = 0;
  }

  const Engine<T>& engine;
  const T *x, *y;
  int64_t n, m, d;
  double scale;
  Similarity similarity;
  int64_t label_offset;
  int64_t stripe, stripes, block, words;
  int64_t chunk, forward_chunk;  // rows between two meetings of the threads
  Range range = Range::normal;
  double shift = 0;     // of exponents, an integer; Range::shifted only
  T unit = 0;           // of kept logits; 0: they are kept as they are
  double exponent = 0;  // no |k t| is larger
  std::vector<T> centre;

 private:
  // A bound of |k t| decides whether exponentials need a reference. Distances are bounded, and their gradients
  // 2 s (sum_j dS_ij y_j - x_i sum_j dS_ij) formed, about the texts' mean: what all embeddings share cancels there.
  void measure() {
    if (similarity == Similarity::sqeuclidean) {
      centre.assign(d, T(0));
      std::vector<double> total(d, 0.);
      for (int64_t j = 0; j < m; ++j)
        for (int64_t c = 0; c < d; ++c) total[c] += y[j * d + c];
      for (int64_t c = 0; c < d; ++c) centre[c] = T(total[c] / double(m));
    }
    const double largest_x = largest_norm(x, n), largest_y = largest_norm(y, m);
    const double reach = std::sqrt(largest_x) + std::sqrt(largest_y);
    const double t = similarity == Similarity::dot ? std::sqrt(largest_x * largest_y) : reach * reach;
    exponent = std::abs(scale) * kLog2e * t;
    // Bfloat16 factors may make a logit a little larger than the norms say.
    if (engine.shape.group > 1 && exponent <= kTriedExponent && t > 0) unit = T(1.02 * t / 32767);
    if (exponent <= kSafeExponent) return;
    range = exponent <= kTriedExponent ? Range::shifted : Range::tracked;
    const bool never_positive = similarity == Similarity::sqeuclidean && scale > 0;
    if (range == Range::shifted) shift = std::ceil(never_positive ? 0 : exponent) - kSafeExponent;
  }

  // Squared; NaN where a row holds one.
  double largest_norm(const T* side, int64_t rows) const {
    std::vector<double> largest(divide_up(rows, 64), 0.);
    const auto raise = [](double& to, double value) {
      if (!(value <= to)) to = value;
    };
    parallel(int64_t(largest.size()), [&](int64_t b) {
      for (int64_t i = b * 64; i < std::min(rows, b * 64 + 64); ++i)
        raise(largest[b], engine.squared_norm(side + i * d, centre_or_null(), d));
    });
    double all = 0;
    for (const double value : largest) raise(all, value);
    return all;
  }
};

// Of x and y in the type of the arithmetic, which must outlive it.
template <class T>
Problem<T> problem_of(const Arguments& a, const Tensor& x, const Tensor& y, int64_t label_offset) {
  return {engine_for<T>(a),
          x.template const_data_ptr<T>(),
          y.template const_data_ptr<T>(),
          x.size(0),
          y.size(0),
          x.size(1),
          a.scale,
          a.similarity,
          label_offset};
}

// dS of one chunk of rows, and the two products that consume it.
template <class T>
class LogitGradients {
 public:
  // A null gradient is not computed.
  LogitGradients(const Problem<T>& problem, T* images, T* texts)
      : p(problem),
        images(images),
        texts(texts),
        rows_words(p.chunk * row_stride(p.engine.shape.group)),
        panel_words(p.engine.shape.mr * (p.engine.shape.group > 1 ? p.chunk / p.engine.shape.group : 1)),
        columns_words(p.engine.shape.group > 1 ? divide_up(p.stripe, p.engine.shape.mr) * panel_words : rows_words) {
    const Shape& s = p.engine.shape;
    // The register tile reads up to mr rows (or columns) past the last; what it finds there is not used.
    if (images || texts) by_rows = Buffer((p.stripes * rows_words + s.mr * row_stride(s.group)) * s.word);
    if ((images || texts) && s.group > 1) by_columns = Buffer(p.stripes * columns_words * s.word);
    if (images && s.group > 1) {
      text_slices = Buffer(p.stripes * p.slices() * p.slice_bytes(p.stripe));
      parallel(p.stripes, [&](int64_t t) { pack_text_slices(t, 0, p.slices(), text_slices.at(text_slice(t, 0))); });
    }
    if (texts) image_slices = Buffer(p.slices() * p.slice_bytes(p.chunk));
  }

  // Where the block of stripe t that starts at row i0 of the chunk writes its dS.
  GradientOutput output(int64_t t, int64_t i0, double* scale_sum) const {
    const Shape& s = p.engine.shape;
    GradientOutput out{nullptr, nullptr, panel_words, scale_sum};
    if (images || texts) out.by_rows = by_rows.at((t * rows_words + i0 * row_stride(s.group)) * s.word);
    if ((images || texts) && s.group > 1)
      out.by_columns = by_columns.at((t * columns_words + i0 / s.group * s.mr) * s.word);
    return out;
  }

  // dX of the chunk's rows, and its share of dY, without what `finish` adds.
  void multiply(int64_t row0, int64_t rows) {
    if (images) multiply_images(row0, rows);
    if (texts) multiply_texts(row0, rows);
  }

  // dX_i = s sum_j dS_ij y_j, of which `factor` is in dS already, and in the Euclidean form
  // 2 s (sum_j dS_ij y_j - x_i sum_j dS_ij), whose sums of dS are row_totals and column_totals.
  void finish(double factor, const std::vector<double>& row_totals, const std::vector<double>& column_totals) const {
    if (p.similarity == Similarity::dot && factor == p.scale) return;
    finish(images, p.x, p.n, T(p.scale / factor), row_totals);
    finish(texts, p.y, p.m, T(p.scale / factor), column_totals);
  }

 private:
  void finish(T* gradient, const T* side, int64_t count, T rest, const std::vector<double>& totals) const {
    if (gradient == nullptr) return;
    const bool euclidean = p.similarity == Similarity::sqeuclidean;
    parallel(divide_up(count, 16), [&](int64_t g) {
      for (int64_t i = g * 16; i < std::min(count, g * 16 + 16); ++i)
        for (int64_t c = 0; c < p.d; ++c) {
          T& v = gradient[i * p.d + c];
          v = euclidean ? 2 * rest * (v - T(totals[i]) * (side[i * p.d + c] - p.centre[c])) : v * rest;
        }
    });
  }

  // Slices are used as many together as stay in a second-level cache. Where words are pairs, packed_texts holds them
  // all. Otherwise that would be a second copy of the texts: each thread packs what it is about to use for all its
  // rows.
  void multiply_images(int64_t row0, int64_t rows) const {
    const Shape& s = p.engine.shape;
    const int64_t together = std::clamp<int64_t>(kSliceBytes / p.slice_bytes(p.stripe), 1, p.slices());
    parallel_for(0, divide_up(rows, s.mr), 1, [&](int64_t begin, int64_t end) {
      const Buffer own(s.group > 1 ? 0 : together * p.slice_bytes(p.stripe));
      const int64_t from = begin * s.mr, to = std::min(rows, end * s.mr);
      for (int64_t t = 0; t < p.stripes; ++t)
        for (int64_t i = 0; i < p.slices(); i += together) {
          const int64_t count = std::min(together, p.slices() - i), column = i * s.nr;
          if (s.group == 1) pack_text_slices(t, i, count, own.at());
          p.engine.product_rows({by_rows.at((t * rows_words + from * row_stride(s.group)) * s.word),
                                 s.group > 1 ? text_slices.at(text_slice(t, i)) : own.at(), s.mr * row_stride(s.group),
                                 divide_up(p.stripe_columns(t), s.group), to - from,
                                 std::min(count * s.nr, p.d - column), images + (row0 + from) * p.d + column, p.d,
                                 t == 0});
        }
    });
  }

  // Where slice i of stripe t starts in text_slices.
  int64_t text_slice(int64_t t, int64_t i) const {
    return t * p.slices() * p.slice_bytes(p.stripe) + i * p.slice_bytes(p.stripe_columns(t));
  }

  void pack_text_slices(int64_t t, int64_t first, int64_t count, char* out) const {
    const int64_t depth = p.stripe_columns(t);
    for (int64_t i = 0; i < count; ++i)
      p.engine.pack_slice(p.y + t * p.stripe * p.d, depth, p.d, first + i, p.centre_or_null(),
                          out + i * p.slice_bytes(depth));
  }

  void multiply_texts(int64_t row0, int64_t rows) const {
    const Shape& s = p.engine.shape;
    const int64_t bytes = p.slice_bytes(rows);
    parallel(p.slices(), [&](int64_t i) {
      p.engine.pack_slice(p.x + row0 * p.d, rows, p.d, i, p.centre_or_null(), image_slices.at(i * bytes));
    });
    const Buffer& a = s.group > 1 ? by_columns : by_rows;
    const int64_t together = std::clamp<int64_t>(kSliceBytes / bytes, 1, p.slices());
    const int64_t per_stripe = divide_up(p.stripe, s.mr);
    const int64_t panels = (p.stripes - 1) * per_stripe + divide_up(p.stripe_columns(p.stripes - 1), s.mr);
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin / per_stripe; t * per_stripe < end; ++t) {
        const int64_t from = std::max(begin - t * per_stripe, int64_t(0)) * s.mr;
        const int64_t to = std::min((end - t * per_stripe) * s.mr, p.stripe_columns(t));
        for (int64_t i = 0; from < to && i < p.slices(); i += together)
          p.engine.product_columns({a.at((t * columns_words + from / s.mr * panel_words) * s.word),
                                    image_slices.at(i * bytes), panel_words, divide_up(rows, s.group), to - from,
                                    std::min(together * s.nr, p.d - i * s.nr),
                                    texts + (t * p.stripe + from) * p.d + i * s.nr, p.d, row0 == 0});
      }
    });
  }

  const Problem<T>& p;
  T *images, *texts;
  // Words between stripes of dX's operand, between panels and between stripes of dY's.
  int64_t rows_words, panel_words, columns_words;
  Buffer by_rows, by_columns, image_slices, text_slices;
};

}  // namespace gapkern::contrastive

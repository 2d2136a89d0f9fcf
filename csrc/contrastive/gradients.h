// dS of one chunk of rows, and the two products that consume it: dX and dY.
#pragma once
#include <vector>

#include "contrastive/packing.h"

namespace gapkern::contrastive {

inline constexpr int64_t kSliceBytes = int64_t(256) << 10;  // packed slices a thread uses together

template <class T>
class LogitGradients {
 public:
  // A null gradient is not computed. Of a side with itself, `own`, both are the same: dS lies above the diagonal, and
  // counts for (j, i) as for (i, j).
  LogitGradients(const Problem<T>& problem, T* images, T* texts, bool own = false)
      : p_(problem),
        cut_(problem.blocking),
        shape_(problem.engine.shape),
        slices_(problem),
        images_(images),
        texts_(texts),
        own_(own),
        rows_words_(cut_.chunk * row_stride(shape_.group)),
        panel_words_(shape_.mr * (p_.bf16_products() ? cut_.chunk / shape_.group : 1)),
        columns_words_(p_.bf16_products() ? divide_up(cut_.stripe, shape_.mr) * panel_words_ : rows_words_) {
    if (!wanted()) return;
    if (own_)
      parallel(divide_up(p_.n, 64), [&](int64_t g) {
        std::fill(images_ + g * 64 * p_.d, images_ + std::min(p_.n, g * 64 + 64) * p_.d, T(0));
      });
    // The register tile reads up to mr rows (or columns) past the last; what it finds there is not used.
    by_rows_ = words(cut_.stripes * rows_words_ + shape_.mr * row_stride(shape_.group));
    if (p_.bf16_products()) by_columns_ = words(cut_.stripes * columns_words_);
    if (images && p_.bf16_products()) {
      text_slices_ = Scratch(cut_.stripes * slices_.count() * slices_.bytes(cut_.stripe));
      parallel(cut_.stripes,
               [&](int64_t t) { pack_text_slices(t, 0, slices_.count(), text_slices_.at(text_slice(t, 0))); });
    }
    if (texts) image_slices_ = Scratch(slices_.count() * slices_.bytes(cut_.chunk));
  }

  // Where the block writes its dS.
  GradientOutput output(const BlockIndex& at, double* scale_sum) const {
    const int64_t i0 = at.block * cut_.block;
    GradientOutput out{.by_rows = nullptr, .by_columns = nullptr, .panel = panel_words_, .scale_sum = scale_sum};
    if (wanted()) out.by_rows = rows_of(at.stripe, i0);
    if (wanted() && p_.bf16_products())
      out.by_columns = columns_of(by_columns_, at.stripe, i0 / shape_.group * shape_.mr);
    return out;
  }

  // dX of the chunk's rows, and its share of dY, without what `finish` adds.
  void multiply(const Chunk& chunk) const {
    if (images_) multiply_images(chunk);
    if (texts_) multiply_texts(chunk);
  }

  // dX_i = s sum_j dS_ij y_j, of which `factor` is in dS already, and with distances
  // 2 s (sum_j dS_ij y_j - x_i sum_j dS_ij), whose sums of dS are row_totals and column_totals.
  void finish(double factor, const std::vector<double>& row_totals, const std::vector<double>& column_totals) const {
    if (!p_.distances && factor == p_.scale) return;
    finish(images_, p_.x, p_.n, T(p_.scale / factor), row_totals);
    if (!own_) finish(texts_, p_.y, p_.m, T(p_.scale / factor), column_totals);
  }

 private:
  bool wanted() const { return images_ || texts_; }
  Scratch words(int64_t count) const { return Scratch(count * shape_.word); }

  // Row i of the chunk's dS against stripe t.
  char* rows_of(int64_t t, int64_t i) const {
    return by_rows_.at((t * rows_words_ + i * row_stride(shape_.group)) * shape_.word);
  }
  // dY's operand of stripe t, from a word of it on.
  char* columns_of(const Scratch& operand, int64_t t, int64_t word) const {
    return operand.at((t * columns_words_ + word) * shape_.word);
  }

  void finish(T* gradient, const T* side, int64_t count, T rest, const std::vector<double>& totals) const {
    if (gradient == nullptr) return;
    parallel(divide_up(count, 16), [&](int64_t g) {
      for (int64_t i = g * 16; i < std::min(count, g * 16 + 16); ++i)
        for (int64_t c = 0; c < p_.d; ++c) {
          T& v = gradient[i * p_.d + c];
          v = p_.distances ? 2 * rest * (v - T(totals[i]) * (side[i * p_.d + c] - p_.centre[c])) : v * rest;
        }
    });
  }

  // As many slices together as stay in a second-level cache. With bfloat16 products text_slices_ holds them all;
  // otherwise that would be a second copy of the texts: each thread packs what it is about to use for all its rows.
  void multiply_images(const Chunk& chunk) const {
    const int64_t together = std::clamp<int64_t>(kSliceBytes / slices_.bytes(cut_.stripe), 1, slices_.count());
    parallel_for(0, divide_up(chunk.rows, shape_.mr), 1, [&](int64_t begin, int64_t end) {
      const Scratch own(p_.bf16_products() ? 0 : together * slices_.bytes(cut_.stripe));
      const int64_t from = begin * shape_.mr, to = std::min(chunk.rows, end * shape_.mr);
      for (int64_t t = own_ ? (chunk.row0 + from) / cut_.stripe : 0; t < cut_.stripes; ++t)
        for (int64_t i = 0; i < slices_.count(); i += together) {
          const int64_t count = std::min(together, slices_.count() - i), column = i * shape_.nr;
          if (!p_.bf16_products()) pack_text_slices(t, i, count, own.at());
          p_.engine.product_rows({.a = rows_of(t, from),
                                  .slices = p_.bf16_products() ? text_slices_.at(text_slice(t, i)) : own.at(),
                                  .panel = shape_.mr * row_stride(shape_.group),
                                  .depth = divide_up(cut_.stripe_columns(t), shape_.group),
                                  .rows = std::min(to, rows_at(chunk, t)) - from,
                                  .cols = std::min(count * shape_.nr, p_.d - column),
                                  .c = images_ + (chunk.row0 + from) * p_.d + column,
                                  .c_stride = p_.d,
                                  .first = !own_ && t == 0});
        }
    });
  }

  // The chunk's rows whose dS against stripe t is there.
  int64_t rows_at(const Chunk& chunk, int64_t t) const {
    return own_ ? std::min(chunk.rows, cut_.end_of_stripe(t) - chunk.row0) : chunk.rows;
  }

  // Where slice i of stripe t starts in text_slices_.
  int64_t text_slice(int64_t t, int64_t i) const {
    return t * slices_.count() * slices_.bytes(cut_.stripe) + i * slices_.bytes(cut_.stripe_columns(t));
  }

  void pack_text_slices(int64_t t, int64_t first, int64_t count, char* out) const {
    slices_.pack(p_.y + t * cut_.stripe * p_.d, cut_.stripe_columns(t), first, count, out);
  }

  void multiply_texts(const Chunk& chunk) const {
    const int64_t bytes = slices_.bytes(chunk.rows);
    parallel(slices_.count(),
             [&](int64_t i) { slices_.pack(p_.x + chunk.row0 * p_.d, chunk.rows, i, 1, image_slices_.at(i * bytes)); });
    const Scratch& a = p_.bf16_products() ? by_columns_ : by_rows_;
    const int64_t together = std::clamp<int64_t>(kSliceBytes / bytes, 1, slices_.count());
    const int64_t per_stripe = divide_up(cut_.stripe, shape_.mr);
    const int64_t last_columns = cut_.stripe_columns(cut_.stripes - 1);
    const int64_t panels = (cut_.stripes - 1) * per_stripe + divide_up(last_columns, shape_.mr);
    const int64_t first = own_ ? chunk.row0 / cut_.stripe * per_stripe + chunk.row0 % cut_.stripe / shape_.mr : 0;
    parallel_for(first, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin / per_stripe; t * per_stripe < end; ++t) {
        const int64_t from = std::max(begin - t * per_stripe, int64_t(0)) * shape_.mr;
        const int64_t to = std::min((end - t * per_stripe) * shape_.mr, cut_.stripe_columns(t));
        const int64_t depth = rows_at(chunk, t), step = depth < chunk.rows ? 1 : together;
        for (int64_t i = 0; from < to && i < slices_.count(); i += step)
          p_.engine.product_columns({.a = columns_of(a, t, from / shape_.mr * panel_words_),
                                     .slices = image_slices_.at(i * bytes),
                                     .panel = panel_words_,
                                     .depth = divide_up(depth, shape_.group),
                                     .rows = to - from,
                                     .cols = std::min(step * shape_.nr, p_.d - i * shape_.nr),
                                     .c = texts_ + (t * cut_.stripe + from) * p_.d + i * shape_.nr,
                                     .c_stride = p_.d,
                                     .first = !own_ && chunk.row0 == 0});
      }
    });
  }

  const Problem<T>& p_;
  const Blocking& cut_;
  const Shape& shape_;
  const Slices<T> slices_;
  T *const images_, *const texts_;
  const bool own_;
  // Words between stripes of dX's operand, between panels and between stripes of dY's.
  const int64_t rows_words_, panel_words_, columns_words_;
  Scratch by_rows_, by_columns_, image_slices_, text_slices_;
};

}  // namespace gapkern::contrastive

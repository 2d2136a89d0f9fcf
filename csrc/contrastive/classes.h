// Classes of pairs on the CPU: what the operators are given, in the kernels' form, and the state between the passes.
#pragma once
#include <limits>
#include <vector>

#include "contrastive/packing.h"
#include "contrastive/softmax.h"

namespace gapkern::contrastive {

enum class Label { counted, left_out, none };

// Tensors without elements are absent.
struct ClassesOptions {
  Tensor row_ids, column_ids;        // [N], [M] int64
  Tensor row_limit, column_limit;    // [N], [M] float64, of t
  Tensor guide_images, guide_texts;  // [N, G], [M, G] in the type of the arithmetic
  Tensor guide_row_limit, guide_column_limit;
  bool positive;  // equal ids are positives, else left out
  bool own;       // texts are the images; row_ids and row_limit are those of both
  Label label;

  bool limited() const { return row_limit.numel() > 0 || column_limit.numel() > 0; }
  ClassesKind kind() const { return {.positive = positive, .own = own, .guided = guide_images.numel() > 0}; }
};

template <class T>
class Classes {
 public:
  Classes(const Problem<T>& p, const ClassesOptions& o)
      : kind_(o.kind()),
        label_(o.own ? Label::left_out : o.label),
        row_ids_(values<int64_t>(o.row_ids, p.n, T(-1))),
        column_ids_(values<int64_t>(o.column_ids, p.m, T(-2))),
        row_limit_(values<double>(o.row_limit, p.n, kInfinite)),
        column_limit_(values<double>(o.column_limit, o.own ? 0 : p.m, kInfinite)) {
    if (!kind_.guided) return;
    guide_row_limit_ = values<double>(o.guide_row_limit, p.n, kInfinite);
    guide_column_limit_ = values<double>(o.guide_column_limit, p.m, kInfinite);
    guide_depth_ = o.guide_images.size(1);
    guide_images_ = panels(o.guide_images, p.engine.shape.mr);
    guide_texts_ = panels(o.guide_texts, p.engine.shape.nr);
  }

  const ClassesKind& kind() const { return kind_; }
  int count() const { return kind_.positive ? kClasses : 1; }
  Label label() const { return label_; }

  // Of the block at a row and a column.
  PairClasses<T> block(int64_t row, int64_t column) const {
    PairClasses<T> c{};
    c.row_ids = row_ids_.data() + row;
    c.row_limit = row_limit_.data() + row;
    c.column_ids = column_ids_.data() + column;
    c.column_limit = (kind_.own ? row_limit_.data() : column_limit_.data()) + column;
    if (!kind_.guided) return c;
    const int64_t row_bytes = guide_depth_ * int64_t(sizeof(T));
    c.guide_images = guide_images_.at(row * row_bytes);
    c.guide_texts = guide_texts_.at(column * row_bytes);
    c.guide_depth = guide_depth_;
    c.guide_row_limit = guide_row_limit_.data() + row;
    c.guide_column_limit = guide_column_limit_.data() + column;
    return c;
  }

  // The column of a block's first label, which is nowhere where there are none.
  int64_t label_column(int64_t column) const { return label_ == Label::none ? kNowhere : column; }

 private:
  static constexpr int64_t kPadding = 64;  // whole vectors are read
  static constexpr int64_t kNowhere = -(int64_t(1) << 40);
  static constexpr T kInfinite = std::numeric_limits<T>::infinity();

  template <class U>
  static std::vector<T> values(const Tensor& given, int64_t count, T absent) {
    std::vector<T> found(count + kPadding, absent);
    const U* const from = given.numel() > 0 ? given.const_data_ptr<U>() : nullptr;
    for (int64_t i = 0; from != nullptr && i < std::min<int64_t>(count, given.numel()); ++i) found[i] = T(from[i]);
    return found;
  }

  static Scratch panels(const Tensor& side, int64_t width) {
    const auto& set = GAPKERN_FOR_ACTIVE_ISA(product_kernels);
    const ProductKernels<T>& plain = [&]() -> const ProductKernels<T>& {
      if constexpr (sizeof(T) == 8)
        return set.f64;
      else
        return set.f32;
    }();
    const int64_t rows = side.size(0), depth = side.size(1);
    Scratch out(round_up(rows, width) * depth * int64_t(sizeof(T)));
    const T* const from = side.const_data_ptr<T>();
    parallel(divide_up(rows, width), [&](int64_t panel) {
      const int64_t i = panel * width;
      plain.pack_panel(from + i * depth, rows - i, int(width), depth, out.at(i * depth * int64_t(sizeof(T))));
    });
    return out;
  }

  const ClassesKind kind_;
  const Label label_;
  std::vector<T> row_ids_, column_ids_, row_limit_, column_limit_, guide_row_limit_, guide_column_limit_;
  int64_t guide_depth_ = 0;
  Scratch guide_images_, guide_texts_;
};

// What the forward pass leaves to the backward pass, in which T is const. Of a side with itself columns are the rows.
template <class T>
struct ClassesState {
  using Real = SameConst<T, double>;
  Statistics<Real> rows[kClasses], columns[kClasses];
  Real* label_t;  // [n], -inf without one; null unless labels are counted
  KeptLogits<T> kept;

  bool within(const ExponentRange<std::remove_const_t<T>>& range) const {
    if (!range.shifted()) return true;
    for (int c = 0; c < kClasses; ++c)
      if (!rows[c].within(range) || !columns[c].within(range)) return false;
    return true;
  }
};

}  // namespace gapkern::contrastive

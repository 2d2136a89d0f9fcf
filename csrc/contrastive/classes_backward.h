// The backward pass over classes of pairs on the CPU: dS by the class of a pair, and what dX, dY and d scale sum from
// it.
#pragma once
#include <vector>

#include "contrastive/classes.h"
#include "contrastive/gradients.h"
#include "contrastive/side_weights.h"

namespace gapkern::contrastive {

// Of the loss by the forward pass's outputs; of a side with itself columns are the rows.
struct ClassesOutputGradients {
  const double *rows[kClasses], *columns[kClasses];  // [n], [m]
  const double* label;                               // [n]; null unless labels are counted
};

template <class T>
class ClassesBackwardPass {
 public:
  // images, texts [n, d], [m, d]: gradients, null where not wanted; of a side with itself both are the same.
  ClassesBackwardPass(const Problem<T>& problem, const Classes<T>& classes, const ClassesState<const T>& state,
                      const ClassesOutputGradients& in, T* images, T* texts)
      : p_(problem),
        cut_(problem.blocking),
        classes_(classes),
        own_(classes.kind().own),
        state_(state),
        in_(in),
        factor_(factor_in_gradients(problem)),
        label_t_(p_.n, T(0)),
        label_gradient_(p_.n, T(0)),
        operands_(problem, cut_.chunk),
        gradients_(problem, images, texts, own_),
        scale_sums_(cut_.stripes * blocks()),
        sums_(cut_.stripes * blocks()),
        row_sum_(p_.distances ? cut_.stripes * cut_.chunk : 0),
        column_sum_(p_.distances ? blocks() * cut_.stripes * kStripe : 0),
        row_total_(p_.distances ? p_.n : 0, 0.),
        column_total_(p_.distances && !own_ ? p_.m : 0, 0.) {
    for (int c = 0; c < classes_.count(); ++c) {
      row_side_.emplace_back(p_.range, state.rows[c], in.rows[c], factor_);
      if (!own_) column_side_.emplace_back(p_.range, state.columns[c], in.columns[c], factor_);
    }
    for (int64_t i = 0; in_.label != nullptr && i < p_.n; ++i) {
      if (state_.label_t[i] == -INFINITY) continue;
      label_t_[i] = T(state_.label_t[i]);
      label_gradient_[i] = T(factor_ * in_.label[i]);
    }
  }

  // The gradient of logit_scale.
  double run() {
    if (!state_.kept.reaches(p_.n)) operands_.pack_texts();
    cut_.for_each_chunk(cut_.chunk, [&](const Chunk& chunk) {
      if (!state_.kept.reaches(chunk.row0 + chunk.rows)) operands_.pack_images(chunk);
      if (own_) {
        const std::vector<BlockIndex> found = cut_.blocks_above(chunk);
        parallel(int64_t(found.size()), [&](int64_t item) { form_block(chunk, found[item], item); });
        add_sums(int64_t(found.size()));
        for (const BlockIndex& at : found) add_row_and_column_sums(chunk, at);
      } else {
        cut_.for_each_block(chunk, [&](const BlockIndex& at, int64_t item) { form_block(chunk, at, item); });
        add_sums(cut_.items(chunk));
        for (int64_t t = 0; t < cut_.stripes; ++t)
          for (int64_t b = 0; b < chunk.blocks; ++b) add_row_and_column_sums(chunk, {.stripe = t, .block = b});
      }
      gradients_.multiply(chunk);
    });
    gradients_.finish(factor_, row_total_, column_total_);
    return scale_gradient();
  }

 private:
  int64_t blocks() const { return divide_up(cut_.chunk, cut_.block); }

  static ClassWeights<T> weights(const SideWeights<T>& side, int64_t i) {
    return {.weight = side.weight(i), .reference = side.reference(i), .log2 = side.log2(i)};
  }

  void form_block(const Chunk& chunk, const BlockIndex& at, int64_t item) {
    const int64_t i0 = at.block * cut_.block, row = chunk.row0 + i0, column = at.stripe * cut_.stripe;
    ClassesGradientBlock<T> b{operands_.block(chunk, at)};
    b.label = classes_.label_column(b.label);
    b.exponents = p_.range.exponents();
    b.classes = classes_.block(row, column);
    for (int c = 0; c < classes_.count(); ++c) {
      b.rows_of[c] = weights(row_side_[c], row);
      b.columns_of[c] = weights((own_ ? row_side_ : column_side_)[c], column);
    }
    b.label_t = label_t_.data() + row;
    b.label_gradient = label_gradient_.data() + row;
    b.kept = state_.kept.block(b, row, column);
    b.out = gradients_.output(at, &scale_sums_[item]);
    b.sum = &sums_[item];
    if (p_.distances) {
      b.row_sum = row_sum_.data() + at.stripe * cut_.chunk + i0;
      b.column_sum = column_sum_.data() + (at.block * cut_.stripes + at.stripe) * kStripe;
    }
    p_.engine.classes_gradient[classes_.kind().index()](b);
  }

  void add_sums(int64_t items) {
    for (int64_t item = 0; item < items; ++item) {
      scale_total_ += scale_sums_[item];
      total_ += sums_[item];
    }
  }

  void add_row_and_column_sums(const Chunk& chunk, const BlockIndex& at) {
    if (!p_.distances) return;
    std::vector<double>& columns = own_ ? row_total_ : column_total_;
    const int64_t i0 = at.block * cut_.block;
    for (int64_t i = i0; i < std::min(chunk.rows, i0 + cut_.block); ++i)
      row_total_[chunk.row0 + i] += row_sum_[at.stripe * cut_.chunk + i];
    for (int64_t j = 0; j < cut_.stripe_columns(at.stripe); ++j)
      columns[at.stripe * cut_.stripe + j] += column_sum_[(at.block * cut_.stripes + at.stripe) * kStripe + j];
  }

  // As in backward.h, where labels are counted: what the sum of dS has too much of is taken off at their mean.
  double scale_gradient() const {
    if (in_.label == nullptr) return scale_total_ / factor_;
    double exact = 0, mean_t = 0;
    for (int c = 0; c < classes_.count(); ++c) {
      for (int64_t i = 0; i < p_.n; ++i) exact += state_.rows[c].log2[i] == -INFINITY ? 0 : in_.rows[c][i];
      for (int64_t j = 0; j < p_.m; ++j) exact += state_.columns[c].log2[j] == -INFINITY ? 0 : in_.columns[c][j];
    }
    for (int64_t i = 0; i < p_.n; ++i) {
      if (state_.label_t[i] == -INFINITY) continue;
      exact += in_.label[i];
      mean_t += state_.label_t[i] / double(p_.n);
    }
    return (scale_total_ - mean_t * (total_ - factor_ * exact)) / factor_;
  }

  const Problem<T>& p_;
  const Blocking& cut_;
  const Classes<T>& classes_;
  const bool own_;
  const ClassesState<const T>& state_;
  const ClassesOutputGradients& in_;
  const double factor_;  // that dS has been multiplied by
  std::vector<SideWeights<T>> row_side_, column_side_;
  std::vector<T> label_t_, label_gradient_;
  LogitOperands<T> operands_;
  LogitGradients<T> gradients_;
  std::vector<double> scale_sums_, sums_;  // of the chunk's blocks
  std::vector<T> row_sum_, column_sum_;    // of dS; distances only
  std::vector<double> row_total_, column_total_;
  double scale_total_ = 0, total_ = 0;
};

}  // namespace gapkern::contrastive

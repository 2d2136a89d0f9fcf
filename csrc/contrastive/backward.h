// The softmax losses' backward pass on the CPU: dS block by block, and what dX, dY and d scale sum from it.
#pragma once
#include <vector>

#include "contrastive/gradients.h"
#include "contrastive/side_weights.h"

namespace gapkern::contrastive {

// Of the loss by the forward pass's outputs.
struct OutputGradients {
  const double *rows, *columns, *label;  // [n], [m], [n]
};

template <class T>
struct InputGradients {
  T *images, *texts;  // [n, d], [m, d]; null: not wanted
  double* logit_scale;
};

template <class T>
class BackwardPass {
 public:
  // `sums`: the kernel writes sums over rows and over columns.
  BackwardPass(const Problem<T>& problem, const Softmax<const T>& state, const OutputGradients& in,
               const InputGradients<T>& out, bool sums)
      : p_(problem),
        cut_(problem.blocking),
        state_(state),
        in_(in),
        out_(out),
        sums_wanted_(sums),
        factor_(factor_in_gradients(problem)),
        row_side_(p_.range, state.rows, in.rows, factor_),
        column_side_(p_.range, state.columns, in.columns, factor_),
        label_t_(p_.n),
        label_gradient_(p_.n),
        operands_(problem, cut_.chunk),
        gradients_(problem, out.images, out.texts),
        scale_sums_(cut_.stripes * blocks()),
        sums_(cut_.stripes * blocks()),
        row_sum_(sums ? cut_.stripes * cut_.chunk : 0),
        column_sum_(sums ? blocks() * cut_.stripes * kStripe : 0),
        row_total_(sums ? p_.n : 0, 0.),
        column_total_(sums ? p_.m : 0, 0.) {}

  void run() {
    begin();
    cut_.for_each_chunk(cut_.chunk, [&](const Chunk& chunk) {
      pack(chunk);
      cut_.for_each_block(chunk,
                          [&](const BlockIndex& at, int64_t item) { p_.engine.gradient(block(chunk, at, item)); });
      finish(chunk);
    });
    end();
  }

  // The steps of `run`.
  void begin() {
    form_label_gradients();
    if (!state_.kept.reaches(p_.n)) operands_.pack_texts();
  }
  void pack(const Chunk& chunk) {
    if (!state_.kept.reaches(chunk.row0 + chunk.rows)) operands_.pack_images(chunk);
  }

  GradientBlock<T> block(const Chunk& chunk, const BlockIndex& at, int64_t item) {
    const int64_t i0 = at.block * cut_.block, row = chunk.row0 + i0, column = at.stripe * cut_.stripe;
    GradientBlock<T> b{operands_.block(chunk, at)};
    b.exponents = p_.range.exponents();
    b.row_weight = row_side_.weight(row);
    b.row_reference = row_side_.reference(row);
    b.row_log2 = row_side_.log2(row);
    b.column_weight = column_side_.weight(column);
    b.column_reference = column_side_.reference(column);
    b.column_log2 = column_side_.log2(column);
    b.label_t = label_t_.data() + row;
    b.label_gradient = label_gradient_.data() + row;
    b.kept = state_.kept.block(b, row, column);
    b.out = gradients_.output(at, &scale_sums_[item]);
    b.sum = &sums_[item];
    if (sums_wanted_) {
      b.row_sum = row_sum_.data() + at.stripe * cut_.chunk + i0;
      b.column_sum = column_sum_.data() + (at.block * cut_.stripes + at.stripe) * kStripe;
    }
    return b;
  }
  void finish(const Chunk& chunk) {
    add_sums(chunk);
    if (sums_wanted_) add_row_and_column_sums(chunk);
    gradients_.multiply(chunk);
  }
  void end() {
    *out_.logit_scale = scale_gradient();
    gradients_.finish(factor_, row_total_, column_total_);
  }

  // What the kernel summed, over all of the other side.
  const std::vector<double>& row_totals() const { return row_total_; }
  const std::vector<double>& column_totals() const { return column_total_; }
  double factor() const { return factor_; }

 private:
  int64_t blocks() const { return divide_up(cut_.chunk, cut_.block); }

  void form_label_gradients() {
    for (int64_t i = 0; i < p_.n; ++i) {
      const double t = state_.label_t[i];
      label_t_[i] = T(t);
      label_gradient_[i] =
          T(factor_ * (row_side_.at_label(i, t) + column_side_.at_label(i + p_.label_offset, t) + in_.label[i]));
    }
  }

  void add_sums(const Chunk& chunk) {
    for (int64_t item = 0; item < cut_.items(chunk); ++item) {
      scale_total_ += scale_sums_[item];
      total_ += sums_[item];
    }
  }

  void add_row_and_column_sums(const Chunk& chunk) {
    for (int64_t t = 0; t < cut_.stripes; ++t) {
      for (int64_t i = 0; i < chunk.rows; ++i) row_total_[chunk.row0 + i] += row_sum_[t * cut_.chunk + i];
      for (int64_t b = 0; b < chunk.blocks; ++b)
        for (int64_t j = 0; j < cut_.stripe_columns(t); ++j)
          column_total_[t * cut_.stripe + j] += column_sum_[(b * cut_.stripes + t) * kStripe + j];
    }
  }

  // The sum of dS is known exactly, since softmaxes sum to 1. What the computed one has too much of, as where kept
  // logits are coarse and the labels do not cancel it, is taken off at the labels' mean.
  double scale_gradient() const {
    double exact = 0, mean_t = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      exact += in_.rows[i] + in_.label[i];
      mean_t += state_.label_t[i] / double(p_.n);
    }
    for (int64_t j = 0; j < p_.m; ++j) exact += in_.columns[j];
    return (scale_total_ - mean_t * (total_ - factor_ * exact)) / factor_;
  }

  const Problem<T>& p_;
  const Blocking& cut_;
  const Softmax<const T>& state_;
  const OutputGradients& in_;
  const InputGradients<T>& out_;
  const bool sums_wanted_;
  const double factor_;  // that dS has been multiplied by
  const SideWeights<T> row_side_, column_side_;
  std::vector<T> label_t_, label_gradient_;
  LogitOperands<T> operands_;
  LogitGradients<T> gradients_;
  std::vector<double> scale_sums_, sums_;  // of the chunk's blocks
  std::vector<T> row_sum_, column_sum_;    // of the chunk's blocks; where wanted
  std::vector<double> row_total_, column_total_;
  double scale_total_ = 0, total_ = 0;
};

}  // namespace gapkern::contrastive

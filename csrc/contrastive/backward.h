// The softmax losses' backward pass on the CPU.
#pragma once
#include "contrastive/gradient_pass.h"

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
        state_(state),
        in_(in),
        out_(out),
        pass_(problem, out.images, out.texts, sums),
        row_side_(p_.range, state.rows, in.rows, pass_.factor()),
        column_side_(p_.range, state.columns, in.columns, pass_.factor()) {}

  void run() {
    begin();
    p_.blocking.for_each_chunk(p_.blocking.chunk, [&](const Chunk& chunk) {
      pack(chunk);
      p_.blocking.for_each_block(
          chunk, [&](const BlockIndex& at, int64_t item) { p_.engine.gradient(block(chunk, at, item)); });
      finish(chunk);
    });
    end();
  }

  // The steps of `run`.
  void begin() {
    for (int64_t i = 0; i < p_.n; ++i) {
      const double t = state_.label_t[i];
      pass_.set_label(i, t, row_side_.at_label(i, t) + column_side_.at_label(i + p_.label_offset, t) + in_.label[i]);
    }
  }
  void pack(const Chunk& chunk) { pass_.pack(chunk, state_.kept); }
  GradientBlock<T> block(const Chunk& chunk, const BlockIndex& at, int64_t item) {
    const int64_t row = chunk.row0 + at.block * p_.blocking.block, column = at.stripe * p_.blocking.stripe;
    auto b = pass_.template begin<GradientBlock<T>>(chunk, at, item, state_.kept);
    b.row_weight = row_side_.weight(row);
    b.row_reference = row_side_.reference(row);
    b.row_log2 = row_side_.log2(row);
    b.column_weight = column_side_.weight(column);
    b.column_reference = column_side_.reference(column);
    b.column_log2 = column_side_.log2(column);
    return b;
  }
  void finish(const Chunk& chunk) { pass_.finish(chunk); }
  void end() {
    *out_.logit_scale = scale_gradient();
    pass_.end();
  }

  // What the kernel summed, over all of the other side.
  const std::vector<double>& row_totals() const { return pass_.row_totals(); }
  const std::vector<double>& column_totals() const { return pass_.column_totals(); }
  double factor() const { return pass_.factor(); }

 private:
  // The sum of dS is known exactly, since softmaxes sum to 1.
  double scale_gradient() const {
    double exact = 0, mean_t = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      exact += in_.rows[i] + in_.label[i];
      mean_t += state_.label_t[i] / double(p_.n);
    }
    for (int64_t j = 0; j < p_.m; ++j) exact += in_.columns[j];
    return pass_.scale_gradient(exact, mean_t);
  }

  const Problem<T>& p_;
  const Softmax<const T>& state_;
  const OutputGradients& in_;
  const InputGradients<T>& out_;
  GradientPass<T> pass_;
  const SideWeights<T> row_side_, column_side_;
};

}  // namespace gapkern::contrastive

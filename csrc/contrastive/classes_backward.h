// The backward pass over classes of pairs on the CPU: dS by the class of a pair.
#pragma once
#include <vector>

#include "contrastive/classes.h"
#include "contrastive/gradient_pass.h"

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
        classes_(classes),
        own_(classes.kind().own),
        state_(state),
        in_(in),
        pass_(problem, images, texts, problem.distances, own_) {
    for (int c = 0; c < classes_.count(); ++c) {
      row_side_.emplace_back(p_.range, state.rows[c], in.rows[c], pass_.factor());
      if (!own_) column_side_.emplace_back(p_.range, state.columns[c], in.columns[c], pass_.factor());
    }
    for (int64_t i = 0; in_.label != nullptr && i < p_.n; ++i)
      if (state_.label_t[i] != -INFINITY) pass_.set_label(i, state_.label_t[i], in_.label[i]);
  }

  // The gradient of logit_scale.
  double run() {
    p_.blocking.for_each_chunk(p_.blocking.chunk, [&](const Chunk& chunk) {
      pass_.pack(chunk, state_.kept);
      const std::vector<BlockIndex> found = pass_.blocks_of(chunk);
      parallel(int64_t(found.size()), [&](int64_t item) { form_block(chunk, found[item], item); });
      pass_.finish(chunk);
    });
    pass_.end();
    return scale_gradient();
  }

 private:
  static ClassWeights<T> weights(const SideWeights<T>& side, int64_t i) {
    return {.weight = side.weight(i), .reference = side.reference(i), .log2 = side.log2(i)};
  }

  void form_block(const Chunk& chunk, const BlockIndex& at, int64_t item) {
    const int64_t row = chunk.row0 + at.block * p_.blocking.block, column = at.stripe * p_.blocking.stripe;
    auto b = pass_.template begin<ClassesGradientBlock<T>>(chunk, at, item, state_.kept);
    b.label = classes_.label_column(b.label);
    b.classes = classes_.block(row, column);
    for (int c = 0; c < classes_.count(); ++c) {
      b.rows_of[c] = weights(row_side_[c], row);
      b.columns_of[c] = weights((own_ ? row_side_ : column_side_)[c], column);
    }
    p_.engine.classes_gradient[classes_.kind().index()](b);
  }

  // As in backward.h, where labels are counted.
  double scale_gradient() const {
    if (in_.label == nullptr) return pass_.scale_gradient();
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
    return pass_.scale_gradient(exact, mean_t);
  }

  const Problem<T>& p_;
  const Classes<T>& classes_;
  const bool own_;
  const ClassesState<const T>& state_;
  const ClassesOutputGradients& in_;
  GradientPass<T> pass_;
  std::vector<SideWeights<T>> row_side_, column_side_;
};

}  // namespace gapkern::contrastive

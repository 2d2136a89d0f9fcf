// The forward pass over classes of pairs on the CPU: blocks of logits to log-sum-exps of rows and columns by class.
#pragma once
#include <vector>

#include "contrastive/classes.h"

namespace gapkern::contrastive {

struct ClassesLogSumExps {
  double *rows[kClasses], *columns[kClasses];  // [n], [m]; of a side with itself columns are null
  double* label;                               // [n]; null unless labels are counted
};

template <class T>
class ClassesForwardPass {
 public:
  ClassesForwardPass(const Problem<T>& problem, const Classes<T>& classes, const ClassesState<T>& state,
                     const ClassesLogSumExps& out)
      : p_(problem),
        cut_(problem.blocking),
        classes_(classes),
        state_(state),
        out_(out),
        operands_(problem, cut_.forward_chunk),
        sign_(p_.range.k() < 0 ? -1 : 1),
        padded_(cut_.stripes * kStripe),
        label_t_(p_.n, -INFINITY) {
    const size_t rows = cut_.stripes * cut_.forward_chunk;
    const size_t columns = divide_up(cut_.forward_chunk, cut_.block) * padded_;
    for (int c = 0; c < classes_.count(); ++c) {
      Sums& sums = sums_[c];
      sums.row.resize(rows);
      sums.column.resize(columns);
      if (p_.range.tracked()) {
        sums.row_largest.resize(rows);
        sums.column_largest.resize(columns);
      }
      sums.rows.resize(p_.n);
      sums.columns.resize(p_.m);
    }
  }

  void run() {
    operands_.pack_texts();
    cut_.for_each_chunk(cut_.forward_chunk, [&](const Chunk& chunk) {
      operands_.pack_images(chunk);
      if (classes_.kind().own) {
        const std::vector<BlockIndex> blocks = cut_.blocks_above(chunk);
        parallel(int64_t(blocks.size()), [&](int64_t item) { sum_block(chunk, blocks[item]); });
      } else {
        cut_.for_each_block(chunk, [&](const BlockIndex& at, int64_t) { sum_block(chunk, at); });
      }
      for (int c = 0; c < classes_.count(); ++c) {
        add_to_rows(chunk, sums_[c]);
        add_to_columns(chunk, sums_[c]);
      }
    });
    finish();
  }

 private:
  // Partial sums of the chunk, a row's for each stripe and a column's for each block, and the totals.
  struct Sums {
    std::vector<T> row, column, row_largest, column_largest;
    std::vector<Exponentials> rows, columns;
  };

  int64_t row_at(int64_t stripe, int64_t i) const { return stripe * cut_.forward_chunk + i; }
  int64_t column_at(int64_t block, int64_t stripe) const { return block * padded_ + stripe * kStripe; }
  // Of a side with itself: whether the block reaches above the diagonal.
  bool there(const Chunk& chunk, int64_t block, int64_t stripe) const {
    return !classes_.kind().own || cut_.end_of_stripe(stripe) > chunk.row0 + block * cut_.block;
  }

  void sum_block(const Chunk& chunk, const BlockIndex& at) {
    const int64_t i0 = at.block * cut_.block, row = row_at(at.stripe, i0), column = column_at(at.block, at.stripe);
    ClassesForwardBlock<T> b{operands_.block(chunk, at)};
    b.label = classes_.label_column(b.label);
    b.exponents = p_.range.exponents();
    b.classes = classes_.block(chunk.row0 + i0, at.stripe * cut_.stripe);
    for (int c = 0; c < classes_.count(); ++c) {
      b.row_sum[c] = sums_[c].row.data() + row;
      b.column_sum[c] = sums_[c].column.data() + column;
      if (!p_.range.tracked()) continue;
      b.row_largest[c] = sums_[c].row_largest.data() + row;
      b.column_largest[c] = sums_[c].column_largest.data() + column;
    }
    b.label_t = label_t_.data() + chunk.row0 + i0;
    b.kept = state_.kept.block(b, chunk.row0 + i0, at.stripe * cut_.stripe);
    p_.engine.classes_forward[classes_.kind().index()](b);
  }

  // In units of t, of the sum at `at`.
  double reference(const std::vector<T>& largest, int64_t at) const {
    return p_.range.tracked() ? sign_ * largest[at] : p_.range.reference();
  }

  void add_to_rows(const Chunk& chunk, Sums& sums) {
    const double k = p_.range.k();
    parallel(divide_up(chunk.rows, 64), [&](int64_t g) {
      for (int64_t i = g * 64; i < std::min(chunk.rows, g * 64 + 64); ++i)
        for (int64_t t = 0; t < cut_.stripes; ++t)
          if (there(chunk, i / cut_.block, t))
            sums.rows[chunk.row0 + i].add(sums.row[row_at(t, i)], reference(sums.row_largest, row_at(t, i)), k);
    });
  }

  void add_to_columns(const Chunk& chunk, Sums& sums) {
    const double k = p_.range.k();
    parallel(cut_.stripes, [&](int64_t t) {
      for (int64_t b = 0; b < chunk.blocks; ++b)
        for (int64_t j = 0; there(chunk, b, t) && j < cut_.stripe_columns(t); ++j) {
          const int64_t at = column_at(b, t) + j;
          sums.columns[t * cut_.stripe + j].add(sums.column[at], reference(sums.column_largest, at), k);
        }
    });
  }

  void finish() {
    for (int c = 0; c < kClasses; ++c) {
      const bool counted = c < classes_.count();
      for (int64_t i = 0; i < p_.n; ++i) {
        Exponentials total = counted ? sums_[c].rows[i] : Exponentials();
        if (counted && classes_.kind().own)
          total.add(sums_[c].columns[i].sum, sums_[c].columns[i].reference, p_.range.k());
        set(state_.rows[c], out_.rows[c], i, total);
      }
      for (int64_t j = 0; out_.columns[c] != nullptr && j < p_.m; ++j)
        set(state_.columns[c], out_.columns[c], j, counted ? sums_[c].columns[j] : Exponentials());
    }
    for (int64_t i = 0; out_.label != nullptr && i < p_.n; ++i) {
      state_.label_t[i] = double(label_t_[i]);
      out_.label[i] = label_t_[i] == -INFINITY ? -INFINITY : p_.scale * double(label_t_[i]);
    }
  }
  void set(const Statistics<double>& stats, double* out, int64_t i, const Exponentials& total) const {
    stats.set(i, total);
    out[i] = stats.lse(i, p_.scale);
  }

  const Problem<T>& p_;
  const Blocking& cut_;
  const Classes<T>& classes_;
  const ClassesState<T>& state_;
  const ClassesLogSumExps& out_;
  LogitOperands<T> operands_;
  const double sign_;
  const int64_t padded_;  // columns, each stripe to kStripe
  Sums sums_[kClasses];
  std::vector<T> label_t_;
};

}  // namespace gapkern::contrastive

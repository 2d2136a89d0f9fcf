// The softmax losses' forward pass on the CPU: blocks of logits to the log-sum-exps of rows and columns.
#pragma once
#include <vector>

#include "contrastive/packing.h"
#include "contrastive/softmax.h"

namespace gapkern::contrastive {

struct LogSumExps {
  double *rows, *columns;  // [n], [m]
  double* label;           // [n]: the logits at the labels
};

template <class T>
class ForwardPass {
 public:
  ForwardPass(const Problem<T>& problem, const Softmax<T>& state, const LogSumExps& out)
      : p_(problem),
        cut_(problem.blocking),
        state_(state),
        out_(out),
        operands_(problem, cut_.forward_chunk),
        sign_(p_.range.k() < 0 ? -1 : 1),
        padded_(cut_.stripes * kStripe),
        row_sum_(cut_.stripes * cut_.forward_chunk),
        column_sum_(divide_up(cut_.forward_chunk, cut_.block) * padded_),
        row_largest_(p_.range.tracked() ? row_sum_.size() : 0),
        column_largest_(p_.range.tracked() ? column_sum_.size() : 0),
        label_t_(p_.n),
        columns_(p_.m) {}

  void run() {
    begin();
    cut_.for_each_chunk(cut_.forward_chunk, [&](const Chunk& chunk) {
      pack(chunk);
      cut_.for_each_block(chunk, [&](const BlockIndex& at, int64_t) { p_.engine.forward(block(chunk, at)); });
      finish(chunk);
    });
    end();
  }

  // The steps of `run`. Chunks may be shorter than forward_chunk.
  void begin() { operands_.pack_texts(); }
  void pack(const Chunk& chunk) { operands_.pack_images(chunk); }
  ForwardBlock<T> block(const Chunk& chunk, const BlockIndex& at) {
    const int64_t i0 = at.block * cut_.block, row = row_at(at.stripe, i0), column = column_at(at.block, at.stripe);
    ForwardBlock<T> b{operands_.block(chunk, at)};
    b.exponents = p_.range.exponents();
    b.row_sum = row_sum_.data() + row;
    b.column_sum = column_sum_.data() + column;
    if (p_.range.tracked()) {
      b.row_largest = row_largest_.data() + row;
      b.column_largest = column_largest_.data() + column;
    }
    b.label_t = label_t_.data() + chunk.row0 + i0;
    b.kept = state_.kept.block(b, chunk.row0 + i0, at.stripe * cut_.stripe);
    return b;
  }
  void finish(const Chunk& chunk) {
    finish_rows(chunk);
    add_to_columns(chunk);
  }
  void end() { finish_columns(); }

 private:
  // Blocks are summed in parallel: rows have a partial sum for each stripe, columns one for each block.
  int64_t row_at(int64_t stripe, int64_t i) const { return stripe * cut_.forward_chunk + i; }
  int64_t column_at(int64_t block, int64_t stripe) const { return block * padded_ + stripe * kStripe; }

  // In units of t, of the sum at `at`.
  double reference(const std::vector<T>& largest, int64_t at) const {
    return p_.range.tracked() ? sign_ * largest[at] : p_.range.reference();
  }

  void finish_rows(const Chunk& chunk) {
    const double k = p_.range.k();
    parallel(divide_up(chunk.rows, 64), [&](int64_t g) {
      for (int64_t i = g * 64; i < std::min(chunk.rows, g * 64 + 64); ++i) {
        Exponentials total;
        for (int64_t t = 0; t < cut_.stripes; ++t)
          total.add(row_sum_[row_at(t, i)], reference(row_largest_, row_at(t, i)), k);
        const int64_t row = chunk.row0 + i;
        const double label_t = double(label_t_[row]);
        state_.label_t[row] = label_t;
        state_.rows.set(row, total, p_.scale, label_t);
        out_.rows[row] = state_.rows.lse(row, p_.scale);
        out_.label[row] = p_.scale * label_t;
      }
    });
  }

  void add_to_columns(const Chunk& chunk) {
    const double k = p_.range.k();
    parallel(cut_.stripes, [&](int64_t t) {
      for (int64_t b = 0; b < chunk.blocks; ++b)
        for (int64_t j = 0; j < cut_.stripe_columns(t); ++j) {
          const int64_t at = column_at(b, t) + j;
          columns_[t * cut_.stripe + j].add(column_sum_[at], reference(column_largest_, at), k);
        }
    });
  }

  void finish_columns() {
    for (int64_t j = 0; j < p_.m; ++j) {
      const int64_t row = j - p_.label_offset;
      if (row >= 0 && row < p_.n)
        state_.columns.set(j, columns_[j], p_.scale, state_.label_t[row]);
      else
        state_.columns.set(j, columns_[j]);
      out_.columns[j] = state_.columns.lse(j, p_.scale);
    }
  }

  const Problem<T>& p_;
  const Blocking& cut_;
  const Softmax<T>& state_;
  const LogSumExps& out_;
  LogitOperands<T> operands_;
  const double sign_;
  const int64_t padded_;  // columns, each stripe to kStripe
  std::vector<T> row_sum_, column_sum_, row_largest_, column_largest_, label_t_;
  std::vector<Exponentials> columns_;
};

}  // namespace gapkern::contrastive

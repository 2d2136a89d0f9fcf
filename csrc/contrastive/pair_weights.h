// Positives of the sigmoid loss by ids on the CPU: what the operator is given, in the kernels' form.
#pragma once
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "contrastive/arguments.h"

namespace gapkern::contrastive {

struct SigmoidClasses {
  Tensor row_ids, column_ids;          // [N], [M] int64
  Tensor row_weights, column_weights;  // [N], [M] float64
  bool soft_targets;
};

// Contiguous and in the kernels' types.
inline SigmoidClasses check_classes(const Arguments& a, SigmoidClasses c) {
  const auto check_count = [](const char* name, const Tensor& given, int64_t count) {
    STD_TORCH_CHECK(given.numel() == count, name, ": expected ", count, " elements, got ", given.numel());
  };
  check_count("row_ids", c.row_ids, a.n());
  check_count("col_ids", c.column_ids, a.m());
  check_count("row_weights", c.row_weights, a.n());
  check_count("col_weights", c.column_weights, a.m());
  STD_TORCH_CHECK(c.row_ids.scalar_type() == ScalarType::Long && c.column_ids.scalar_type() == ScalarType::Long,
                  "row_ids and col_ids: expected int64");
  c.row_ids = as_type(c.row_ids, ScalarType::Long);
  c.column_ids = as_type(c.column_ids, ScalarType::Long);
  c.row_weights = as_type(c.row_weights, ScalarType::Double);
  c.column_weights = as_type(c.column_weights, ScalarType::Double);
  return c;
}

template <class T>
class PairWeights {
 public:
  explicit PairWeights(const SigmoidClasses& c)
      : soft_(c.soft_targets), row_weight_(weights(c.row_weights)), column_weight_(weights(c.column_weights)) {
    const int64_t *const rows = c.row_ids.const_data_ptr<int64_t>(), n = c.row_ids.numel();
    const int64_t *const columns = c.column_ids.const_data_ptr<int64_t>(), m = c.column_ids.numel();
    const auto fits = [](int64_t id) {
      return id >= std::numeric_limits<Id<T>>::min() && id <= std::numeric_limits<Id<T>>::max();
    };
    row_ids_.resize(n);
    column_ids_.resize(m + kPadding);
    if (std::all_of(rows, rows + n, fits) && std::all_of(columns, columns + m, fits)) {
      std::copy(rows, rows + n, row_ids_.begin());
      std::copy(columns, columns + m, column_ids_.begin());
      return;
    }
    // Places among the columns' ids stand for them; -1: the row has no positive.
    std::vector<int64_t> known(columns, columns + m);
    std::sort(known.begin(), known.end());
    const auto place = [&](int64_t id) {
      const auto found = std::lower_bound(known.begin(), known.end(), id);
      return Id<T>(found != known.end() && *found == id ? found - known.begin() : -1);
    };
    std::transform(rows, rows + n, row_ids_.begin(), place);
    std::transform(columns, columns + m, column_ids_.begin(), place);
  }

  bool soft() const { return soft_; }

  // The block at a row and a column.
  MaskedSigmoidBlock<T> block(const SigmoidBlock<T>& b, int64_t row, int64_t column) const {
    return {b, row_ids_.data() + row, column_ids_.data() + column, row_weight_.data() + row,
            column_weight_.data() + column};
  }

 private:
  static constexpr int64_t kPadding = 64;  // whole vectors are read

  static std::vector<T> weights(const Tensor& given) {
    std::vector<T> found(given.numel() + kPadding, T(0));
    const double* const from = given.const_data_ptr<double>();
    std::transform(from, from + given.numel(), found.begin(), [](double w) { return T(w); });
    return found;
  }

  const bool soft_;
  std::vector<Id<T>> row_ids_, column_ids_;
  const std::vector<T> row_weight_, column_weight_;
};

}  // namespace gapkern::contrastive

// Embeddings for the Hopper kernels of the plain softmax and sigmoid losses.
#pragma once
#include "check.h"
#include "contrastive/sm90.cuh"

using namespace gapkern;
using namespace gapkern::contrastive;
using namespace gapkern::contrastive::sm90;

// With everything the kernels are told. The products between them are formed here.
template <class T>
struct Embeddings {
  int64_t rows, columns, depth, pitch, offset;
  check::vector<T> x, y;
  check::vector<float> scale, row_norms, column_norms, control;
  check::vector<double> row_lse, col_lse, grad_row, grad_col, grad_positive;

  Embeddings(int64_t n, int64_t m, int64_t d, int64_t label_offset, double s, double size, double opposed = 0)
      : rows(n),
        columns(m),
        depth(d),
        pitch((m + 7) / 8 * 8),
        offset(label_offset),
        x(check::random<T>(n * d, size / std::sqrt(d))),
        y(check::random<T>(m * d, size / std::sqrt(d))),
        scale{float(s)},
        row_norms(n),
        column_norms(m),
        control(check::poisoned<float>(2)),
        row_lse(n),
        col_lse(m),
        grad_row(check::random<double>(n, 1e-2)),
        grad_col(check::random<double>(m, 1e-2)),
        grad_positive(check::random<double>(n, 1e-2)) {
    for (int64_t i = 0; opposed != 0 && i < n; ++i) from_wide(float(opposed), &x[i * d]);
    for (int64_t j = 0; opposed != 0 && j < m; ++j) from_wide(float(-opposed), &y[j * d]);
    for (int64_t i = 0; i < n; ++i) row_norms[i] = norm(x, i);
    for (int64_t j = 0; j < m; ++j) column_norms[j] = norm(y, j);
    grad_row[0] = grad_col[m - 1] = 0;
    for (int64_t i = 0; i < n; ++i) row_lse[i] = log_sum(i, true);
    for (int64_t j = 0; j < m; ++j) col_lse[j] = log_sum(j, false);
    simt::launch(1, kShiftThreads, choose_shift, row_norms.data(), n, column_norms.data(), m, scale.data(),
                 control.data());
  }
  float norm(const check::vector<T>& of, int64_t i) const {
    double sum = 0;
    for (int64_t d = 0; d < depth; ++d) sum += std::pow(double(to_wide(of[i * depth + d])), 2);
    return float(std::sqrt(sum));
  }
  double t(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < depth; ++d) sum += double(to_wide(x[i * depth + d])) * double(to_wide(y[j * depth + d]));
    return sum;
  }
  double logit(int64_t i, int64_t j) const { return double(scale[0]) * t(i, j); }
  // -inf of nothing.
  double log_sum(int64_t at, bool of_row, bool with_label = true) const {
    const int64_t count = of_row ? columns : rows, label = of_row ? at + offset : at - offset;
    double most = -INFINITY, sum = 0;
    for (const bool second : {false, true})
      for (int64_t other = 0; other < count; ++other) {
        if (other == label && !with_label) continue;
        const double v = of_row ? logit(at, other) : logit(other, at);
        most = second ? most : std::max(most, v);
        sum += second ? std::exp(v - most) : 0;
      }
    return most + std::log(sum);
  }
  Products<T> products(bool transposed = false) const {
    if (transposed) return {y.data(), x.data(), columns, rows, depth};
    return {x.data(), y.data(), rows, columns, depth};
  }
  check::vector<double> lse2(bool of_row) const {
    check::vector<double> scaled = of_row ? row_lse : col_lse;
    for (double& v : scaled) v *= kLog2e;
    return scaled;
  }
};

// A chunk of products, and what becomes of the partial sums of its tiles.
#pragma once
#include "check.h"
#include "contrastive/kernels.cuh"

using namespace gapkern;
using namespace gapkern::contrastive;

// A chunk of products in float64 with everything the kernels are told.
template <class R>
struct Problem {
  int64_t rows, columns, label_offset;
  check::vector<R> products, row_norms, column_norms, scale, bias;
  bool euclidean;
  dim3 grid;

  Problem(int64_t n, int64_t m, int64_t offset, double s, bool squared)
      : rows(n),
        columns(m),
        label_offset(offset),
        products(check::random<R>(n * m, 0.4)),
        row_norms(n),
        column_norms(m),
        scale{R(s)},
        bias{R(-3)},
        euclidean(squared),
        grid(unsigned((m + kTileColumns - 1) / kTileColumns), unsigned((n + kTileRows - 1) / kTileRows)) {
    for (R& v : row_norms) v = R(1 + 0.1 * check::normal());
    for (R& v : column_norms) v = R(1 + 0.1 * check::normal());
  }
  Chunk<R> chunk() const {
    return {products.data(), euclidean ? row_norms.data() : nullptr, euclidean ? column_norms.data() : nullptr, rows,
            columns};
  }
  virtual ~Problem() = default;
  virtual double t(int64_t i, int64_t j) const {
    const double p = double(products[i * columns + j]);
    return euclidean ? 2 * p - double(row_norms[i]) - double(column_norms[j]) : p;
  }
  double logit(int64_t i, int64_t j) const { return double(scale[0]) * t(i, j); }
  int64_t tiles() const { return grid.x * int64_t(grid.y); }
};

inline check::vector<double> combined(const check::vector<Partial>& part, int64_t tiles, int64_t count) {
  check::vector<double> out = check::poisoned<double>(count);
  simt::launch(unsigned((count + 63) / 64), 64, lse_combine, part.data(), tiles, count, out.data());
  return out;
}

// Sums over tiles of what store_tile() writes.
template <class R>
double sums_error(const Problem<R>& p, const check::vector<double>& ds, const check::vector<double>& of_scale,
                  const check::vector<R>& row_part, const check::vector<R>& column_part) {
  double scale_truth = 0, scale_size = 0, scale = 0;
  check::vector<double> row(p.rows), column(p.columns), row_truth(p.rows), column_truth(p.columns);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      const double w = ds[i * p.columns + j];
      scale_truth += w * p.t(i, j);
      scale_size += std::abs(w * p.t(i, j));
      row_truth[i] += w;
      column_truth[j] += w;
    }
  for (const double v : of_scale) scale += v;
  double worst = std::abs(scale - scale_truth) / scale_size;
  if (!p.euclidean) return worst;
  for (size_t i = 0; i < row_part.size(); ++i) row[i % p.rows] += double(row_part[i]);
  for (size_t j = 0; j < column_part.size(); ++j) column[j % p.columns] += double(column_part[j]);
  return check::largest({worst, check::error(row, row_truth, 1e-2), check::error(column, column_truth, 1e-2)});
}

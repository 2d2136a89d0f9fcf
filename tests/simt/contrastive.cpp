#include "chunk.h"

template <class R, bool pack>
void statistics(const std::string& name, double tolerance, const Problem<R>& p) {
  check::vector<double> row(p.rows), column(p.columns);
  // All but the labels.
  const auto other = [&](int64_t i, int64_t j) { return j == i + p.label_offset ? -INFINITY : p.logit(i, j); };
  for (int64_t i = 0; i < p.rows; ++i) {
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < p.columns; ++j) most = std::max(most, other(i, j));
    for (int64_t j = 0; j < p.columns; ++j) sum += std::exp(other(i, j) - most);
    row[i] = most + std::log(sum);
  }
  for (int64_t j = 0; j < p.columns; ++j) {
    double most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < p.rows; ++i) most = std::max(most, other(i, j));
    for (int64_t i = 0; i < p.rows; ++i) sum += std::exp(other(i, j) - most);
    column[j] = most + std::log(sum);
  }
  check::kernel("log-sum-exps " + name, tolerance, [&] {
    check::vector<Partial> row_part = check::poisoned<Partial>(p.grid.x * p.rows);
    check::vector<Partial> column_part = check::poisoned<Partial>(p.grid.y * p.columns);
    simt::launch(p.grid, kTileThreads, lse_tiles<R, pack>, p.chunk(), p.scale.data(), p.label_offset, row_part.data(),
                 column_part.data());
    return check::largest({check::error(combined(row_part, p.grid.x, p.rows), row, 1),
                           check::error(combined(column_part, p.grid.y, p.columns), column, 1)});
  });
}

template <class R, class O, bool pack>
void gradient(const std::string& name, double tolerance, const Problem<R>& p) {
  // Above every logit, as true log-sum-exps are: no weight exceeds a gradient.
  check::vector<double> row_lse(p.rows, -1e30), col_lse(p.columns, -1e30);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      row_lse[i] = std::max(row_lse[i], kLog2e * p.logit(i, j));
      col_lse[j] = std::max(col_lse[j], kLog2e * p.logit(i, j));
    }
  const check::vector<R> grad_row = check::random<R>(p.rows), grad_col = check::random<R>(p.columns);
  const check::vector<R> grad_label = check::random<R>(p.rows);
  check::vector<double> truth(p.rows * p.columns);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j)
      truth[i * p.columns + j] = j == i + p.label_offset
                                     ? double(grad_label[i])
                                     : double(grad_row[i]) * std::exp(p.logit(i, j) - kLn2 * row_lse[i]) +
                                           double(grad_col[j]) * std::exp(p.logit(i, j) - kLn2 * col_lse[j]);
  check::kernel("dS " + name, tolerance, [&] {
    check::vector<O> ds = check::poisoned<O>(p.rows * p.columns);
    check::vector<double> of_scale = check::poisoned<double>(p.tiles());
    check::vector<R> rows = check::poisoned<R>(p.grid.x * p.rows), columns = check::poisoned<R>(p.grid.y * p.columns);
    const TileSums<R> sums{of_scale.data(), p.euclidean ? rows.data() : nullptr,
                           p.euclidean ? columns.data() : nullptr};
    const Weights<R> weights{row_lse.data(), grad_row.data(), grad_label.data(),
                             col_lse.data(), grad_col.data(), p.label_offset};
    simt::launch(p.grid, kTileThreads, lse_gradient<R, O, pack>, p.chunk(), p.scale.data(), weights, sums, ds.data());
    return check::largest({check::error(ds, truth, 1e-2), sums_error(p, truth, of_scale, rows, columns)});
  });
}

template <class R, class O, bool pack>
void sigmoid(const std::string& name, double tolerance, const Problem<R>& p) {
  check::vector<double> truth(p.rows * p.columns);
  double loss_truth = 0, bias_truth = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      const double z = j == i + p.label_offset ? 1 : -1, u = z * (p.logit(i, j) + double(p.bias[0]));
      loss_truth += std::max(-u, 0.) + std::log1p(std::exp(-std::abs(u)));
      truth[i * p.columns + j] = -z / (1 + std::exp(u));
      bias_truth += truth[i * p.columns + j];
    }
  check::kernel("sigmoid loss " + name, tolerance, [&] {
    check::vector<O> ds = check::poisoned<O>(p.rows * p.columns);
    check::vector<double> loss = check::poisoned<double>(p.tiles()), of_bias = loss, of_scale = loss;
    const TileSums<R> sums{of_scale.data(), nullptr, nullptr};
    simt::launch(p.grid, kTileThreads, sigmoid_tiles<R, O, pack>, p.chunk(), p.scale.data(), p.bias.data(),
                 p.label_offset, sums, loss.data(), of_bias.data(), ds.data());
    double loss_sum = 0, bias_sum = 0;
    for (int64_t i = 0; i < p.tiles(); ++i) loss_sum += loss[i], bias_sum += of_bias[i];
    return check::largest({check::error(ds, truth, 1e-1), sums_error(p, truth, of_scale, {}, {}),
                           std::abs(loss_sum / loss_truth - 1), std::abs(bias_sum / bias_truth - 1)});
  });
}

int main() {
  const Problem<float> ragged(70, 150, 3, 20, false), even(64, 256, -5, 100, false), squared(67, 132, 0, 10, true);
  // A row and a column without a finite logit in one tile, but with some in another.
  Problem<float> excluded(70, 150, 3, 20, false);
  for (int64_t j = 0; j < kTileColumns; ++j) excluded.products[5 * 150 + j] = -INFINITY;
  for (int64_t i = 0; i < kTileRows; ++i) excluded.products[i * 150 + 9] = -INFINITY;
  // A row whose label has a tile of its own, and logits of which none is near zero.
  Problem<float> alone(65, 129, 128, 1e4, false);
  for (float& v : alone.products) v -= 3;
  const Problem<double> wide(66, 130, 100, 50, true);
  // Logits a thousand apart: no common shift of the exponents would do.
  const Problem<float> extreme(65, 140, 0, 1e4, false);
  statistics<float, false>("ragged", 2e-6, ragged);
  statistics<float, true>("16 bytes at a time", 2e-6, even);
  statistics<float, true>("squared distances", 2e-6, squared);
  statistics<float, true>("logits far apart", 2e-6, extreme);
  statistics<float, false>("a label alone in its tile", 2e-6, alone);
  statistics<float, false>("nothing finite in a tile's row and column", 2e-6, excluded);
  statistics<double, false>("float64", 1e-13, wide);
  gradient<float, float, false>("ragged", 1e-4, ragged);
  gradient<float, BFloat16, true>("bfloat16", 5e-3, even);
  gradient<float, Half, true>("float16, squared distances", 1e-3, squared);
  gradient<double, double, false>("float64, label beyond most rows", 1e-12, wide);
  sigmoid<float, float, false>("ragged", 1e-5, ragged);
  sigmoid<float, BFloat16, true>("bfloat16", 5e-3, even);
  sigmoid<double, double, false>("float64", 1e-12, Problem<double>(66, 130, 2, 5, false));
  return check::result();
}

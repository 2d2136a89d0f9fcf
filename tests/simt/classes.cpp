#include "contrastive/classes.cuh"

#include "chunk.h"

// A chunk whose pairs are of classes. What decides them is computed as the kernels do, everything else in float64.
template <class R>
struct Classified : Problem<R> {
  using Problem<R>::rows, Problem<R>::columns, Problem<R>::products, Problem<R>::euclidean;
  check::vector<int64_t> row_ids, column_ids;
  check::vector<R> row_limit, column_limit, guide, guide_row_limit, guide_column_limit;
  bool positive = true, ids = true, limits = true, guided = true, row_limits_alone = false;

  Classified(int64_t n, int64_t m, int64_t offset, double s, bool squared, int values = 5)
      : Problem<R>(n, m, offset, s, squared),
        row_ids(n),
        column_ids(m),
        row_limit(check::random<R>(n, 0.3)),
        column_limit(check::random<R>(m, 0.3)),
        guide(check::random<R>(n * m)),
        guide_row_limit(check::random<R>(n)),
        guide_column_limit(check::random<R>(m)) {
    // Alike in their lower half.
    for (int64_t& id : row_ids) id = int64_t(check::generator() % values) << 33;
    for (int64_t& id : column_ids) id = int64_t(check::generator() % values) << 33;
    for (R& limit : row_limit) limit += R(squared ? -0.7 : 0.6);
    for (R& limit : column_limit) limit += R(squared ? -0.7 : 0.6);
    for (R& limit : guide_row_limit) limit += 1;
    for (R& limit : guide_column_limit) limit += 1;
  }

  ChunkClasses<R> classes() const {
    return {ids ? row_ids.data() : nullptr,
            ids ? column_ids.data() : nullptr,
            limits ? row_limit.data() : nullptr,
            limits && !row_limits_alone ? column_limit.data() : nullptr,
            guided ? guide.data() : nullptr,
            guided && !row_limits_alone ? guide_row_limit.data() : nullptr,
            guided ? guide_column_limit.data() : nullptr,
            this->label_offset,
            positive && ids};
  }
  R rounded(int64_t i, int64_t j) const {
    const R p = products[i * columns + j];
    return euclidean ? std::min(R(0), R(2 * p - this->row_norms[i] - this->column_norms[j])) : p;
  }
  double t(int64_t i, int64_t j) const override { return double(rounded(i, j)); }
  char kind(int64_t i, int64_t j) const {
    if (j == i + this->label_offset) return 'l';
    const bool equal = ids && row_ids[i] == column_ids[j];
    if (equal) return positive ? 'p' : 'o';
    const R t = rounded(i, j), u = guide[i * columns + j];
    if (limits && (t > row_limit[i] || (!row_limits_alone && t > column_limit[j]))) return 'o';
    if (guided && ((!row_limits_alone && u > guide_row_limit[i]) || u > guide_column_limit[j])) return 'o';
    return 'n';
  }
};

// Log-sum-exps of one class: of the rows, and of the columns.
template <class R>
std::pair<check::vector<double>, check::vector<double>> sums_of(const Classified<R>& p, char kind) {
  check::vector<double> row(p.rows, -INFINITY), column(p.columns, -INFINITY);
  const auto add = [](double& to, double logit) {
    const double most = std::max(to, logit);
    to = most + std::log(std::exp(to - most) + std::exp(logit - most));
  };
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j)
      if (p.kind(i, j) == kind) add(row[i], p.logit(i, j)), add(column[j], p.logit(i, j));
  return {row, column};
}

template <class R, bool pack>
void statistics(const std::string& name, double tolerance, const Classified<R>& p) {
  const int64_t classes = p.classes().positive ? 2 : 1;
  check::kernel("log-sum-exps of classes, " + name, tolerance, [&] {
    check::vector<Partial> rows = check::poisoned<Partial>(classes * p.grid.x * p.rows);
    check::vector<Partial> columns = check::poisoned<Partial>(classes * p.grid.y * p.columns);
    simt::launch(p.grid, kTileThreads, class_tiles<R>, p.chunk(), pack, p.classes(), p.scale.data(), rows.data(),
                 columns.data());
    double worst = 0;
    for (int64_t of = 0; of < classes; ++of) {
      const auto truth = sums_of(p, of == 0 ? 'n' : 'p');
      const check::vector<Partial> of_rows(rows.begin() + of * p.grid.x * p.rows,
                                           rows.begin() + (of + 1) * p.grid.x * p.rows);
      const check::vector<Partial> of_columns(columns.begin() + of * p.grid.y * p.columns,
                                              columns.begin() + (of + 1) * p.grid.y * p.columns);
      worst = check::largest({worst, check::error(combined(of_rows, p.grid.x, p.rows), truth.first, 1),
                              check::error(combined(of_columns, p.grid.y, p.columns), truth.second, 1)});
    }
    return worst;
  });
}

template <class R, class O, bool pack>
void gradient(const std::string& name, double tolerance, const Classified<R>& p, bool at_labels) {
  // Of a class without pairs the log-sum-exp is -inf.
  const auto negative = sums_of(p, 'n'), positive = sums_of(p, 'p');
  check::vector<double> lse[4] = {negative.first, negative.second, positive.first, positive.second};
  for (check::vector<double>& side : lse)
    for (double& v : side) v *= kLog2e;
  const check::vector<R> grads[4] = {check::random<R>(p.rows), check::random<R>(p.columns), check::random<R>(p.rows),
                                     check::random<R>(p.columns)};
  const check::vector<R> grad_label = check::random<R>(p.rows);
  const auto side = [&](int of) {
    return WeightsOfClass<R>{lse[of].data(), grads[of].data(), lse[of + 1].data(), grads[of + 1].data()};
  };
  const WeightsOfClasses<R> weights{side(0), side(2), at_labels ? grad_label.data() : nullptr};
  check::vector<double> truth(p.rows * p.columns);
  double all_truth = 0, all_size = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      const char kind = p.kind(i, j);
      const int of = kind == 'p' ? 2 : 0;
      const double s = p.logit(i, j);
      double& w = truth[i * p.columns + j];
      if (kind == 'l') w = at_labels ? double(grad_label[i]) : 0;
      if (kind == 'n' || kind == 'p')
        w = double(grads[of][i]) * std::exp(s - kLn2 * lse[of][i]) +
            double(grads[of + 1][j]) * std::exp(s - kLn2 * lse[of + 1][j]);
      all_truth += w;
      all_size += std::abs(w);
    }
  check::kernel("dS of classes, " + name, tolerance, [&] {
    check::vector<O> ds = check::poisoned<O>(p.rows * p.columns);
    check::vector<double> of_scale = check::poisoned<double>(p.tiles()), of_all = of_scale;
    check::vector<R> rows = check::poisoned<R>(p.grid.x * p.rows), columns = check::poisoned<R>(p.grid.y * p.columns);
    const TileSums<R> sums{of_scale.data(), p.euclidean ? rows.data() : nullptr,
                           p.euclidean ? columns.data() : nullptr};
    simt::launch(p.grid, kTileThreads, class_gradient<R, O>, p.chunk(), pack, p.classes(), p.scale.data(), weights,
                 sums, of_all.data(), ds.data());
    double all = 0;
    for (const double v : of_all) all += v;
    return check::largest({check::error(ds, truth, 1e-2), sums_error(p, truth, of_scale, rows, columns),
                           std::abs(all - all_truth) / all_size});
  });
}

template <class R, class O, bool pack>
void sigmoid(const std::string& name, double tolerance, const Classified<R>& p, bool soft_targets) {
  check::vector<R> row_weights = check::random<R>(p.rows, 0.1), column_weights = check::random<R>(p.columns, 0.1);
  for (R& w : row_weights) w += R(0.5);
  for (R& w : column_weights) w += R(0.5);
  check::vector<double> truth(p.rows * p.columns);
  double loss_truth = 0, bias_truth = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      const bool equal = p.row_ids[i] == p.column_ids[j];
      const double logit = double(p.scale[0]) * p.t(i, j) + double(p.bias[0]);
      const double a = equal ? double(row_weights[i]) + double(column_weights[j]) : 0;
      const double b = !equal ? 1 : soft_targets ? 1 - a : 0;  // a softplus(-S) + b softplus(S)
      const double up = std::max(logit, 0.) + std::log1p(std::exp(-std::abs(logit))), down = up - logit;
      loss_truth += a * down + b * up;
      truth[i * p.columns + j] = b / (1 + std::exp(-logit)) - a / (1 + std::exp(logit));
      bias_truth += truth[i * p.columns + j];
    }
  check::kernel("sigmoid loss of ids, " + name, tolerance, [&] {
    check::vector<O> ds = check::poisoned<O>(p.rows * p.columns);
    check::vector<double> loss = check::poisoned<double>(p.tiles()), of_bias = loss, of_scale = loss;
    const TileSums<R> sums{of_scale.data(), nullptr, nullptr};
    const WeightedIds<R> ids{p.row_ids.data(), p.column_ids.data(), row_weights.data(), column_weights.data(),
                             soft_targets};
    simt::launch(p.grid, kTileThreads, sigmoid_of_ids<R, O>, p.chunk(), pack, ids, p.scale.data(), p.bias.data(), sums,
                 loss.data(), of_bias.data(), ds.data());
    double loss_sum = 0, bias_sum = 0;
    for (int64_t i = 0; i < p.tiles(); ++i) loss_sum += loss[i], bias_sum += of_bias[i];
    return check::largest({check::error(ds, truth, 1e-1), sums_error(p, truth, of_scale, {}, {}),
                           std::abs(loss_sum / loss_truth - 1), std::abs(bias_sum / bias_truth - 1)});
  });
}

int main() {
  const Classified<float> ragged(70, 150, 3, 20, false), even(64, 256, -5, 100, false), squared(67, 132, 0, 10, true);
  const Classified<double> wide(66, 130, 100, -50, true);
  // Positives alone, no pair of which is near another; a row and a column whose pairs are all positives.
  Classified<float> sparse(65, 140, -1000, 1e4, false, 60);
  sparse.guided = sparse.limits = false;
  for (int64_t j = 0; j < 140; ++j) sparse.column_ids[j] = sparse.row_ids[5];
  for (int64_t i = 0; i < 65; ++i) sparse.row_ids[i] = i % 7 == 5 ? sparse.column_ids[0] : sparse.row_ids[i];
  Classified<float> left_out(67, 132, 1, 10, true), guided(66, 131, 2, 20, false), limited(66, 131, 2, 20, false);
  left_out.positive = false;
  guided.ids = guided.limits = false;
  limited.ids = limited.guided = false;
  limited.row_limits_alone = true;
  Classified<float> nothing(70, 140, 0, 20, false, 1);
  statistics<float, false>("ragged", 2e-6, ragged);
  statistics<float, true>("16 bytes at a time", 2e-6, even);
  statistics<float, true>("squared distances", 2e-6, squared);
  statistics<float, true>("sparse, logits far apart", 2e-6, sparse);
  statistics<float, true>("equal ids left out", 2e-6, left_out);
  statistics<float, false>("a guide alone", 2e-6, guided);
  statistics<float, false>("rows' limits alone", 2e-6, limited);
  statistics<double, false>("float64, a negative scale", 1e-13, wide);
  gradient<float, float, false>("ragged", 1e-4, ragged, true);
  gradient<float, BFloat16, true>("bfloat16", 5e-3, even, true);
  gradient<float, Half, true>("float16, squared distances", 1e-3, squared, false);
  gradient<float, float, true>("equal ids left out", 1e-4, left_out, true);
  gradient<float, float, false>("a guide alone", 1e-4, guided, true);
  gradient<float, float, true>("no negatives", 1e-4, nothing, true);
  gradient<double, double, false>("float64", 1e-11, wide, true);
  sigmoid<float, float, false>("ragged", 1e-5, ragged, false);
  sigmoid<float, float, true>("soft targets", 1e-5, even, true);
  sigmoid<float, BFloat16, true>("bfloat16", 5e-3, even, false);
  sigmoid<double, double, false>("float64", 1e-12, Classified<double>(66, 130, 2, 5, false), true);
  return check::result();
}

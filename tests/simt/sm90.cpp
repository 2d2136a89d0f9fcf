#include "contrastive/sm90.cuh"

#include "check.h"

using namespace gapkern;
using namespace gapkern::contrastive;
using namespace gapkern::contrastive::sm90;

// Embeddings, and everything the Hopper kernels are told. The products between them are formed here.
template <class T>
struct Embeddings {
  int64_t rows, columns, depth, pitch, offset;
  std::vector<T> x, y;
  std::vector<float> scale, row_norms, column_norms, control;
  std::vector<double> row_lse, col_lse, grad_row, grad_col, grad_positive;

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
    simt::launch(1, kThreads, choose_shift, row_norms.data(), n, column_norms.data(), m, scale.data(), control.data());
  }
  float norm(const std::vector<T>& of, int64_t i) const {
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
  double log_sum(int64_t at, bool of_row) const {
    const int64_t count = of_row ? columns : rows;
    double most = -INFINITY, sum = 0;
    for (int64_t other = 0; other < count; ++other) most = std::max(most, of_row ? logit(at, other) : logit(other, at));
    for (int64_t other = 0; other < count; ++other)
      sum += std::exp((of_row ? logit(at, other) : logit(other, at)) - most);
    return most + std::log(sum);
  }
  Products<T> products(bool transposed = false) const {
    if (transposed) return {y.data(), x.data(), columns, rows, depth};
    return {x.data(), y.data(), rows, columns, depth};
  }
  std::vector<double> lse2(bool of_row) const {
    std::vector<double> scaled = of_row ? row_lse : col_lse;
    for (double& v : scaled) v *= kLog2e;
    return scaled;
  }
};

// The epilogue's partial sums: every tile's, whole tiles, with zeros beyond the edges; kept [rows, pitch].
template <class T>
void epilogue(const Embeddings<T>& p, std::vector<float>& row_part, std::vector<float>& column_part,
              std::vector<BFloat16>& kept) {
  constexpr int64_t kTileM = 128, kTileN = 256;
  const int64_t down = (p.rows + kTileM - 1) / kTileM, across = (p.columns + kTileN - 1) / kTileN;
  row_part.assign(across * down * kTileM, 0);
  column_part.assign(down * across * kTileN, 0);
  kept = check::poisoned<BFloat16>(p.rows * p.pitch);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      float e = exponential(float(p.t(i, j)), p.control[0], p.control[1]);
      e = e < 0x1p-126f ? 0 : e;
      row_part[j / kTileN * down * kTileM + i] += e;
      column_part[i / kTileM * across * kTileN + j] += e;
      from_wide(e, &kept[i * p.pitch + j]);
    }
}

template <class T>
void statistics(const std::string& name, double tolerance, const Embeddings<T>& p, double least, double most) {
  double missing = 0;
  check::kernel("log-sum-exps " + name, tolerance, [&] {
    std::vector<float> part[2];
    std::vector<BFloat16> kept;
    epilogue(p, part[0], part[1], kept);
    const int64_t down = (p.rows + 127) / 128, across = (p.columns + 255) / 256;
    double worst = 0;
    missing = 0;
    for (int side = 0; side < 2; ++side) {
      const int64_t count = side ? p.columns : p.rows, terms = side ? p.rows : p.columns, tiles = side ? down : across;
      std::vector<double> sums = check::poisoned<double>(count), lse = sums;
      const unsigned blocks = unsigned((count + 127) / 128);
      simt::launch(blocks, 128, sum_parts, part[side].data(), tiles, int64_t(part[side].size()) / tiles, count,
                   sums.data());
      simt::launch(blocks, 128, finish_lse, sums.data(), count, terms, p.control.data(), lse.data());
      for (const double v : lse) missing += double(std::isnan(v)) / double(p.rows + p.columns);
      simt::launch(unsigned((count + kSide - 1) / kSide), kThreads, repair_lse<T>, p.products(side == 1),
                   p.control.data(), lse.data());
      worst = check::largest({worst, check::error(lse, side ? p.col_lse : p.row_lse, 1)});
    }
    return worst;
  });
  check::report(least <= missing && missing <= most, "log-sum-exps " + name, "repaired " + check::digits(missing));
}

template <class T>
void gradient(const std::string& name, double tolerance, const Embeddings<T>& p, bool expected_apart) {
  const std::vector<double> row_lse2 = p.lse2(true), col_lse2 = p.lse2(false);
  std::vector<double> truth(p.rows * p.columns);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j)
      truth[i * p.columns + j] = p.grad_row[i] * std::exp(p.logit(i, j) - p.row_lse[i]) +
                                 p.grad_col[j] * std::exp(p.logit(i, j) - p.col_lse[j]) +
                                 (j == i + p.offset ? p.grad_positive[i] : 0);
  std::vector<float> unused[2];
  std::vector<BFloat16> kept;
  epilogue(p, unused[0], unused[1], kept);
  for (const bool keeps : {false, true})
    check::kernel("dS " + name + (keeps ? " kept" : ""), tolerance, [&] {
      std::vector<float> apart = check::poisoned<float>(1);
      std::vector<float> weight[] = {check::poisoned<float>(p.rows), check::poisoned<float>(p.columns)};
      std::vector<double> positive = check::poisoned<double>(p.rows);
      std::vector<T> ds = check::poisoned<T>(p.rows * p.pitch);
      const std::vector<double> scale{double(p.scale[0])};
      simt::launch(1, kThreads, choose_weights, row_lse2.data(), p.grad_row.data(), p.rows, col_lse2.data(),
                   p.grad_col.data(), p.columns, p.control.data(), apart.data());
      for (int side = 0; side < 2; ++side) {
        const std::vector<double>&lse2 = side ? col_lse2 : row_lse2, &grad = side ? p.grad_col : p.grad_row;
        simt::launch(unsigned((lse2.size() + 127) / 128), 128, form_weights, lse2.data(), grad.data(),
                     int64_t(lse2.size()), p.control.data(), apart.data(), weight[side].data());
      }
      const Weighing weighing{p.control.data(), apart.data(), weight[0].data(), weight[1].data()};
      if (keeps) {
        simt::launch(3, kThreads, gradient_of_kept<T>, kept.data(), weighing, p.rows, p.columns, p.pitch, ds.data());
        const dim3 grid(unsigned((p.columns + kSide - 1) / kSide), unsigned((p.rows + kSide - 1) / kSide));
        simt::launch(grid, kThreads, gradient_apart<T>, p.products(), weighing, p.pitch, ds.data());
      } else {
        for (int64_t i = 0; i < p.rows; ++i)
          for (int64_t j = 0; j < p.columns; ++j)
            from_wide(
                logit_gradient(float(p.t(i, j)), p.control[0], p.control[1], apart[0] != 0, weight[0][i], weight[1][j]),
                &ds[i * p.pitch + j]);
      }
      simt::launch(unsigned((p.rows + kWarps - 1) / kWarps), kThreads, label_products<T>, p.products(), p.offset,
                   positive.data());
      const Labels labels{positive.data(),   row_lse2.data(),        col_lse2.data(), p.grad_row.data(),
                          p.grad_col.data(), p.grad_positive.data(), p.offset};
      simt::launch(unsigned((p.rows + 127) / 128), 128, patch_labels<T>, labels, scale.data(), p.rows, p.pitch,
                   ds.data());
      std::vector<T> dense(p.rows * p.columns);
      for (int64_t i = 0; i < p.rows; ++i) std::copy_n(&ds[i * p.pitch], p.columns, &dense[i * p.columns]);
      return check::largest({check::error(dense, truth, 1e-3), std::abs(double(apart[0]) - expected_apart)});
    });
}

void numbers() {
  check::report(shift_of(20, 32768) == 0 && shift_of(144.5f, 32768) == 50 && shift_of(95, 32768) == 0, "shift",
                "zero while sums stay below 2^110");
  check::report(shift_of(INFINITY, 2) == INFINITY, "shift", "infinite bound");
  double worst = 0;
  for (const double g : {1e-30, -3e-5, 0.7, -1e6, 0.0})
    for (const double lse2 : {-900.0, -20.0, 0.0, 40.0, 3000.0}) {
      const float term = encoded_term(float(lse2), encode_weight(g, lse2));
      worst = std::max(worst, std::abs(double(term) - g) / (std::abs(g) + 1e-30));
    }
  check::report(worst < 1e-3, "encoded weights", "error " + check::digits(worst));
}

int main() {
  numbers();
  const Embeddings<BFloat16> ragged(131, 261, 24, 7, 20, 1), sharp(70, 135, 40, 0, 100, 1);
  const Embeddings<Half> half(67, 131, 33, 3, 10, 1);
  // Bounds far above the logits, some rows' sums flushed; and all of them.
  const Embeddings<BFloat16> some(70, 140, 32, 1, 1, 11), large(66, 133, 24, 2, 1, 60);
  // Every logit far below zero.
  const Embeddings<BFloat16> opposed(66, 140, 24, 1, 1, 3, 12);
  statistics("ragged", 2e-6, ragged, 0, 0);
  statistics("scale 100", 2e-5, sharp, 0, 0);
  statistics("float16", 2e-6, half, 0, 0);
  statistics("large norms", 1e-4, large, 0.9, 1.01);
  statistics("some repaired", 2e-5, some, 0.02, 0.98);
  statistics("opposed", 2e-6, opposed, 0.9, 1.01);
  Embeddings<BFloat16> tiny = ragged;
  tiny.grad_row[5] = 1e-60;
  gradient("one weight too small to be shared", 2e-2, tiny, true);
  gradient("opposed", 2e-2, opposed, true);
  gradient("ragged", 2e-2, ragged, false);
  gradient("scale 100", 2e-2, sharp, false);
  gradient("float16", 1e-2, half, false);
  gradient("large norms", 2e-2, large, true);
  gradient("some repaired", 2e-2, some, true);
  return check::result();
}

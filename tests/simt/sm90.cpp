#include "embeddings.h"

// The epilogue's partial sums: every tile's, whole tiles, with zeros beyond the edges; kept [rows, pitch].
template <class T>
void epilogue(const Embeddings<T>& p, check::vector<float>& row_part, check::vector<float>& column_part,
              check::vector<BFloat16>& kept) {
  constexpr int64_t kTileM = 128, kTileN = 256;
  const int64_t down = (p.rows + kTileM - 1) / kTileM, across = (p.columns + kTileN - 1) / kTileN;
  row_part.assign(across * down * kTileM, 0);
  column_part.assign(down * across * kTileN, 0);
  kept = check::poisoned<BFloat16>(p.rows * p.pitch);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      float e = exponential(float(p.t(i, j)), p.control[0], p.control[1]);
      e = e < 0x1p-126f || j == i + p.offset ? 0 : e;
      row_part[j / kTileN * down * kTileM + i] += e;
      column_part[i / kTileM * across * kTileN + j] += e;
      from_wide(e, &kept[i * p.pitch + j]);
    }
}

// The error of the log-sum-exps over all but the labels; `missing` is the share of those that are repaired.
template <class T>
double log_sums(const Embeddings<T>& p, double& missing) {
  check::vector<float> part[2];
  check::vector<BFloat16> kept;
  epilogue(p, part[0], part[1], kept);
  const int64_t down = (p.rows + 127) / 128, across = (p.columns + 255) / 256;
  double worst = 0;
  missing = 0;
  for (int side = 0; side < 2; ++side) {
    const int64_t count = side ? p.columns : p.rows, terms = side ? p.rows : p.columns, tiles = side ? down : across;
    check::vector<double> sums = check::poisoned<double>(count), lse = sums, truth(count);
    const unsigned blocks = unsigned((count + 127) / 128);
    simt::launch(blocks, 128, sum_parts, part[side].data(), tiles, int64_t(part[side].size()) / tiles, count,
                 sums.data());
    simt::launch(blocks, 128, finish_lse, sums.data(), count, terms, p.control.data(), lse.data());
    for (const double v : lse) missing += double(std::isnan(v)) / double(p.rows + p.columns);
    simt::launch(unsigned((count + kSide - 1) / kSide), kThreads, repair_lse<T>, p.products(side == 1),
                 side ? -p.offset : p.offset, p.control.data(), lse.data());
    for (int64_t i = 0; i < count; ++i) {
      truth[i] = p.log_sum(i, side == 0, false);
      if (truth[i] == -INFINITY && lse[i] == -INFINITY) truth[i] = lse[i] = 0;
    }
    worst = check::largest({worst, check::error(lse, truth, 1)});
  }
  return worst;
}

template <class T>
void statistics(const std::string& name, double tolerance, const Embeddings<T>& p, double least, double most) {
  double missing = 0;
  check::kernel("log-sum-exps " + name, tolerance, [&] { return log_sums(p, missing); });
  check::report(least <= missing && missing <= most, "log-sum-exps " + name, "repaired " + check::digits(missing));
}

// Rows and columns whose label is all they have: too few for a barrier to be needed.
void nothing_but_labels() {
  double missing = 0;
  const double single_pair = log_sums(Embeddings<BFloat16>(1, 1, 24, 0, 20, 1), missing);
  check::report(single_pair == 0 && missing == 1, "log-sum-exps", "of a single pair");
  const double single_row = log_sums(Embeddings<BFloat16>(1, 9, 24, 4, 20, 1), missing);
  check::report(single_row < 2e-6 && std::abs(missing - 0.1) < 1e-9, "log-sum-exps", "of a single row");
}

void form_all_weights(const check::vector<double>& row_lse2, const check::vector<double>& grad_row,
                      const check::vector<double>& col_lse2, const check::vector<double>& grad_col,
                      const check::vector<float>& control, check::vector<float>& row_weight,
                      check::vector<float>& col_weight, check::vector<float>& separate) {
  const auto blocks_of = [](const check::vector<double>& v) { return (int64_t(v.size()) + kThreads - 1) / kThreads; };
  const int64_t of_rows = blocks_of(row_lse2), of_columns = (int64_t(col_weight.size()) + kThreads - 1) / kThreads;
  check::vector<float> part = check::poisoned<float>(of_rows + of_columns);
  simt::launch(unsigned(of_rows), kThreads, form_weights, row_lse2.data(), grad_row.data(), int64_t(row_lse2.size()),
               int64_t(row_lse2.size()), int64_t(col_lse2.size()), control.data(), row_weight.data(), part.data());
  simt::launch(unsigned(of_columns), kThreads, form_weights, col_lse2.data(), grad_col.data(), int64_t(col_lse2.size()),
               int64_t(col_weight.size()), int64_t(row_lse2.size()), control.data(), col_weight.data(),
               part.data() + of_rows);
  simt::launch(1, kThreads, any_separate_weight, part.data(), of_rows + of_columns, separate.data());
}

template <class T>
void gradient(const std::string& name, double tolerance, const Embeddings<T>& p, bool expected_separate) {
  const check::vector<double> row_lse2 = p.lse2(true), col_lse2 = p.lse2(false);
  check::vector<double> truth(p.rows * p.columns);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j)
      truth[i * p.columns + j] = p.grad_row[i] * std::exp(p.logit(i, j) - p.row_lse[i]) +
                                 p.grad_col[j] * std::exp(p.logit(i, j) - p.col_lse[j]) +
                                 (j == i + p.offset ? p.grad_positive[i] : 0);
  check::vector<double> grad_label(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) grad_label[i] = truth[i * p.columns + i + p.offset];
  check::vector<float> unused[2];
  check::vector<BFloat16> kept;
  epilogue(p, unused[0], unused[1], kept);
  for (const bool keeps : {false, true})
    check::kernel("dS " + name + (keeps ? " kept" : ""), tolerance, [&] {
      check::vector<float> separate = check::poisoned<float>(1);
      check::vector<float> weight[] = {check::poisoned<float>(p.rows), check::poisoned<float>(p.columns + 300)};
      check::vector<T> ds = check::poisoned<T>(p.rows * p.pitch);
      form_all_weights(row_lse2, p.grad_row, col_lse2, p.grad_col, p.control, weight[0], weight[1], separate);
      const Weighing weighing{p.control.data(), separate.data(), weight[0].data(), weight[1].data()};
      if (keeps) {
        simt::launch(3, kThreads, gradient_of_kept<T>, kept.data(), weighing, p.rows, p.columns, p.pitch, ds.data());
      }
      if (!keeps || separate[0] != 0)
        for (int64_t i = 0; i < p.rows; ++i)
          for (int64_t j = 0; j < p.columns; ++j) {
            const float acc = float(p.t(i, j)), k = p.control[0], shift = p.control[1];
            const float a = weight[0][i], b = weight[1][j];
            const float w = is_separate(a) || is_separate(b)
                                ? gradient_of_separate(acc, k, separated(a, shift), separated(b, shift))
                                : gradient_of_common(acc, k, shift, a, b);
            from_wide(w, &ds[i * p.pitch + j]);
          }
      simt::launch(unsigned((p.rows + 127) / 128), 128, set_labels<T>, grad_label.data(), p.offset, p.rows, p.pitch, 1,
                   ds.data());
      for (int64_t j = p.columns; j < p.columns + 300; ++j)
        if (weight[1][j] != 0) return double(INFINITY);
      check::vector<T> dense(p.rows * p.columns);
      for (int64_t i = 0; i < p.rows; ++i) std::copy_n(&ds[i * p.pitch], p.columns, &dense[i * p.columns]);
      return check::largest({check::error(dense, truth, 1e-3), std::abs(double(separate[0]) - expected_separate)});
    });
}

// The labels' dS as three bfloat16 numbers, whose sum has float32's 24 bits.
double labels_in_terms() {
  const int64_t rows = 131, pitch = 168, offset = 9;
  const check::vector<double> grad_label = check::random<double>(rows, 1);
  check::vector<BFloat16> ds(3 * rows * pitch, BFloat16{});
  simt::launch(2, 128, set_labels<BFloat16>, grad_label.data(), offset, rows, pitch, 3, ds.data());
  double worst = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int term = 0; term < 3; ++term) sum += double(to_wide(ds[(term * rows + i) * pitch + i + offset]));
    worst = check::largest({worst, std::abs(sum / grad_label[i] - 1)});
  }
  return worst;
}

template <class T>
void positive(const std::string& name, const Embeddings<T>& p) {
  check::kernel("labels' products " + name, 1e-15, [&] {
    check::vector<double> found = check::poisoned<double>(p.rows);
    simt::launch(unsigned((p.rows + kWarps - 1) / kWarps), kThreads, label_products<T>, p.products(), p.offset,
                 found.data());
    double worst = 0;
    for (int64_t i = 0; i < p.rows; ++i) worst = check::largest({worst, std::abs(found[i] - p.t(i, i + p.offset))});
    return worst;
  });
}

// The sigmoid loss's epilogue: a product per pair, whatever tile it lies in; sums over the tiles by the kernel.
template <class T>
void sigmoid(const std::string& name, double tolerance, const Embeddings<T>& p, float bias, int64_t offset) {
  constexpr int64_t kTileM = 128, kTileN = 256;
  const int64_t down = (p.rows + kTileM - 1) / kTileM, across = (p.columns + kTileN - 1) / kTileN;
  check::vector<double> truth_ds(p.rows * p.columns), truth[3], size(p.rows);
  for (auto& of_rows : truth) of_rows.resize(p.rows);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      const double z = j == i + offset ? 1 : -1, u = z * (p.logit(i, j) + double(bias));
      const double w = -z / (1 + std::exp(u));
      truth_ds[i * p.columns + j] = w;
      truth[0][i] += std::max(-u, 0.) + std::log1p(std::exp(-std::abs(u)));
      truth[1][i] += w;
      truth[2][i] += w * p.t(i, j);
      size[i] += std::abs(w * p.t(i, j));
    }
  check::kernel("sigmoid loss " + name, tolerance, [&] {
    check::vector<T> ds(p.rows * p.columns);
    double worst = 0;
    for (int which = 0; which < 3; ++which) {
      check::vector<float> part(across * down * kTileM, 0);
      for (int64_t i = 0; i < p.rows; ++i)
        for (int64_t j = 0; j < p.columns; ++j) {
          const float acc = float(p.t(i, j)), label = float(i + offset), column = float(j);
          const SigmoidTerms terms =
              label == column ? sigmoid_of_label(acc, p.scale[0], bias) : sigmoid_of_other(acc, p.scale[0], bias);
          from_wide(terms.gradient, &ds[i * p.columns + j]);
          part[j / kTileN * down * kTileM + i] += which == 0   ? terms.loss
                                                  : which == 1 ? terms.gradient
                                                               : terms.gradient * acc;
        }
      check::vector<double> sums = check::poisoned<double>(p.rows);
      simt::launch(unsigned((p.rows + 127) / 128), 128, sum_parts, part.data(), across, down * kTileM, p.rows,
                   sums.data());
      for (int64_t i = 0; i < p.rows; ++i)
        worst = check::largest(
            {worst, std::abs(sums[i] - truth[which][i]) / (which == 2 ? size[i] : std::abs(truth[which][i]) + 0.1)});
    }
    return check::largest({100 * worst, check::error(ds, truth_ds, 1e-6)});
  });
}

void numbers() {
  check::report(shift_of(144.5f, 32768) == 50 && shift_of(101.5f, 32768) == 7, "shift", "sums stay below 2^110");
  check::report(shift_of(20, 32768) == 20 && shift_of(95, 32768) == 7, "shift", "the bound, while none is flushed");
  check::report(shift_of(INFINITY, 2) == INFINITY, "shift", "infinite bound");
  double worst = 0;
  for (const double g : {1e-30, -3e-5, 0.7, -1e6, 0.0})
    for (const double lse2 : {-900.0, -20.0, 0.0, 40.0, 3000.0}) {
      const float term = separate_term(float(lse2), separate_weight(g, lse2));
      worst = std::max(worst, std::abs(double(term) - g) / (std::abs(g) + 1e-30));
    }
  check::report(worst < 1e-3, "separate weights", "error " + check::digits(worst));
  check::report(
      separate_term(0, separate_weight(-1, INFINITY)) == 0 && separate_term(0, separate_weight(1, 1e300)) == 0,
      "separate weights", "of nothing");
  worst = 0;
  for (const float shift : {0.f, -50.f})
    for (const float g : {3e-30f, -0.7f, 5e20f, 0.f}) {
      const float weight = common_weight(g), term = separate_term(2, separated(weight, shift));
      worst =
          std::max(worst, std::abs(double(term) - 4 * std::exp2(double(shift)) * double(g)) / (1e-37 + std::abs(g)));
      worst = std::max(worst, double(is_separate(weight) || !is_separate(separated(weight, shift))));
    }
  check::report(worst < 1e-4, "separate weights", "from common ones, error " + check::digits(worst));
  double log1p_error = 0;
  for (int i = 1; i <= 1 << 20; ++i) {
    const float e = float(i) / float(1 << 20), small = std::ldexp(e, -i % 120);
    for (const float x : {e, small})
      log1p_error = std::max(log1p_error, std::abs(double(x * log1p_ratio(x)) / std::log1p(double(x)) - 1));
  }
  check::report(log1p_error < 2.4e-7, "log1p", "error " + check::digits(log1p_error));
  check::report(exponential(excluded(-2), -2, -3) == 0 && exponential(excluded(0), nonzero(0), 7) == 0 &&
                    exponential(excluded(1e-37f), nonzero(1e-37f), 0) == 0 && nonzero(-0.5f) == -0.5f,
                "beyond the matrices", "exponentials");
  for (const float s : {0.f, 10.f, -10.f}) {
    const SigmoidTerms terms = sigmoid_of_other(excluded(nonzero(s)), nonzero(s), 5);
    check::report(terms.loss == 0 && terms.gradient == 0, "beyond the matrices", "the sigmoid loss");
  }
  check::report(log2_sum(8, 4, -2) == 5 && std::isnan(log2_sum(0x1p127, 4, 0)) && std::isnan(log2_sum(INFINITY, 4, 0)),
                "sums", "in units of log 2, and those that have overflowed");
  const struct {
    double g, lse2, terms;
    bool safe;
  } cases[] = {{1, 0, 1024, true},    {1, -91, 1024, true},   {1, -93, 1024, false}, {0, -93, 1024, false},
               {0, 500, 4, true},     {1e30, 0, 4, true},     {1e40, 0, 4, false},   {-1e40, 0, 4, false},
               {1e-30, 0, 4, true},   {1e-40, 0, 4, false},   {1, 119, 4, true},     {1, 121, 4, false},
               {1, NAN, 1024, false}, {1, INFINITY, 4, false}};
  bool right = true;
  for (const auto& c : cases) right = right && common_weight_is_safe(c.g, c.lse2 + 7, -7, c.terms) == c.safe;
  check::report(right, "weights", "which are safe to share");
}

// The shift that one block chooses for all rows and columns, whichever side is longer; and which weights are separate.
double choices(int64_t rows, int64_t columns) {
  const bool tall = rows > columns;
  check::vector<float> row_norms(rows, 0.5f), column_norms(columns, 0.5f);
  row_norms[rows - 1] = column_norms[columns - 1] = 1;
  double wrong = 0;
  // Sums of 512 stay below 2^110 up to a bound of 101, and above 2^-102 of each where bound and shift are at most that;
  // the norms' rounding is allowed for.
  for (const auto& [bound, shift] : {std::pair{100.85, -1.},
                                     {100.95, -1.},
                                     {105.0, -5.},
                                     {-105.0, -5.},
                                     {20.0, -20.},
                                     {60.0, -41.},
                                     {0.5, 0.},
                                     {102.0, -2.}}) {
    const check::vector<float> scale{float(bound / kLog2e)};
    check::vector<float> control = check::poisoned<float>(2);
    simt::launch(1, kShiftThreads, choose_shift, row_norms.data(), rows, column_norms.data(), columns, scale.data(),
                 control.data());
    wrong = check::largest({wrong, std::abs(double(control[1]) - shift)});
  }
  // 2^-93 is too small a share of the sum of the 512 terms of a row, and not of the two of a column.
  for (const bool of_row : {false, true}) {
    check::vector<double> row_lse2(rows, 0.), col_lse2(columns, 0.), grad_row(rows, 1.), grad_col(columns, 1.);
    (of_row ? row_lse2[rows - 1] : col_lse2[columns - 1]) = -93.5;
    const check::vector<float> control{1, 0};
    check::vector<float> separate = check::poisoned<float>(1);
    check::vector<float> weight[] = {check::poisoned<float>(rows), check::poisoned<float>(columns)};
    form_all_weights(row_lse2, grad_row, col_lse2, grad_col, control, weight[0], weight[1], separate);
    // That one alone, if any.
    const bool found = of_row != tall;
    wrong = check::largest({wrong, std::abs(double(separate[0]) - double(found))});
    for (int side = 0; side < 2; ++side)
      for (int64_t i = 0; i < int64_t(weight[side].size()); ++i)
        wrong +=
            is_separate(weight[side][i]) != (found && of_row == (side == 0) && i + 1 == int64_t(weight[side].size()));
  }
  return wrong;
}

// One block's maximum over more values than it loads at once.
double found_anywhere() {
  double wrong = 0;
  for (const int64_t at : {0, 2047, 2100, 4999}) {
    check::vector<float> part(5000, 0.f), separate = check::poisoned<float>(1);
    part[at] = 1;
    simt::launch(1, kThreads, any_separate_weight, part.data(), int64_t(part.size()), separate.data());
    wrong += std::abs(double(separate[0]) - 1);
  }
  return wrong;
}

int main() {
  numbers();
  check::kernel("any separate weight", 0, found_anywhere);
  check::kernel("shift and weights", 0, [] { return check::largest({choices(2, 512), choices(512, 2)}); });
  const Embeddings<BFloat16> ragged(131, 261, 24, 7, 20, 1), sharp(70, 135, 40, 0, 100, 1);
  const Embeddings<Half> half(67, 131, 33, 3, 10, 1);
  // Bounds far above the logits, some rows' sums flushed; and all of them.
  const Embeddings<BFloat16> some(70, 140, 32, 1, 1, 11), large(66, 133, 24, 2, 1, 60);
  // Fewer columns than a tile of the repair has: some threads see nothing.
  const Embeddings<BFloat16> narrow(20, 30, 24, 2, 1, 60);
  // Every logit far below zero.
  const Embeddings<BFloat16> opposed(66, 140, 24, 1, 1, 3, 12);
  statistics("ragged", 2e-6, ragged, 0, 0);
  nothing_but_labels();
  positive("ragged", ragged);
  positive("float16", half);
  const Embeddings<float> single(67, 131, 40, 3, 10, 1), far(66, 133, 24, 2, 1, 60);
  positive("float32", single);
  statistics("float32", 2e-6, single, 0, 0);
  statistics("float32 of large norms", 1e-4, far, 0.9, 1.01);
  check::kernel("labels in terms", 0x1p-23, labels_in_terms);
  statistics("scale 100", 2e-5, sharp, 0, 0);
  statistics("float16", 2e-6, half, 0, 0);
  statistics("large norms", 1e-4, large, 0.9, 1.01);
  statistics("some repaired", 2e-5, some, 0.02, 0.98);
  statistics("opposed", 2e-6, opposed, 0.9, 1.01);
  statistics("narrow", 1e-4, narrow, 0.9, 1.01);
  Embeddings<BFloat16> tiny = ragged;
  tiny.grad_row[5] = 1e-60;
  gradient("one weight too small to be shared", 2e-2, tiny, true);
  gradient("opposed", 2e-2, opposed, true);
  gradient("ragged", 2e-2, ragged, false);
  gradient("scale 100", 2e-2, sharp, false);
  gradient("float16", 1e-2, half, false);
  gradient("large norms", 2e-2, large, true);
  gradient("some repaired", 2e-2, some, true);
  sigmoid("ragged", 5e-3, ragged, -10, 7);
  sigmoid("scale 100, label beyond some rows", 5e-3, sharp, -13, 100);
  sigmoid("float16, label before some rows", 5e-3, half, -2, -30);
  sigmoid("opposed", 5e-3, opposed, 130, 1);
  return check::result();
}

#include "contrastive/sm90_masked.cuh"

#include "check.h"
#include "contrastive/epilogue_classes.cuh"

using namespace gapkern;
using namespace gapkern::contrastive;
using namespace gapkern::contrastive::sm90;

constexpr double kPending = INFINITY;

// Embeddings, the marks of their rows and columns, and the classes that follow. The products between are formed here.
template <class T>
struct Pairs {
  int64_t count[2], depth, label;
  check::vector<T> side[2];
  check::vector<float> marks[2], control;

  // Every fifth row and column has the limit `low`; the others' is above every product.
  Pairs(int64_t n, int64_t m, int64_t d, int64_t label_offset, float k, double size, float low)
      : count{n, m}, depth(d), label(label_offset), control{k, 0, 0} {
    double most[2] = {0, 0};
    for (int s = 0; s < 2; ++s) {
      side[s] = check::random<T>(count[s] * d, size / std::sqrt(d));
      marks[s] = check::vector<float>(2 * count[s]);
      for (int64_t i = 0; i < count[s]; ++i) {
        marks[s][2 * i] = from_bits(uint32_t(i * i % 7));
        marks[s][2 * i + 1] = i % 5 == 1 ? low : 1e30f;
        double sum = 0;
        for (int64_t e = 0; e < d; ++e) sum += std::pow(double(to_wide(side[s][i * d + e])), 2);
        most[s] = std::max(most[s], std::sqrt(sum));
      }
    }
    const float bound = float(std::abs(double(k)) * most[0] * most[1] * 1.001);
    control[1] = -shift_of(bound, double(std::max(n, m)));
    control[2] = -bound;
  }
  Products<T> products(bool transposed) const {
    return {side[transposed].data(), side[!transposed].data(), count[transposed], count[!transposed], depth};
  }
  double t(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t e = 0; e < depth; ++e)
      sum += double(to_wide(side[0][i * depth + e])) * double(to_wide(side[1][j * depth + e]));
    return sum;
  }
  // 0 of negatives, 1 of positives, -1 of the others.
  int of(int64_t i, int64_t j) const {
    if (j == i + label) return -1;
    if (to_bits(marks[0][2 * i]) == to_bits(marks[1][2 * j])) return 1;
    return t(i, j) > double(marks[0][2 * i + 1]) || t(i, j) > double(marks[1][2 * j + 1]) ? -1 : 0;
  }
  // Log-sums [2, count] of a side; -inf of nothing.
  check::vector<double> log_sums(int s) const {
    check::vector<double> found(2 * count[s]);
    for (int c = 0; c < 2; ++c)
      for (int64_t at = 0; at < count[s]; ++at) {
        double most = -INFINITY, sum = 0;
        for (const bool second : {false, true})
          for (int64_t other = 0; other < count[!s]; ++other) {
            const int64_t i = s ? other : at, j = s ? at : other;
            if (of(i, j) != c) continue;
            const double v = double(control[0]) * t(i, j);
            second ? sum += std::exp2(v - most) : most = std::max(most, v);
          }
        found[c * count[s] + at] = sum == 0 ? -INFINITY : kLn2 * (most + std::log2(sum));
      }
    return found;
  }
  // A pass's partial sums of a side: every tile's, [2, tiles, stride], whole tiles, with zeros beyond the edges.
  check::vector<float> parts(int s, const check::vector<float>& with, int64_t tiles, int64_t per_tile,
                             int64_t stride) const {
    check::vector<float> part(2 * tiles * stride, 0.f);
    for (int64_t i = 0; i < count[0]; ++i)
      for (int64_t j = 0; j < count[1]; ++j) {
        const int c = of(i, j);
        const float e = exponential(float(t(i, j)), with[0], with[1]);
        const int64_t at = s ? j : i, tile = (s ? i : j) / per_tile;
        if (c >= 0 && !(e < 0x1p-126f)) part[(c * tiles + tile) * stride + at] += e;
      }
    return part;
  }
};

// Log-sums by passes; the error of those that are not pending afterwards, whose share is `left`.
template <class T>
double by_passes(const Pairs<T>& p, int passes, double& left) {
  check::vector<float> control = p.control, condition{1};
  check::vector<double> lse[2];
  for (int s = 0; s < 2; ++s) lse[s] = check::vector<double>(2 * p.count[s], kPending);
  lse[1][3] = 7;  // what is not pending stays
  for (int pass = 0; pass < passes; ++pass) {
    int64_t blocks[2];
    for (int s = 0; s < 2; ++s) blocks[s] = (2 * p.count[s] + kThreads - 1) / kThreads;
    check::vector<float> pending = check::poisoned<float>(blocks[0] + blocks[1]), next = check::poisoned<float>(3);
    for (int s = 0; s < 2; ++s) {
      const int64_t count = p.count[s], per_tile = s ? 64 : 256, tiles = (p.count[!s] + per_tile - 1) / per_tile;
      const int64_t stride = (count + 255) / 256 * 256;
      const check::vector<float> part = p.parts(s, control, tiles, per_tile, stride);
      check::vector<double> sums = check::poisoned<double>(2 * count);
      for (int c = 0; c < 2; ++c)
        simt::launch(unsigned((count + 127) / 128), 128, sum_class_parts, part.data() + c * tiles * stride, tiles,
                     stride, count, pass ? condition.data() : nullptr, sums.data() + c * count);
      simt::launch(unsigned(blocks[s]), kThreads, merge_classes, sums.data(), 2 * count, p.count[!s], control.data(),
                   lse[s].data(), pending.data() + (s ? blocks[0] : 0));
    }
    simt::launch(1, kThreads, next_pass, pending.data(), blocks[0] + blocks[1], control.data(),
                 std::max(p.count[0], p.count[1]), condition.data(), next.data());
    control = next;
  }
  double worst = lse[1][3] == 7 ? 0 : INFINITY;
  left = 0;
  for (int s = 0; s < 2; ++s) {
    check::vector<double> truth = p.log_sums(s);
    if (s) lse[s][3] = truth[3];
    for (size_t i = 0; i < truth.size(); ++i)
      if (lse[s][i] == kPending) {
        left += 1. / double(2 * (p.count[0] + p.count[1]));
        lse[s][i] = truth[i];
      }
    worst = check::largest({worst, check::error(lse[s], truth, 1), std::abs(double(condition[0]) - (left > 0))});
  }
  return worst;
}

template <class T>
void passes(const std::string& name, const Pairs<T>& p, int number, bool all) {
  double left = 0;
  check::kernel("passes " + name, 2e-6, [&] { return by_passes(p, number, left); });
  check::report(all == (left == 0), "passes " + name, "pending " + check::digits(left));
}

template <class T>
void repair(const std::string& name, double tolerance, const Pairs<T>& p, bool positives = true) {
  check::kernel("repair " + name, tolerance, [&] {
    double worst = 0;
    for (int s = 0; s < 2; ++s) {
      check::vector<double> truth = p.log_sums(s), lse(truth.size(), kPending);
      lse[1] = truth[1] = 7;
      if (s == 0 && positives) std::copy_n(truth.begin(), p.count[0], lse.begin());  // positives alone are pending
      double* const positive = positives ? lse.data() + p.count[s] : nullptr;
      simt::launch(unsigned((p.count[s] + kSide - 1) / kSide), kThreads, repair_classes<T>, p.products(s == 1),
                   s ? -p.label : p.label, p.control.data(), p.marks[s].data(), p.marks[!s].data(), lse.data(),
                   positive);
      for (int64_t i = p.count[s]; i < 2 * p.count[s] && !positives; ++i)
        if (lse[i] == kPending) lse[i] = truth[i];
      worst = check::largest({worst, check::error(lse, truth, 1)});
    }
    return worst;
  });
}

void numbers() {
  const float fitting[] = {1, -20, -20}, flushing[] = {1, -50, -144}, none[] = {1, NAN, NAN};
  const struct {
    double sum;
    const float* control;
    double expected;
  } cases[] = {{8, fitting, 23},        {0, fitting, -INFINITY},      {0, flushing, kPending},
               {0x1p-90, fitting, -70}, {0x1p-90, flushing, -40},     {0x1p-93, flushing, kPending},
               {0x1p-93, fitting, -73}, {0x1p127, fitting, kPending}, {INFINITY, flushing, kPending},
               {NAN, none, kPending}};
  bool right = std::isnan(log2_class_sum(NAN, 1024, flushing));
  for (const auto& c : cases) right = right && log2_class_sum(c.sum, 1024, c.control) == c.expected;
  check::report(right, "sums", "complete, empty, and pending");
  check::report(raise_of(32768) == 213 && raise_of(1) == 228, "sums", "how far exponents are raised");
  double worst = 0;
  for (const float acc : {-3.f, -0.2f, 0.f, 0.7f, 5.f})
    for (const bool positive : {false, true})
      for (const bool soft : {false, true}) {
        const double s = 2 * double(acc) - 1, a = positive ? 0.3 : 0, b = !positive ? 1 : soft ? 1 - a : 0;
        const double above = std::log1p(std::exp(s)), below = std::log1p(std::exp(-s)), p = 1 / (1 + std::exp(-s));
        const SigmoidTerms terms = sigmoid_of_pair(acc, 2, -1, positive, 0.3f, soft);
        worst = check::largest({worst, std::abs(double(terms.loss) - a * below - b * above),
                                std::abs(double(terms.gradient) - b * p + a * (1 - p))});
      }
  const SigmoidTerms beyond = sigmoid_of_pair(excluded(2), 2, 5, false, 0.3f, true);
  check::report(beyond.loss == 0 && beyond.gradient == 0, "sigmoid loss", "beyond the matrices");
  const SigmoidTerms sure = sigmoid_of_pair(20, 2, 0, true, 1, true);
  check::report(sure.loss > 0 && std::abs(double(sure.loss) / std::exp(-40.) - 1) < 1e-5, "sigmoid loss",
                "a small one of a target of 1");
  check::report(worst < 1e-6, "sigmoid loss", "of pairs, error " + check::digits(worst));
}

int main() {
  numbers();
  const Pairs<BFloat16> ragged(131, 261, 24, 7, 20, 1, 0.1f), before(70, 135, 40, -20, -30, 1, 0.1f);
  const Pairs<Half> half(67, 131, 32, 1000, 10, 1, -0.1f);
  passes("ragged", ragged, 1, true);
  passes("labels before some rows", before, 1, true);
  passes("no labels", half, 1, true);
  // Limits far below the largest products: what is left is another pass's, or the repair's.
  const Pairs<BFloat16> low(66, 140, 24, 2, 20, 2.4, -4.f), lowest(66, 140, 24, 2, 20, 8, -50.f);
  passes("low limits", low, 1, false);
  passes("low limits", low, 3, true);
  passes("lowest limits", lowest, 3, false);
  repair("ragged", 2e-6, ragged);
  repair("labels before some rows", 2e-6, before);
  repair("no labels, no positives", 2e-6, half, false);
  repair("lowest limits", 1e-4, lowest);
  return check::result();
}

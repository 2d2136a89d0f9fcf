// The probability that a gallery row stays first under Gaussian noise; compiled once per instruction set.
#include "robustness/kernels.h"

#include <algorithm>
#include <limits>

#include "robustness/chi2.h"
#include "robustness/spread.h"

namespace gapkern::robustness::GAPKERN_ISA {
namespace {

// Nodes in standard normal deviates, and the two tails there.
struct Nodes {
  alignas(64) double z[kNodes], log_upper[kNodes], log_lower[kNodes];
  alignas(64) double weight[kNodes];
  Nodes() {
    const double step = 2 * kReach / (kNodes - 1);
    double total = 0;
    for (int k = 0; k < kNodes; ++k) {
      z[k] = -kReach + k * step;
      log_upper[k] = std::log(0.5 * std::erfc(z[k] * 0.70710678118654752440));
      log_lower[k] = std::log(0.5 * std::erfc(-z[k] * 0.70710678118654752440));
      weight[k] = std::exp(-z[k] * z[k] / 2);
      total += weight[k];
    }
    for (double& w : weight) w /= total;
  }
};

const Nodes& nodes() {
  static const Nodes table;
  return table;
}

// excess[k] = q_k - D - lambda with P(X > q_k) = Phi(-z_k).
void quantiles(double dims, double lambda, double* excess) {
  const Nodes& n = nodes();
  for (int k = 0; k < kNodes; k += Vec<double>::size)
    store(excess + k, quantile_excess(load(n.z + k), load(n.log_upper + k), load(n.log_lower + k), dims, lambda));
}

// The same where the mixture serves, by bisection on log q.
void small_quantiles(double dims, double lambda, double* q) {
  const Nodes& n = nodes();
  double low = 1e-30;
  for (int k = 0; k < kNodes; ++k) {
    const double survival = std::exp(n.log_upper[k]);
    double high = std::max(2 * low, dims + lambda);
    while (mixture_survival(high, dims, lambda) > survival) high *= 2;
    double a = std::log(low), b = std::log(high);
    for (int i = 0; i < 44; ++i) {
      const double middle = (a + b) / 2;
      (mixture_survival(std::exp(middle), dims, lambda) > survival ? a : b) = middle;
    }
    q[k] = std::exp((a + b) / 2);
    low = std::exp(a);
  }
}

double survival(double q, double dims, double lambda) {
  if (small(dims, lambda)) return mixture_survival(q, dims, lambda);
  if (q <= 0) return 1;
  const Saddle<f64v> p =
      saddle<double, false>(splat<double>(q), splat<double>(q - dims - lambda), splat<double>(lambda), dims);
  const double tail = near_tail<double>(p)[0];
  return p.w[0] < 0 ? 1 - tail : tail;
}

template <class T>
double small_stays_nearest(const T* squared, int64_t count, int64_t target, double variance, double dims) {
  const double lambda = std::max(double(squared[target]), 0.) / variance;
  double q[kNodes], product[kNodes];
  small_quantiles(dims, lambda, q);
  std::fill(product, product + kNodes, 1.0);
  for (int64_t j = 0; j < count; ++j) {
    const double other = std::max(double(squared[j]), 0.) / variance, ahead = other - lambda;
    if (j == target || (ahead > 0 && ahead * ahead > 6.5 * 6.5 * 4 * (dims + other + lambda))) continue;
    for (int k = 0; k < kNodes; ++k)
      if (product[k] > 1e-12) product[k] *= survival(q[k], dims, other);
  }
  double total = 0;
  for (int k = 0; k < kNodes; ++k) total += nodes().weight[k] * product[k];
  return std::min(total, 1.0);
}

// product[k] *= P(X_j > q_k) for each rival j; ahead[j] = lambda_j - lambda.
template <bool near_only>
void multiply(const float* ahead, int64_t rivals, double lambda, float dims, const float* q, const float* excess,
              double* product) {
  constexpr int width = Vec<float>::size;
  int live = kNodes;
  const auto tails = [&](float behind, int at, float* part, float* whole) __attribute__((always_inline)) {
    const f32v other = splat<float>(float(lambda + behind));
    const Saddle<f32v> p = saddle<float, near_only>(load(q + at), load(excess + at) - behind, other, dims);
    const f32v tail = near_tail<float>(p);
    store(part, p.w < f32v{} ? -tail : tail);
    store(whole, p.w < f32v{} ? splat<float>(1.f) : f32v{});
  };
  int64_t j = 0;
  // Two rivals at a time, for the sake of the long chains of divisions and roots in each.
  for (; j + 2 <= rivals; j += 2) {
    for (int at = 0; at < live; at += width) {
      alignas(64) float part[2][width], whole[2][width];
      tails(ahead[j], at, part[0], whole[0]);
      tails(ahead[j + 1], at, part[1], whole[1]);
      // The survival function in double: 1 - tail would lose a small tail's digits.
      for (int k = 0; k < width; ++k)
        product[at + k] *= (double(whole[0][k]) + double(part[0][k])) * (double(whole[1][k]) + double(part[1][k]));
    }
    // Nodes far right of the rivals soon have no chance left.
    if (j % 16 == 14 && live > width && *std::max_element(product + live - width, product + live) < 1e-12)
      live -= width;
  }
  for (; j < rivals; ++j)
    for (int at = 0; at < live; at += width) {
      alignas(64) float part[width], whole[width];
      tails(ahead[j], at, part, whole);
      for (int k = 0; k < width; ++k) product[at + k] *= double(whole[k]) + double(part[k]);
    }
}

// What multiply() does, for rivals spread over a grid.
template <bool near_only>
void multiply_grid(const Grid& grid, const double* weight, double lambda, float dims, const float* q,
                   const float* excess, double* product) {
  constexpr int width = Vec<float>::size;
  alignas(64) float logs[kNodes];
  alignas(64) double total[kNodes]{};
  for (int64_t i = 0; i < grid.points; ++i) {
    const double behind = grid.first + double(i) * grid.step;
    const f32v other = splat<float>(float(lambda + behind));
    for (int at = 0; at < kNodes; at += width)
      store(logs + at, log_survival<near_only>(load(q + at), load(excess + at) - float(behind), other, dims));
    for (int k = 0; k < kNodes; ++k) total[k] += weight[i] * double(logs[k]);
  }
  for (int k = 0; k < kNodes; k += Vec<double>::size) store(product + k, exp2(kLog2e * load(total + k)));
}

template <class T>
double stays_nearest(const T* squared, int64_t count, int64_t target, double variance, double dims, float* scratch) {
  // Rounding may have left a distance of zero below it.
  const double inverse = 1 / variance, lambda = std::max(double(squared[target]), 0.) * inverse;
  if (small(dims, lambda)) return small_stays_nearest(squared, count, target, variance, dims);

  // What matters: rows whose noisy distance differs from the target's by less than 6.5 standard deviations. One further
  // ahead than that leaves no chance.
  int64_t rivals = 0;
  double least = 0, most = 0;
  for (int64_t j = 0; j < count; ++j) {
    const double ahead = std::max(double(squared[j]), 0.) * inverse - lambda;
    if (j == target) continue;
    if (ahead * ahead > 6.5 * 6.5 * 4 * (dims + 2 * lambda + ahead)) {
      if (ahead > 0) continue;
      return 0;
    }
    scratch[rivals++] = float(ahead);
    least = std::min(least, ahead);
    most = std::max(most, ahead);
  }
  if (rivals == 0) return 1;

  alignas(64) double excess[kNodes], product[kNodes];
  alignas(64) float q32[kNodes], excess32[kNodes];
  quantiles(dims, lambda, excess);
  for (int k = 0; k < kNodes; ++k) {
    q32[k] = float(dims + lambda + excess[k]);
    excess32[k] = float(excess[k]);
    product[k] = 1;
  }
  const Grid grid(least, most, deviation(dims, lambda + least));
  const bool gridded = grid.pays(rivals) && lambda + grid.first >= 0;
  const double lowest = gridded ? grid.first : least, highest = gridded ? grid.last() : most;
  const bool near = near_mean(dims + lambda + excess[0], dims, lambda + highest) &&
                    near_mean(dims + lambda + excess[kNodes - 1], dims, lambda + lowest);
  if (gridded) {
    Spread<kGridPoints> spread;
    spread.add(scratch, rivals, 1 / grid.step, -grid.first / grid.step, int(grid.points));
    (near ? multiply_grid<true> : multiply_grid<false>)(grid, spread.weight, lambda, float(dims), q32, excess32,
                                                        product);
  } else {
    (near ? multiply<true> : multiply<false>)(scratch, rivals, lambda, float(dims), q32, excess32, product);
  }
  double total = 0;
  for (int k = 0; k < kNodes; ++k) total += nodes().weight[k] * product[k];
  return std::min(total, 1.0);
}

// log Phi on a lattice that holds the nodes and the points of the leads, so that it is known at every sum of the two.
struct Lattice {
  static constexpr double kStep = kReach / (kNormalNodes - 1);  // half the nodes' distance
  static constexpr int kOrigin = int(kDecided / kStep) + 3;     // the point of no lead
  static constexpr int kPoints = 2 * kOrigin + 1, kRow = kNormalNodes + kPoints / 2 + 1;
  alignas(64) double logs[2][kRow];  // [i % 2][k + i / 2]: at node k and point i
  alignas(64) double weight[kNormalNodes];
  Lattice() {
    for (int i = 0; i < 2 * kRow; ++i) {
      const double x = -kReach + (i - kOrigin) * kStep;
      const double tail = 0.5 * std::erfc(std::abs(x) * 0.70710678118654752440);
      logs[i % 2][i / 2] = x < 0 ? std::log(tail) : std::log1p(-tail);
    }
    double total = 0;
    for (int k = 0; k < kNormalNodes; ++k) {
      const double z = -kReach + 2 * k * kStep;
      total += weight[k] = std::exp(-z * z / 2);
    }
    for (double& w : weight) w /= total;
  }
};

// sum over nodes of weight[k] prod_j Phi(ahead[j] + z_k).
double integral_of_normals(const float* ahead, int64_t rivals) {
  static const Lattice lattice;
  constexpr int width = Vec<double>::size, vectors = kNormalNodes / width;
  Spread<Lattice::kPoints> spread;
  spread.add(ahead, rivals, 1 / Lattice::kStep, Lattice::kOrigin, Lattice::kPoints);
  f64v total[vectors]{};
  for (int i = 0; i < Lattice::kPoints; ++i) {
    if (spread.weight[i] == 0) continue;
    const double* logs = lattice.logs[i % 2] + i / 2;
    for (int k = 0; k < vectors; ++k) total[k] += spread.weight[i] * load(logs + k * width);
  }
  f64v chance{};
  for (int k = 0; k < vectors; ++k) chance += load(lattice.weight + k * width) * exp2(kLog2e * total[k]);
  return std::min(sum<double>(chance), 1.);
}

// Appends the leads of rows first .. last - 1 that are less than kDecided. Returns whether one of them is as far
// behind, or no number.
template <class T>
bool leads(const T* scores, int64_t first, int64_t last, double own, double inverse, float* out, int64_t* rivals) {
  constexpr int width = Vec<float>::size;
  i32v within = ~i32v{};
  for (int64_t j = first; j < last; j += width) {
    float lead[width];
    const int count = int(std::min<int64_t>(width, last - j));
    for (int i = count; i < width; ++i) lead[i] = float(kDecided);
    for (int i = 0; i < count; ++i) lead[i] = float((own - double(scores[j + i])) * inverse);
    const f32v ahead = load(lead);
    *rivals += keep_below(ahead, float(kDecided), out + *rivals);
    within &= ahead > -float(kDecided);
  }
  bool beaten = false;
  for (int i = 0; i < width; ++i) beaten |= within[i] == 0;
  return beaten;
}

template <class T>
double stays_largest(const T* scores, int64_t count, int64_t target, double deviation, float* scratch) {
  const double own = double(scores[target]), inverse = 1 / deviation;
  // Without noise on the scores, a tie is decided by none: the target stays where no score is above its own.
  const bool noisy = inverse <= std::numeric_limits<double>::max();
  int64_t rivals = 0;
  bool beaten = false;
  if (noisy) {
    beaten = leads(scores, 0, target, own, inverse, scratch, &rivals);
    beaten |= leads(scores, target + 1, count, own, inverse, scratch, &rivals);
  } else {
    for (int64_t j = 0; j < count; ++j) beaten |= !(double(scores[j]) <= own);
  }
  if (beaten) {
    for (int64_t j = 0; j < count; ++j)
      if (scores[j] != scores[j]) return std::numeric_limits<double>::quiet_NaN();
    return 0;
  }
  return rivals == 0 ? 1 : integral_of_normals(scratch, rivals);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table{stays_nearest<float>, stays_nearest<double>, stays_largest<float>, stays_largest<double>,
                             survival};
  return table;
}

}  // namespace gapkern::robustness::GAPKERN_ISA

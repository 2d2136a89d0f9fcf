#include <algorithm>

#include "check.h"
#include "robustness/inner.cuh"
#include "robustness/kernels.cuh"
#include "robustness/nearest.cuh"

using namespace gapkern;
using namespace gapkern::robustness;

// P(X > q) in float64, to the last digits that the tails' approximations have.
double tail(double q, double dims, double lambda) {
  if (device::small(dims, lambda)) return device::mixture_survival(q, dims, lambda);
  const auto p = device::saddle<double, false>(q, q - dims - lambda, lambda, dims);
  const double near = device::near_tail<double>(p);
  return p.w < 0 ? 1 - near : near;
}

// The contract's integral with ten times the nodes, quantiles by bisection, and every row taken.
double probability(const double* squared, int64_t count, int64_t target, double variance, double dims) {
  const double lambda = std::max(squared[target], 0.) / variance;
  double total = 0, weights = 0;
  for (double z = -7; z <= 7; z += 0.05) {
    const double wanted = 0.5 * std::erfc(z * std::sqrt(0.5));
    double low = 1e-12 * (dims + lambda), high = 4 * (dims + lambda) + 400;
    for (int i = 0; i < 80; ++i) {
      const double middle = (low + high) / 2;
      (tail(middle, dims, lambda) > wanted ? low : high) = middle;
    }
    double product = 1;
    for (int64_t j = 0; j < count; ++j)
      if (j != target) product *= tail(low, dims, std::max(squared[j], 0.) / variance);
    total += std::exp(-z * z / 2) * product;
    weights += std::exp(-z * z / 2);
  }
  return total / weights;
}

struct Problem {
  check::vector<double> squared;   // [queries, count], values that float32 has
  check::vector<int64_t> targets;  // [queries, 2]
  int64_t count;
  double variance, dims;
  check::vector<double> truth;

  // Distances `spread` standard deviations of their noise apart; targets are given by rank, -1 and `count` stand for
  // themselves.
  Problem(int64_t g, double v, double d, double spread, check::vector<int64_t> ranks, double nearest = 1)
      : squared(ranks.size() / 2 * g), targets(ranks), count(g), variance(v), dims(d), truth(ranks.size()) {
    const double deviation = 2 * variance * std::sqrt(dims + 2 * nearest / variance);
    for (double& s : squared) s = double(float(nearest + deviation * spread * std::abs(check::normal())));
    for (size_t i = 0; i < ranks.size(); ++i) {
      const double* row = &squared[i / 2 * count];
      check::vector<int64_t> order(count);
      for (int64_t j = 0; j < count; ++j) order[j] = j;
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] < row[b]; });
      const bool none = ranks[i] < 0 || ranks[i] >= count;
      targets[i] = none ? ranks[i] : order[ranks[i]];
      truth[i] = ranks[i] == -1 ? 0 : none ? NAN : probability(row, count, targets[i], variance, dims);
    }
  }

  template <class T>
  double run() const {
    const check::vector<T> distances(squared.begin(), squared.end());
    check::vector<double> out = check::poisoned<double>(targets.size());
    simt::launch(unsigned(targets.size()), kExactThreads, stays_nearest<T>, distances.data(), count, targets.data(),
                 int64_t(2), variance, dims, out.data());
    return check::error(out, truth, 1e-3);
  }
};

// A target's distance that rounding has left below zero by many times the noise.
Problem below_zero(Problem p) {
  for (size_t i = 0; i < p.targets.size(); i += 2) {
    p.squared[i / 2 * p.count + p.targets[i]] = -100 * p.variance;
    for (size_t k = i; k < i + 2; ++k)
      p.truth[k] = probability(&p.squared[i / 2 * p.count], p.count, p.targets[k], p.variance, p.dims);
  }
  return p;
}

// Scores of queries a deviation of the noise times `spread` apart; every query has a deviation of its own.
struct InnerProblem {
  check::vector<double> scores, deviations;  // [queries, count], [queries]
  check::vector<int64_t> targets;            // [queries, 2]
  int64_t count;
  check::vector<double> truth;

  InnerProblem(int64_t g, double spread, check::vector<int64_t> chosen)
      : scores(chosen.size() / 2 * g), deviations(chosen.size() / 2), targets(chosen), count(g), truth(chosen.size()) {
    for (size_t q = 0; q < deviations.size(); ++q) {
      deviations[q] = 0.1 * double(q);
      for (int64_t j = 0; j < g; ++j)
        scores[q * g + j] = double(float(1 - deviations[q] * spread * std::abs(check::normal())));
      for (size_t i = 2 * q; i < 2 * q + 2; ++i)
        truth[i] = chosen[i] == -1 ? 0 : chosen[i] >= g ? NAN : probability(&scores[q * g], chosen[i], deviations[q]);
    }
  }

  // The contract's integral, with ten times the nodes and every row taken; without noise, whether none is above.
  double probability(const double* row, int64_t target, double deviation) const {
    double total = 0, weights = 0;
    for (double z = -9; z <= 9; z += 0.02) {
      double product = 1;
      for (int64_t j = 0; j < count; ++j) {
        const double lead = row[target] - row[j];
        if (j != target)
          product *= deviation > 0 ? 0.5 * std::erfc(-(lead / deviation + z) * std::sqrt(0.5)) : double(lead >= 0);
      }
      total += std::exp(-z * z / 2) * product;
      weights += std::exp(-z * z / 2);
    }
    return total / weights;
  }

  template <class T>
  double run() const {
    const check::vector<T> values(scores.begin(), scores.end());
    check::vector<double> out = check::poisoned<double>(targets.size());
    simt::launch(unsigned(targets.size()), kExactThreads, stays_largest<T>, values.data(), count, targets.data(),
                 int64_t(2), deviations.data(), out.data());
    return check::error(out, truth, 1e-3);
  }
};

void exact(const std::string& name, double tolerance, const check::vector<Problem>& problems) {
  for (const Problem& p : problems) {
    double most = 0, all = 0;
    for (const double chance : p.truth) most = chance > most ? chance : most, all += std::isnan(chance) ? 0 : chance;
    check::report(most > 1e-3, name, "a chance of " + std::to_string(most) + " among " + std::to_string(all));
  }
  check::kernel("exact " + name, tolerance, [&] {
    double worst = 0;
    for (const Problem& p : problems) worst = check::largest({worst, p.run<float>(), p.run<double>()});
    return worst;
  });
}

// Launches what a search is made of and returns the largest error.
template <class T, bool packed>
std::function<double()> nearest(int64_t q, int64_t g, int64_t d, int64_t parts) {
  check::vector<T> gallery = check::random<T>(g * d), queries = check::random<T>(q * d);
  const check::vector<float> centre = check::random<float>(d);
  // Ties of the nearest row, before and after it and in another tile, for the first queries.
  for (int64_t i = 0; i < q && g > 140; i += 2)
    for (int64_t c = 0; c < d; ++c) {
      gallery[(g - 1) * d + c] = gallery[130 * d + c] = gallery[7 * d + c];
      queries[i * d + c] = gallery[7 * d + c];
    }
  // The row that lies furthest out.
  if (g > 13)
    for (int64_t c = 0; c < d; ++c) from_wide(3 * to_wide(gallery[13 * d + c]), &gallery[13 * d + c]);
  check::vector<double> row(q), best(q), second(q), slack(q);
  double reach = 0;
  for (int64_t i = 0; i < q; ++i) {
    best[i] = second[i] = INFINITY;
    for (int64_t j = 0; j < g; ++j) {
      double squared = 0, far = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double x = double(to_wide(gallery[j * d + c]));
        squared += (double(to_wide(queries[i * d + c])) - x) * (double(to_wide(queries[i * d + c])) - x);
        far += (x - double(centre[c])) * (x - double(centre[c]));
      }
      reach = std::max(reach, std::sqrt(far));
      second[i] = squared < best[i] ? best[i] : std::min(second[i], squared);
      if (squared < best[i]) best[i] = squared, row[i] = double(j);
    }
  }
  for (int64_t i = 0; i < q; ++i) {
    double own = 0;
    for (int64_t c = 0; c < d; ++c) own += std::pow(double(to_wide(queries[i * d + c])) - double(centre[c]), 2);
    slack[i] = 8 * 0x1p-23 * std::pow(std::sqrt(own) + reach, 2);
  }
  return [=] {
    const unsigned blocks = 3, tiles = unsigned((q + kTile - 1) / kTile);
    check::vector<float> norms = check::poisoned<float>(g), own = check::poisoned<float>(q);
    check::vector<float> largest = check::poisoned<float>(blocks), unused = largest;
    check::vector<Found> found = check::poisoned<Found>(parts * q);
    check::vector<int64_t> rows = check::poisoned<int64_t>(q);
    check::vector<float> ours = check::poisoned<float>(q), next = ours, width = ours;
    simt::launch(blocks, kNormWarps * kWarp, centred_norms<T>, gallery.data(), g, d, centre.data(), norms.data(),
                 largest.data());
    simt::launch(blocks, kNormWarps * kWarp, centred_norms<T>, queries.data(), q, d, centre.data(), own.data(),
                 unused.data());
    simt::launch(dim3(tiles, unsigned(parts)), kNearestThreads, nearest_tiles<T, packed>, queries.data(), q,
                 gallery.data(), g, d, centre.data(), norms.data(), found.data());
    simt::launch(tiles, kTile, nearest_combine, found.data(), parts, q, own.data(), largest.data(), int(blocks),
                 rows.data(), ours.data(), next.data(), width.data());
    // Rows within the slack of each other are decided later, in float64; those of equal bits here already.
    double worst =
        check::largest({check::error(ours, best, 1), check::error(next, second, 1), check::error(width, slack, 1e-3)});
    check::vector<double> most(blocks, 0.);
    for (int64_t j = 0; j < g; ++j) {
      double& of_block = most[j / kNormWarps % blocks];
      of_block = std::max(of_block, double(norms[j]));
    }
    if (check::error(largest, most) != 0) worst = INFINITY;
    for (int64_t i = 0; i < q; ++i)
      if (rows[i] != int64_t(row[i]) && (second[i] - best[i] > slack[i] || second[i] == best[i])) worst = INFINITY;
    return worst;
  };
}

int main() {
  exact("with few rivals", 2e-6,
        {Problem(12, 1e-2, 512, 1, {0, 5, 11, -1}), Problem(60, 1e-3, 64, 8, {0, 1, 59, 2}),
         Problem(1, 1e-2, 128, 1, {0, 1}), below_zero(Problem(12, 0.0078125, 512, 1, {0, 5}, 0))});
  exact("over a grid", 1.5e-4,
        {Problem(300, 0.3, 64, 1.5, {0, 1, 299, -1}), Problem(2500, 1e-3, 300, 2, {0, 3}),
         Problem(250, 1e-2, 128, 0, {5, 249})});
  exact("with few degrees of freedom", 1e-6,
        {Problem(30, 2e-2, 3, 1, {0, 1, 17, -1}), Problem(400, 1e-1, 8, 3, {0, 2}), Problem(9, 1, 2, 0, {4, 8}, 0)});
  exact("with few degrees of freedom and distant rivals, or very many", 2e-5,
        {Problem(12, 1e-2, 3, 40, {0, 1}, 0.1), Problem(600, 1, 2, 0, {0, 5})});
  const check::vector<std::function<double()>> searches{
      nearest<float, true>(130, 300, 20, 2),  // two tiles of queries, three of the gallery, ties between them
      nearest<float, false>(5, 129, 7, 2),    // one ragged slab
      nearest<BFloat16, true>(140, 257, 24, 3), nearest<Half, false>(3, 150, 9, 5),  // more parts than tiles
      nearest<float, true>(4, 1, 8, 1)};
  check::kernel("nearest", 2e-5, [&] {
    double worst = 0;
    for (const auto& search : searches) worst = check::largest({worst, search()});
    return worst;
  });
  const auto inner = [](const std::string& name, double tolerance, const check::vector<InnerProblem>& problems) {
    check::kernel("exact under inner product " + name, tolerance, [&] {
      double worst = 0;
      for (const InnerProblem& p : problems) worst = check::largest({worst, p.run<float>(), p.run<double>()});
      return worst;
    });
  };
  inner("with few rivals", 2e-6,
        {InnerProblem(12, 1, {0, 3, 5, 11, 2, -1}), InnerProblem(1, 1, {0, 1, 0, -1}),
         InnerProblem(40, 30, {0, 39, 7, 21, 3, 30})});
  inner("over a grid", 1e-4, {InnerProblem(1500, 4, {0, 3, 7, 1499, 200, -1}), InnerProblem(300, 0, {0, 1, 299, 17})});
  return check::result();
}

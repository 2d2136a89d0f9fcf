// Exact robustness on a device; robustness.h says what is computed, chi2.h has the law's tails.
//
// A block has one target of one query. Its threads first look for the rivals, the rows near enough to matter, then take
// a node of the integral each: kGroups threads share a node and divide the rivals among them. Everything is summed in a
// fixed order.
#pragma once
#include "common/cuda.cuh"
#include "robustness/chi2.h"

namespace gapkern::robustness {

inline constexpr int kGroups = 4;
inline constexpr int kExactThreads = kGroups * kNodes, kExactWarps = kExactThreads / kWarp;
inline constexpr int kRivals = 1024;  // held at once
inline constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kFar = std::numeric_limits<double>::max();
static_assert(kExactThreads % kWarp == 0 && kGridPoints <= kExactThreads && 2 * kWarp >= kNodes);

// A query's distances seen from a target.
template <class T>
struct Row {
  const T* squared;
  int64_t count, target;
  double inverse, dims, lambda;

  __device__ Row(const T* distances, int64_t g, int64_t t, double variance, double d)
      : squared(distances), count(g), target(t), inverse(1 / variance), dims(d), lambda(noncentrality(t)) {}
  // Rounding may have left a distance of zero below it.
  __device__ double noncentrality(int64_t j) const {
    const double d = double(squared[j]);
    return (d < 0 ? 0 : d) * inverse;
  }
  __device__ double ahead(int64_t j) const { return noncentrality(j) - lambda; }
  // Noisy distances differ by more than 6.5 standard deviations.
  __device__ bool decided(double ahead) const { return ahead * ahead > 6.5 * 6.5 * 4 * (dims + 2 * lambda + ahead); }
};

// What is known of a target's rivals before their tails are taken.
struct Survey {
  int64_t rivals;
  double least, most;  // how far they are ahead, and zero
  bool beaten;         // by a row so near that it leaves no chance
};

template <class Seen>
__device__ Survey survey(const Seen& row) {
  GAPKERN_SHARED(double, low, kExactWarps);
  GAPKERN_SHARED(double, high, kExactWarps);
  GAPKERN_SHARED(int64_t, number, kExactWarps);
  double least = 0, most = 0;
  int64_t rivals = 0;
  for (int64_t j = threadIdx.x; j < row.count; j += kExactThreads) {
    if (j == row.target) continue;
    const double ahead = row.ahead(j);
    const bool decided = row.decided(ahead);
    if (decided && ahead > 0) continue;
    least = decided ? -kFar : ahead < least ? ahead : least;
    most = ahead > most ? ahead : most;
    ++rivals;
  }
  least = -warp_max(-least);
  most = warp_max(most);
  rivals = warp_sum(rivals);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) low[warp] = least, high[warp] = most, number[warp] = rivals;
  __syncthreads();
  Survey found{0, 0, 0, false};
  for (int w = 0; w < kExactWarps; ++w) {
    found.rivals += number[w];
    found.least = low[w] < found.least ? low[w] : found.least;
    found.most = high[w] > found.most ? high[w] : found.most;
  }
  found.beaten = found.least == -kFar;
  return found;
}

// A block's shared memory.
struct Scratch {
  double* place;  // [kNodes] excess of the nodes over the mean, or their quantiles
  float* list;    // [kRivals]
  int* counts;    // [2 * kExactWarps] in turn, so that one barrier serves
};

// Calls body(list, count) with how far rivals are ahead, in the order of the gallery, until all have been seen.
template <class Seen, class Body>
__device__ void over_rivals(const Seen& row, const Scratch& scratch, const Body& body) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int held = 0, turn = 0;
  for (int64_t first = 0; first < row.count; first += kExactThreads, turn ^= kExactWarps) {
    const int64_t j = first + threadIdx.x;
    double ahead = 0;
    bool rival = j < row.count && j != row.target;
    if (rival) {
      ahead = row.ahead(j);
      rival = ahead <= 0 || !row.decided(ahead);
    }
    const unsigned of_warp = __ballot_sync(kEveryLane, rival);
    if (lane == 0) scratch.counts[turn + warp] = __popc(of_warp);
    __syncthreads();
    int at = held + __popc(of_warp & ((1u << lane) - 1));
    for (int w = 0; w < kExactWarps; ++w) {
      at += w < warp ? scratch.counts[turn + w] : 0;
      held += scratch.counts[turn + w];
    }
    if (rival) scratch.list[at] = float(ahead);
    if (held > kRivals - kExactThreads || first + kExactThreads >= row.count) {
      __syncthreads();
      body(scratch.list, held);
      held = 0;
    }
  }
}

// A node of the integral in standard normal deviates, and the logarithms of the two tails there.
struct Node {
  double z, log_upper, log_lower;
  __device__ explicit Node(int k)
      : z(-kReach + k * (2 * kReach / (kNodes - 1))),
        log_upper(log(0.5 * erfc(z * 0.70710678118654752440))),
        log_lower(log(0.5 * erfc(-z * 0.70710678118654752440))) {}
};

// P(X > q).
template <bool near_only>
__device__ double survival(float q, float excess, float lambda, float dims) {
  const auto p = device::saddle<float, near_only>(q, excess, lambda, dims);
  const double tail = device::near_tail<float>(p);
  return p.w < 0 ? 1 - tail : tail;  // in double: it would lose a small tail's digits
}

// A thread's share, over the rivals of its group, of the product of tails at its node.
template <class T>
__device__ double product_of_rivals(const Row<T>& row, const Scratch& scratch, const Survey& found) {
  const double* excess = scratch.place;
  const int k = threadIdx.x % kNodes, group = threadIdx.x / kNodes;
  const float dims = float(row.dims);
  double product = 1;
  over_rivals(row, scratch, [&](const float* list, int count) {
    const double mean = row.dims + row.lambda;
    const bool near = device::near_mean(mean + excess[0], row.dims, row.lambda + found.most) &&
                      device::near_mean(mean + excess[kNodes - 1], row.dims, row.lambda + found.least);
    const float q = float(mean + excess[k]), own = float(excess[k]);
    if (near)
      for (int r = group; r < count; r += kGroups)
        product *= survival<true>(q, own - list[r], float(row.lambda + list[r]), dims);
    else
      for (int r = group; r < count; r += kGroups)
        product *= survival<false>(q, own - list[r], float(row.lambda + list[r]), dims);
  });
  return product;
}

// Lagrange's weight of the point at `offset`, -2 to 3, for a place t in [0, 1] among six.
__device__ inline double lagrange(int offset, double t) {
  double weight = offset == -2   ? -1. / 120
                  : offset == 3  ? 1. / 120
                  : offset == -1 ? 1. / 24
                  : offset == 2  ? -1. / 24
                  : offset == 0  ? -1. / 12
                                 : 1. / 12;
  for (int other = -2; other <= 3; ++other) weight *= other == offset ? 1. : t - other;
  return weight;
}

// Rivals spread over a grid: weights[] gets each point's, a thread its own.
template <class Seen>
__device__ void spread(const Seen& row, const Scratch& scratch, const device::Grid& grid, double* weights) {
  const double inverse = 1 / grid.step;
  const int points = int(grid.points), point = threadIdx.x;
  double weight = 0;
  over_rivals(row, scratch, [&](const float* list, int count) {
    for (int r = 0; r < count; ++r) {
      const double place = (double(list[r]) - grid.first) * inverse;
      int i = int(place);
      i = i < 2 ? 2 : i > points - 4 ? points - 4 : i;
      const int offset = point - i;
      if (offset >= -2 && offset <= 3) weight += lagrange(offset, place - i);
    }
  });
  if (point < points) weights[point] = weight;
  __syncthreads();
}

// A thread's share, over the points of its group, of the product at its node.
template <class T>
__device__ double product_over_grid(const Row<T>& row, const Scratch& scratch, const device::Grid& grid) {
  const double* excess = scratch.place;
  GAPKERN_SHARED(double, weights, kGridPoints);
  spread(row, scratch, grid, weights);
  const int k = threadIdx.x % kNodes, group = threadIdx.x / kNodes, points = int(grid.points);
  const double mean = row.dims + row.lambda;
  const bool near = device::near_mean(mean + excess[0], row.dims, row.lambda + grid.last()) &&
                    device::near_mean(mean + excess[kNodes - 1], row.dims, row.lambda + grid.first);
  const float q = float(mean + excess[k]), own = float(excess[k]), dims = float(row.dims);
  double total = 0;
  for (int i = group; i < points; i += kGroups) {
    const double behind = grid.first + i * grid.step;
    const float lambda = float(row.lambda + behind), rest = own - float(behind);
    const float tail =
        near ? device::log_survival<true>(q, rest, lambda, dims) : device::log_survival<false>(q, rest, lambda, dims);
    total += weights[i] * double(tail);
  }
  return exp(total);
}

// P(X > q) = Phi(-z) for few degrees of freedom, by bisection on log q.
__device__ inline double small_quantile(const Node& node, double dims, double lambda) {
  const double survival = exp(node.log_upper);
  double high = dims + lambda;
  while (device::mixture_survival(high, dims, lambda) > survival) high *= 2;
  double a = -69.1, b = log(high);
  for (int i = 0; i < 48; ++i) {
    const double middle = (a + b) / 2;
    (device::mixture_survival(exp(middle), dims, lambda) > survival ? a : b) = middle;
  }
  return exp((a + b) / 2);
}

template <class T>
__device__ double small_product(const Row<T>& row, const Scratch& scratch) {
  const int k = threadIdx.x % kNodes, group = threadIdx.x / kNodes;
  double product = 1;
  over_rivals(row, scratch, [&](const float* list, int count) {
    const double q = scratch.place[k];
    for (int r = group; r < count && product > 1e-12; r += kGroups) {
      const double lambda = row.lambda + list[r], excess = q - row.dims - lambda;
      if (device::small(row.dims, lambda)) {
        product *= device::mixture_survival(q, row.dims, lambda);
      } else {
        const auto p = device::saddle<double, false>(q, excess, lambda, row.dims);
        const double tail = device::near_tail<double>(p);
        product *= p.w < 0 ? 1 - tail : tail;
      }
    }
  });
  return product;
}

// *out = the integral, from the threads' shares of the products at its nodes.
__device__ inline void integrate(const double* part, double* out) {
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  double total = 0, weights = 0;
  for (int k = threadIdx.x; k < kNodes; k += kWarp) {
    const double z = Node(k).z, weight = exp(-z * z / 2);
    double product = weight;
    for (int g = 0; g < kGroups; ++g) product *= part[g * kNodes + k];
    total += product;
    weights += weight;
  }
  total = warp_sum(total) / warp_sum(weights);
  if (threadIdx.x == 0) *out = total > 1 ? 1. : total;
}

// out[i] = the probability that row targets[i] stays nearest to query i / per_query.
template <class T>
__global__ void __launch_bounds__(kExactThreads, 4)
    stays_nearest(const T* distances, int64_t count, const int64_t* targets, int64_t per_query, double variance,
                  double dims, double* out) {
  GAPKERN_SHARED(double, place, kNodes);
  GAPKERN_SHARED(float, list, kRivals);
  GAPKERN_SHARED(int, counts, 2 * kExactWarps);
  GAPKERN_SHARED(double, part, kExactThreads);
  const Scratch scratch{place, list, counts};
  const int64_t i = blockIdx.x, target = targets[i];
  if (target < 0 || target >= count) {
    if (threadIdx.x == 0) out[i] = target == -1 ? 0. : kNoNumber;
    return;
  }
  const Row<T> row(distances + i / per_query * count, count, target, variance, dims);
  if (device::small(dims, row.lambda)) {
    if (threadIdx.x < kNodes) place[threadIdx.x] = small_quantile(Node(threadIdx.x), dims, row.lambda);
    part[threadIdx.x] = small_product(row, scratch);
  } else {
    const Survey found = survey(row);
    if (found.beaten || found.rivals == 0) {
      if (threadIdx.x == 0) out[i] = found.beaten ? 0. : 1.;
      return;
    }
    if (threadIdx.x < kNodes) {
      const Node node(threadIdx.x);
      place[threadIdx.x] = device::quantile_excess(node.z, node.log_upper, node.log_lower, dims, row.lambda);
    }
    const device::Grid grid(found.least, found.most, device::deviation(dims, row.lambda + found.least));
    part[threadIdx.x] = grid.pays(found.rivals) && row.lambda + grid.first >= 0
                            ? product_over_grid(row, scratch, grid)
                            : product_of_rivals(row, scratch, found);
  }
  integrate(part, out + i);
}

}  // namespace gapkern::robustness

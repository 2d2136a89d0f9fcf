// Exact robustness under inner product on a device; kernels.cuh has the blocks' work, robustness.h what is computed.
#pragma once
#include "robustness/kernels.cuh"

namespace gapkern::robustness {

// A query's scores seen from a target, in deviations of a noisy score.
template <class T>
struct Scores {
  const T* scores;
  int64_t count, target;
  double own, deviation;

  __device__ double ahead(int64_t j) const {
    const double lead = own - double(scores[j]);
    return deviation > 0 ? lead / deviation : lead < 0 ? -kDecided : kDecided;
  }
  __device__ bool decided(double ahead) const { return ahead >= kDecided || ahead <= -kDecided; }
};

// A thread's share, over the rivals of its group, of the product of Phi(ahead + z).
template <class T>
__device__ double product_of_scores(const Scores<T>& row, const Scratch& scratch) {
  const int k = threadIdx.x % kNodes, group = threadIdx.x / kNodes;
  const double z = -kReach + k * (2 * kReach / (kNodes - 1));
  double product = 1;
  over_rivals(row, scratch, [&](const float* list, int count) {
    for (int r = group; r < count; r += kGroups) product *= 0.5 * erfc(-(double(list[r]) + z) * 0.70710678118654752440);
  });
  return product;
}

template <class T>
__device__ double product_of_scores_over_grid(const Scores<T>& row, const Scratch& scratch, const device::Grid& grid) {
  GAPKERN_SHARED(double, weights, kGridPoints);
  spread(row, scratch, grid, weights);
  const int k = threadIdx.x % kNodes, group = threadIdx.x / kNodes, points = int(grid.points);
  const float z = float(-kReach + k * (2 * kReach / (kNodes - 1)));
  double total = 0;
  for (int i = group; i < points; i += kGroups)
    total += weights[i] * double(device::log_phi(z + float(grid.first + i * grid.step)));
  return exp(total);
}

// out[i] = the probability that row targets[i] keeps the largest score of query i / per_query.
template <class T>
__global__ void __launch_bounds__(kExactThreads, 4)
    stays_largest(const T* scores, int64_t count, const int64_t* targets, int64_t per_query, const double* deviations,
                  double* out) {
  GAPKERN_SHARED(double, place, kNodes);
  GAPKERN_SHARED(float, list, kRivals);
  GAPKERN_SHARED(int, counts, 2 * kExactWarps);
  GAPKERN_SHARED(double, part, kExactThreads);
  const Scratch scratch{place, list, counts};
  const int64_t i = blockIdx.x, query = i / per_query, target = targets[i];
  if (target < 0 || target >= count || !(deviations[query] >= 0)) {
    if (threadIdx.x == 0) out[i] = target == -1 ? 0. : kNoNumber;
    return;
  }
  const T* of_query = scores + query * count;
  const Scores<T> row{of_query, count, target, double(of_query[target]), deviations[query]};
  const Survey found = survey(row);
  if (found.beaten || found.rivals == 0) {
    if (threadIdx.x == 0) out[i] = found.beaten ? 0. : 1.;
    return;
  }
  const device::Grid grid(found.least, found.most, 1.);
  part[threadIdx.x] =
      grid.pays(found.rivals) ? product_of_scores_over_grid(row, scratch, grid) : product_of_scores(row, scratch);
  integrate(part, out + i);
}

}  // namespace gapkern::robustness

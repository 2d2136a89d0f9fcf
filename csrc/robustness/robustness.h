// The robustness operators' contract (Chowers et al., CVPR 2026, Eq. 10, for Gaussian noise on the gallery).
//
// robustness_exact(distances, targets, variance, dims) -> float64 [Q, T].
//   distances float32 or float64 [Q, G]: squared distances of queries to gallery rows; targets int64 [Q, T]: gallery
//   rows, or -1; variance: of the noise, per coordinate, > 0; dims: D. result[i, t]: the probability that row
//   targets[i, t] is query i's nearest once every gallery row has its own noise. A target of -1 gives 0. Others outside
//   [0, G) are refused on the CPU and give NaN on CUDA, which is not waited for.
//
// A noisy squared distance over the variance is noncentral chi-square, D degrees of freedom and noncentrality
// lambda_j = distances_j / variance, independent across j. With SF_j its survival function and Q the target's quantile,
//   P = integral over z of phi(z) prod_{j != target} SF_j(Q(Phi(z))) dz,
// by the trapezoid rule on kNodes nodes: for such integrands its error falls faster than any power of the step.
// SF is the Lugannani-Rice saddle-point tail, whose saddle is closed-form here, in a form without cancellation at the
// mean; where D + lambda is small (D < 64) it is the Poisson mixture of central tails instead. Rows that beat the
// target with probability below 1e-9 are left out.
// Where many rows matter, their log tails are summed over a grid of distances (see Grid in chi2.h).
// Absolute error below 1e-4 for G up to 1e5. Work: Q G comparisons, and kNodes tails for each row that matters or for
// each point of the grid, of which there are fewer than 100.
//
// robustness_exact_inner(scores, targets, deviations) -> float64 [Q, T].
//   scores float32 or float64 [Q, G]: inner products of queries and gallery rows; targets as above; deviations float64
//   [Q]: of a query's noisy scores, sqrt(variance) ||y_i|| for noise of that variance per coordinate, >= 0.
//   result[i, t]: the probability that row targets[i, t] has query i's largest inner product once every gallery row has
//   its own noise. Noisy scores are independent normals of one deviation sigma, whatever D is:
//   P = integral over z of phi(z) prod_{j != target} Phi((s_target - s_j) / sigma + z) dz,
//   Where sigma is 0 it is 1 if no other score is above the target's.
//   On the CPU the law is one for all queries: log Phi is tabled on a lattice that holds the nodes and the points
//   between which rivals are spread. Work: Q G comparisons, 6 products for each row that matters, and kNormalNodes for
//   each point. Absolute error below 5e-6 for G up to 1e5 (float32 scores: and what their own rounding moves). On CUDA
//   on the nodes and the grid above: below 5e-5.
//
// robustness_nearest(queries, gallery, centre) -> int64 [Q], float32 [Q], float32 [Q], float32 [Q].
//   queries [Q, D], gallery [G, D] of one dtype, float32, bfloat16 or float16; centre float32 [D], near the gallery's
//   mean: distances are formed about it in float32, which keeps ||y||^2 + ||x||^2 - 2 <y, x> from cancelling.
//   row: the nearest gallery row, the lowest of those with equal distances; best and second: the squared distances of
//   it and of the next, infinite for G = 1; margin: rows whose distances differ by less are near-ties for
//   float32, which gapkern/_search.py re-ranks in float64.
// Work: 2 Q G D operations; nothing of size Q x G is written. The result does not depend on how the work is divided.
#pragma once

namespace gapkern::robustness {

inline constexpr int kNodes = 48;
inline constexpr int kNormalNodes = 64;    // under inner product on the CPU, where a node costs a product a point
inline constexpr int kGridPoints = 128;    // at most
inline constexpr double kGridStep = 0.25;  // standard deviations
inline constexpr double kReach = 6.4;      // nodes on [-kReach, kReach] standard deviations
inline constexpr double kDecided =
    9.2;  // deviations between scores of which either is first: Phi(-kDecided / sqrt 2) = 4e-11

}  // namespace gapkern::robustness

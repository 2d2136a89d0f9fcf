// The contrastive operators' contract, shared by the CPU and CUDA implementations.
//
//   S[i, j] = s <x_i, y_j>            similarity "dot"
//   S[i, j] = -s ||x_i - y_j||^2      similarity "sqeuclidean"
// with images x [N, D], texts y [M, D] and s = logit_scale (one element). Row i's label is column i + label_offset.
//
// contrastive_lse -> row_lse [N], col_lse [M], positive [N], row_stats [3, N], col_stats [2, M] in float64, and kept.
//   row_lse[i] = log sum_j exp S[i, j],  col_lse[j] = log sum_i exp S[i, j],  positive[i] = S[i, i + label_offset].
//   stats: lse in two parts, which the backward pass needs separately: lse = s stats[0] + ln(2) stats[1]; row_stats[2]:
//   S / s at the label. Where the label outweighs the others of its row or column, stats[0] is its S / s and ln(2)
//   stats[1] what the others add: row_lse - positive keeps its relative precision however small it is.
//   kept [K, M]: S / s of the first K rows, in a format of its own (on the CPU with bfloat16 products as 16-bit
//   multiples of a unit, half the memory), as many as fit into work_bytes, so that the backward pass need not form them
//   again; [0, M] when work_bytes is 0.
// contrastive_lse_backward -> the gradients that `needs` asks for (images, texts, logit_scale), in the inputs' dtypes;
//   an empty tensor for the others.
//
// sigmoid_loss -> sum_ij softplus(-z_ij (s <x_i, y_j> + bias)) in float64, z = +1 at the label and -1 elsewhere, and
//   its gradients in the type of the arithmetic. Rows whose label lies outside [0, M) have none: a block of negatives.
//
// Arithmetic: float64 for float64 inputs, float32 otherwise; with precision "medium", and for bfloat16
// inputs, products of bfloat16 with float32 accumulation where the processor, or a Hopper GPU, has them (dot similarity
// only). On the CPU: where norms allow logits too large for float32 (range.h: kFloat32Exponent, kBf16Exponent),
// float64 instead; distances are sums of squared differences. On CUDA they are norms and a product, about the texts'
// mean: near pairs far from it lose bits.
// Work: 2NMD forward, 6NMD backward (4NMD for kept rows, 2NMD less for each of dX and dY not asked for).
// Memory: O((N + M) D) and one chunk of logit gradients; never N x M beyond what work_bytes allows.
// Results do not depend on the number of threads.
#pragma once
#include <string>

namespace gapkern::contrastive {

enum class Similarity { dot, sqeuclidean };

inline bool parse_similarity(const std::string& name, Similarity* out) {
  *out = name == "sqeuclidean" ? Similarity::sqeuclidean : Similarity::dot;
  return name == "dot" || name == "sqeuclidean";
}

}  // namespace gapkern::contrastive

// The softmax losses of prefixes of the embeddings (Matryoshka): the operators' contract, and their kernels.
//
//   t_k[i, j] = f_ki g_kj <x_i[:d_k], y_j[:d_k]>,  S_k = s t_k,  d_1 < d_2 < ... < d_P = D
// with factors f [P, N] and g [P, M], which normalise the prefixes. Labels lie on the diagonal, N <= M.
//
// contrastive_prefix_lse -> row_lse [P, N], col_lse [P, M], positive [P, N], row_stats [P, 3, N], col_stats [P, 2, M]
// in
//   float64, and kept [P K, M]: of each prefix what contrastive_lse gives of one problem.
// contrastive_prefix_lse_backward -> the gradients that `needs` asks for (images, texts, logit_scale, f, g).
//
// A prefix's products are those of the one before and of the segment [d_k-1, d_k) of the embeddings. The gradient of
// segment k is a product with sum_{l >= k} f_l g_l dS_l, which is summed in the tile.
// Work: 2NMD forward, 6NMD backward (4NMD for kept rows), whatever P is; P exponentials a pair in each.
// Memory: O((N + M) (D + P)), and the chunk of logit gradients that a single problem has.
#pragma once
#include "contrastive/kernels.h"

namespace gapkern::contrastive {

// LogitBlock is that of the prefix's last segment; factors are read in whole vectors, as arrays over columns are.
template <class T>
struct PrefixForwardBlock : ForwardBlock<T> {
  const T *row_factor, *column_factor;
};

// row_sum and column_sum are of dS t. `out` takes the gradient by the segment's products.
template <class T>
struct PrefixGradientBlock : GradientBlock<T> {
  const T *row_factor, *column_factor;
};

// kernels_prefixes.cpp: a block of all prefixes, of increasing width.
template <class T>
struct PrefixKernels {
  void (*prefixes_forward)(const PrefixForwardBlock<T>* prefixes, int count);
  // `tiles` has room for a tile of mr x kStripe for each prefix.
  void (*prefixes_gradient)(const PrefixGradientBlock<T>* prefixes, int count, T* tiles);
};

GAPKERN_DECLARE_FOR_EACH_ISA(const KernelSet<PrefixKernels>& prefix_kernels())

}  // namespace gapkern::contrastive

// Every operator's schema, once. Implementations register themselves per device in <capability>/cpu.cpp and cuda.cu;
// fake, autograd and autocast rules live beside the Python callers in gapkern/ops/.
#include <torch/csrc/stable/library.h>

#include "common/allocator.h"

STABLE_TORCH_LIBRARY(gapkern, m) {
  // Log-sum-exps of the logits S [N, M] of images [N, D] and texts [M, D], without forming S.
  m.def(
      "contrastive_lse(Tensor images, Tensor texts, Tensor logit_scale, str similarity, int label_offset,"
      " str precision, int work_bytes) -> (Tensor row_lse, Tensor col_lse, Tensor positive,"
      " Tensor row_stats, Tensor col_stats, Tensor kept)");
  m.def(
      "contrastive_lse_backward(Tensor grad_row, Tensor grad_col, Tensor grad_positive, Tensor images, Tensor texts,"
      " Tensor logit_scale, Tensor row_stats, Tensor col_stats, Tensor kept, str similarity, int label_offset,"
      " str precision, bool[3] needs) -> (Tensor grad_images, Tensor grad_texts, Tensor grad_logit_scale)");
  // The same of prefixes of the embeddings, of which contrastive/prefixes.h has the contract.
  m.def(
      "contrastive_prefix_lse(Tensor images, Tensor texts, Tensor logit_scale, Tensor row_factors, Tensor col_factors,"
      " int[] dims, str precision, int work_bytes) -> (Tensor row_lse, Tensor col_lse, Tensor positive,"
      " Tensor row_stats, Tensor col_stats, Tensor kept)");
  m.def(
      "contrastive_prefix_lse_backward(Tensor grad_row, Tensor grad_col, Tensor grad_positive, Tensor images,"
      " Tensor texts, Tensor logit_scale, Tensor row_factors, Tensor col_factors, Tensor row_stats, Tensor col_stats,"
      " Tensor kept, int[] dims, str precision, bool[5] needs) -> (Tensor grad_images, Tensor grad_texts,"
      " Tensor grad_logit_scale, Tensor grad_row_factors, Tensor grad_col_factors)");
  // contrastive_lse by classes of pairs, of which gapkern/ops/contrastive/masked.py has the contract. stats [2, count]
  // of the negatives, then of the positives, as above; in row_stats also S / s at the label.
  m.def(
      "contrastive_masked_lse(Tensor x, Tensor y, Tensor logit_scale, Tensor row_ids, Tensor col_ids, Tensor row_limit,"
      " Tensor col_limit, Tensor guide_x, Tensor guide_y, Tensor guide_row_limit, Tensor guide_col_limit,"
      " str similarity, int label_offset, str label, str equal, str precision, int work_bytes)"
      " -> (Tensor row_negative, Tensor col_negative, Tensor row_positive, Tensor col_positive, Tensor label_logit,"
      " Tensor row_stats, Tensor col_stats, Tensor kept)");
  m.def(
      "contrastive_masked_lse_backward(Tensor grad_row_negative, Tensor grad_col_negative, Tensor grad_row_positive,"
      " Tensor grad_col_positive, Tensor grad_label_logit, Tensor row_negative, Tensor col_negative,"
      " Tensor row_positive, Tensor col_positive, Tensor row_stats, Tensor col_stats, Tensor kept, Tensor x, Tensor y,"
      " Tensor logit_scale, Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit, Tensor guide_x,"
      " Tensor guide_y, Tensor guide_row_limit, Tensor guide_col_limit, str similarity, int label_offset, str label,"
      " str equal, str precision, bool[3] needs) -> (Tensor grad_x, Tensor grad_y, Tensor grad_logit_scale)");
  // The rows of x against all others of x: half the logits, since they are symmetric.
  m.def(
      "contrastive_self_lse(Tensor x, Tensor logit_scale, Tensor ids, Tensor limit, str similarity, str equal,"
      " str precision, int work_bytes) -> (Tensor negative, Tensor positive, Tensor stats, Tensor kept)");
  m.def(
      "contrastive_self_lse_backward(Tensor grad_negative, Tensor grad_positive, Tensor negative, Tensor positive,"
      " Tensor stats, Tensor kept, Tensor x, Tensor logit_scale, Tensor ids, Tensor limit, str similarity, str equal,"
      " str precision, bool[2] needs) -> (Tensor grad_x, Tensor grad_logit_scale)");
  // Sums of t = S / s over the pairs of equal ids; contrastive/class_sums.h.
  m.def(
      "contrastive_class_sums(Tensor x, Tensor y, Tensor row_ids, Tensor col_ids, str similarity, int label_offset,"
      " bool labelled) -> (Tensor row_sums, Tensor col_sums)");
  m.def(
      "contrastive_class_sums_backward(Tensor grad_row, Tensor grad_col, Tensor x, Tensor y, Tensor row_ids,"
      " Tensor col_ids, str similarity, int label_offset, bool labelled, bool[2] needs)"
      " -> (Tensor grad_x, Tensor grad_y)");
  // The summed sigmoid loss and its gradients in one pass; `needs` says which of the embeddings' gradients to form.
  m.def(
      "sigmoid_loss(Tensor images, Tensor texts, Tensor logit_scale, Tensor logit_bias, int label_offset,"
      " str precision, bool[2] needs) -> (Tensor loss, Tensor grad_images, Tensor grad_texts,"
      " Tensor grad_logit_scale, Tensor grad_logit_bias)");
  // The same with positives by ids, of which gapkern/ops/contrastive/masked_sigmoid.py has the contract.
  m.def(
      "contrastive_masked_sigmoid(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor row_ids,"
      " Tensor col_ids, Tensor row_weights, Tensor col_weights, bool soft_targets, str precision, bool[2] needs)"
      " -> (Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_logit_scale, Tensor grad_logit_bias)");
  // The losses' steps between library products, for a chunk of rows (contrastive/kernels.cuh; in PyTorch's operations
  // gapkern/ops/contrastive/chunked.py). Sums come as the tiles' partial sums. Norms are empty for the dot product. The
  // log-sum-exps are over all but the labels; grad_label is dS there.
  m.def(
      "contrastive_chunk_lse(Tensor products, Tensor row_norms, Tensor col_norms, Tensor logit_scale, int label_offset)"
      " -> (Tensor row_lse, Tensor col_lse)");
  m.def(
      "contrastive_chunk_gradient(Tensor products, Tensor row_norms, Tensor col_norms, Tensor logit_scale,"
      " Tensor row_lse2, Tensor col_lse2, Tensor grad_row, Tensor grad_col, Tensor grad_label, int label_offset,"
      " Tensor like) -> (Tensor ds, Tensor of_scale, Tensor row_sums, Tensor col_sums)");
  m.def(
      "contrastive_chunk_sigmoid(Tensor products, Tensor logit_scale, Tensor logit_bias, int label_offset, Tensor like)"
      " -> (Tensor loss, Tensor ds, Tensor of_scale, Tensor of_bias)");
  // The same steps where pairs are of classes (contrastive/classes.cuh; in PyTorch's operations
  // gapkern/ops/contrastive/masked_steps.py). Tensors without elements are absent; `positive`: pairs of equal ids are
  // positives, else left out. Log-sum-exps and their gradients are [classes, n] and [classes, M], negatives first,
  // positives where there are any; grad_label is dS at the labels. of_all: sums of dS.
  m.def(
      "contrastive_masked_chunk_lse(Tensor products, Tensor row_norms, Tensor col_norms, Tensor logit_scale,"
      " Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit, Tensor guide, Tensor guide_row_limit,"
      " Tensor guide_col_limit, int label_offset, bool positive) -> (Tensor row_lse, Tensor col_lse)");
  m.def(
      "contrastive_masked_chunk_gradient(Tensor products, Tensor row_norms, Tensor col_norms, Tensor logit_scale,"
      " Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit, Tensor guide, Tensor guide_row_limit,"
      " Tensor guide_col_limit, int label_offset, bool positive, Tensor row_lse2, Tensor col_lse2, Tensor grad_row,"
      " Tensor grad_col, Tensor grad_label, Tensor like)"
      " -> (Tensor ds, Tensor of_scale, Tensor of_all, Tensor row_sums, Tensor col_sums)");
  m.def(
      "contrastive_masked_chunk_sigmoid(Tensor products, Tensor logit_scale, Tensor logit_bias, Tensor row_ids,"
      " Tensor col_ids, Tensor row_weights, Tensor col_weights, bool soft_targets, Tensor like)"
      " -> (Tensor loss, Tensor ds, Tensor of_scale, Tensor of_bias)");
  // The softmax losses' steps on Hopper (contrastive/sm90.cuh; in PyTorch's operations
  // gapkern/ops/contrastive/emulation.py). control = {k, -c}: exponentials are 2^(k <x, y> - c). kept [n, M rounded up
  // to 8] receives them, unless empty. Sums and log-sum-exps are over all but the labels; grad_label is dS there.
  // col_weight has M rounded up to 256 elements, zeros at the end. dS comes as [terms n, M rounded up to 8]: matrices
  // whose sum it is. Log-sum-exps and positives take float32 embeddings too.
  m.def("contrastive_sm90_shift(Tensor row_norms, Tensor col_norms, Tensor logit_scale) -> Tensor");
  m.def(
      "contrastive_sm90_sums(Tensor images, Tensor texts, Tensor control, Tensor(a!) kept,"
      " int label_offset)"
      " -> (Tensor row_sums, Tensor col_sums)");
  m.def(
      "contrastive_sm90_lse(Tensor row_sums, Tensor col_sums, Tensor images, Tensor texts, Tensor control,"
      " int label_offset) -> (Tensor row_lse, Tensor col_lse)");
  m.def("contrastive_sm90_positive(Tensor images, Tensor texts, int label_offset) -> Tensor");
  m.def(
      "contrastive_sm90_weights(Tensor row_lse2, Tensor col_lse2, Tensor grad_row, Tensor grad_col, Tensor control)"
      " -> (Tensor row_weight, Tensor col_weight, Tensor separate)");
  m.def(
      "contrastive_sm90_gradient(Tensor images, Tensor texts, Tensor control, Tensor separate, Tensor row_weight,"
      " Tensor col_weight, Tensor kept, Tensor grad_label, int label_offset, int terms=1) -> Tensor");
  // The sigmoid loss's step there: sums [3, n] over the rows' losses, dS and dS <x, y>. Any label_offset.
  m.def(
      "contrastive_sm90_sigmoid(Tensor images, Tensor texts, Tensor logit_scale, Tensor logit_bias,"
      " int label_offset, int terms=1) -> (Tensor sums, Tensor ds)");
  // Over classes of pairs there (contrastive/sm90_masked.cuh; gapkern/ops/contrastive/masked_emulation.py). Marks are
  // what the classes and the weights of a row or a column follow from; log-sum-exps of negatives, then of positives.
  m.def(
      "contrastive_sm90_masked_sums(Tensor images, Tensor texts, Tensor control, Tensor condition, Tensor row_marks,"
      " Tensor col_marks, int label_offset, bool positive) -> (Tensor row_sums, Tensor col_sums)");
  m.def(
      "contrastive_sm90_masked_merge(Tensor row_sums, Tensor col_sums, Tensor control, Tensor(a!) row_lse,"
      " Tensor(b!) col_lse) -> (Tensor condition, Tensor next_control)");
  m.def(
      "contrastive_sm90_masked_repair(Tensor images, Tensor texts, Tensor control, Tensor row_marks, Tensor col_marks,"
      " int label_offset, Tensor(a!) row_lse, Tensor(b!) col_lse) -> ()");
  m.def(
      "contrastive_sm90_masked_gradient(Tensor images, Tensor texts, Tensor control, Tensor row_marks,"
      " Tensor col_marks, Tensor grad_label, int label_offset) -> Tensor");
  m.def(
      "contrastive_sm90_masked_sigmoid(Tensor images, Tensor texts, Tensor logit_scale, Tensor logit_bias,"
      " Tensor row_marks, Tensor col_marks, bool soft_targets) -> (Tensor sums, Tensor ds)");
  // Counter-based noise and quantisation of rows; perturb/perturb.h.
  m.def("perturb_bits(Tensor x, int seed, int trial, int first_row) -> Tensor");
  m.def("perturb_noise(Tensor x, str law, float std, int seed, int trial, int first_row) -> Tensor");
  m.def(
      "perturb_noisy_gallery(Tensor x, Tensor shift, str law, float std, int seed, int trial, int first_row,"
      " bool normalize, str when) -> Tensor");
  m.def("perturb_quantize(Tensor x, Tensor low, Tensor high, int bins) -> Tensor");
  // The mean shift; meanshift/meanshift.h.
  m.def("meanshift_sum(Tensor x) -> Tensor");
  m.def("meanshift_gram(Tensor x, Tensor mean) -> Tensor");
  m.def("meanshift_apply(Tensor x, Tensor shift, bool normalize) -> Tensor");
  // Probabilities that a row of the gallery stays first under Gaussian noise; robustness/robustness.h.
  m.def("robustness_exact(Tensor distances, Tensor targets, float variance, int dims) -> Tensor");
  m.def("robustness_exact_inner(Tensor scores, Tensor targets, Tensor deviations) -> Tensor");
  // Each query's nearest row and the distances of the best two.
  m.def(
      "robustness_nearest(Tensor queries, Tensor gallery, Tensor centre)"
      " -> (Tensor row, Tensor best, Tensor second, Tensor margin)");
  // The caching allocator of the CPU operators; common/allocator.h.
  m.def("empty_cache() -> int");
  m.def("fill_allocations(bool wanted) -> ()");
}

namespace {
int64_t empty_cache() { return gapkern::empty_cache(); }
void fill_allocations(bool wanted) { gapkern::fill_allocations(wanted); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gapkern, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
  m.impl("fill_allocations", TORCH_BOX(&fill_allocations));
}

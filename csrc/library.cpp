// Every operator's schema, once. Implementations register themselves per device in <capability>/cpu.cpp and cuda.cu;
// fake, autograd and autocast rules live beside the Python callers in gapkern/ops/.
#include <torch/csrc/stable/library.h>

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
  // The summed sigmoid loss and its gradients in one pass; `needs` says which of the embeddings' gradients to form.
  m.def(
      "sigmoid_loss(Tensor images, Tensor texts, Tensor logit_scale, Tensor logit_bias, int label_offset,"
      " str precision, bool[2] needs) -> (Tensor loss, Tensor grad_images, Tensor grad_texts,"
      " Tensor grad_logit_scale, Tensor grad_logit_bias)");
  // Counter-based noise and quantisation of rows; perturb/perturb.h.
  m.def("perturb_bits(Tensor x, int seed, int trial, int first_row) -> Tensor");
  m.def("perturb_noise(Tensor x, str law, float std, int seed, int trial, int first_row) -> Tensor");
  m.def("perturb_quantize(Tensor x, Tensor low, Tensor high, int bins) -> Tensor");
  // The mean shift; meanshift/meanshift.h.
  m.def("meanshift_sum(Tensor x) -> Tensor");
  m.def("meanshift_gram(Tensor x, Tensor mean) -> Tensor");
  m.def("meanshift_apply(Tensor x, Tensor shift, bool normalize) -> Tensor");
  // Probabilities that a row of the gallery stays nearest under Gaussian noise; robustness/robustness.h.
  m.def("robustness_exact(Tensor distances, Tensor targets, float variance, int dims) -> Tensor");
}

// The element-wise arithmetic of the Hopper kernels' epilogues over classes of pairs (contrastive/epilogue.cuh).
#pragma once
#include "contrastive/epilogue.cuh"

namespace gapkern::contrastive::sm90 {

// softplus(s) of a negative. Of a positive a softplus(-s) + b softplus(s), b = 0, or with soft targets 1 - a: then
// softplus(-s) + (1 - a) s, which cancels nothing where a = 1. What lies beyond the matrices is a negative of any s.
GAPKERN_HD SigmoidTerms sigmoid_of_pair(float acc, float scale, float bias, bool positive, float a, bool soft) {
  const float s = fmaf(scale, acc, bias);
  const SigmoidTerms terms = sigmoid_of_other(positive ? -s : s, 1, -0.f);
  const float weight = positive && !soft ? a : 1.f;
  const float more_loss = positive && soft ? fmaf(-a, s, s) : 0.f, more_gradient = positive && soft ? 1 - a : 0.f;
  return {fmaf(terms.loss, weight, more_loss), fmaf(terms.gradient, positive ? -weight : weight, more_gradient)};
}

}  // namespace gapkern::contrastive::sm90

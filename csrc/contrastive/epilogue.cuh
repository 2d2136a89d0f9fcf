// The element-wise arithmetic of the Hopper kernels' epilogues, from an accumulator <x_i, y_j>. Host and device, so
// that it is tested without a GPU.
//
// k = log2(e) logit_scale and shift = -c are the same for every element: one exponential e = 2^(k acc - c) serves the
// sum over the row and the sum over the column. In the gradient dS = e (a_i + b_j) with weights a_i and b_j, unless one
// of them or e leaves the range of float32: such a row or column has a separate weight, with an exponential of its own.
//
// The sigmoid loss needs no statistics: one product gives the loss, dS, and the sums for scale and bias.
#pragma once
#include <cmath>

#include "common/host_device.h"

namespace gapkern::contrastive::sm90 {

// Results below 2^-126 flush to zero on the device.
GAPKERN_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Within one unit in the last place, for x in [1, 2].
GAPKERN_HD float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

GAPKERN_HD float log2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

GAPKERN_HD float exponential(float acc, float k, float shift) { return exp2_fast(fmaf(k, acc, shift)); }

// A weight g 2^-lse2 in one float, told apart by its lowest bit: 0 for the factor g 2^(c - lse2) of e, 1 for a separate
// weight, the exponent log2 |g| - lse2 with the sign in bit 1.
GAPKERN_HD float common_weight(double factor) { return from_bits(to_bits(float(factor)) & ~1u); }
GAPKERN_HD bool is_separate(float weight) { return to_bits(weight) & 1; }
GAPKERN_HD float separate_weight(double g, double lse2) {
  const double magnitude = g < 0 ? -g : g, least = -1e30, most = 1e30;
  double exponent = magnitude == 0 ? least : log2(magnitude) - lse2;
  exponent = exponent < least ? least : exponent > most ? most : exponent;
  return from_bits((to_bits(float(exponent)) & ~3u) | uint32_t(g < 0) << 1 | 1);
}
// A common weight as a separate one; the exponential's shift goes into it.
GAPKERN_HD float separated(float weight, float shift) {
  const float exponent = log2_fast(weight < 0 ? -weight : weight) + shift, least = -1e30f;
  const uint32_t bits = (to_bits(exponent < least ? least : exponent) & ~3u) | uint32_t(weight < 0) << 1 | 1;
  return is_separate(weight) ? weight : from_bits(bits);
}

// A separate weight times 2^v.
GAPKERN_HD float separate_term(float v, float weight) {
  return from_bits(to_bits(exp2_fast(v + weight)) ^ (to_bits(weight) & 2) << 30);
}

GAPKERN_HD float gradient_of_common(float acc, float k, float shift, float a, float b) {
  return exponential(acc, k, shift) * (a + b);
}
GAPKERN_HD float gradient_of_separate(float acc, float k, float a, float b) {
  return separate_term(k * acc, a) + separate_term(k * acc, b);
}

// log1p(e) / e on [0, 1]: the polynomial of least relative error, 3e-8; evaluated in float32 1.7e-7.
GAPKERN_HD float log1p_ratio(float e) {
  float p = 0.005232690833508968f;
  p = fmaf(p, e, -0.029505228623747826f);
  p = fmaf(p, e, 0.07822594791650772f);
  p = fmaf(p, e, -0.13663245737552643f);
  p = fmaf(p, e, 0.19106008112430573f);
  p = fmaf(p, e, -0.2484298199415207f);
  p = fmaf(p, e, 0.3331909775733948f);
  p = fmaf(p, e, -0.4999949336051941f);
  return fmaf(p, e, 0.9999999403953552f);
}

// The loss -log sigmoid(z (s <x, y> + bias)), z = 1 at the label and -1 elsewhere, and its derivative by s <x, y>.
struct SigmoidTerms {
  float loss, gradient;
};
GAPKERN_HD SigmoidTerms sigmoid_of_other(float acc, float scale, float bias) {
  const float s = fmaf(scale, acc, bias), e = exp2_fast(-1.44269504f * fabsf(s));
  const float reciprocal = reciprocal_fast(1 + e);
  return {fmaf(e, log1p_ratio(e), s > 0 ? s : 0.f), s > 0 ? reciprocal : e * reciprocal};
}
GAPKERN_HD SigmoidTerms sigmoid_of_label(float acc, float scale, float bias) {
  const SigmoidTerms terms = sigmoid_of_other(acc, -scale, -bias);
  return {terms.loss, -terms.gradient};
}

// What lies beyond the matrices has the accumulator 0; set to this its exponential is zero, and its sigmoid loss.
inline constexpr float kFar = 3e38f;
GAPKERN_HD float nonzero(float scale) {
  const float magnitude = scale < 0 ? -scale : scale;
  return magnitude < 1e-30f ? (scale < 0 ? -1e-30f : 1e-30f) : scale;
}
GAPKERN_HD float excluded(float scale) { return scale < 0 ? kFar : -kFar; }

}  // namespace gapkern::contrastive::sm90

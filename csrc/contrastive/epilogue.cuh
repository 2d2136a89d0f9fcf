// What the Hopper kernels make of an accumulator <x_i, y_j>: the only arithmetic in their epilogues, and as such all
// that CUTLASS's visitors do besides moving and summing. Host and device, so that it is tested without a GPU.
//
// k = log2(e) logit_scale and shift = -c are the same for every element: one exponential e = 2^(k acc - c) serves the
// sum over the row and the sum over the column. In the gradient dS = e (a_i + b_j) while that is safe; `apart` weighs a
// row and a column with an exponential each, which never over- or underflows wrongly.
//
// The sigmoid loss needs no statistics: one product gives the loss, dS, and the sums that the scale and the bias need.
#pragma once
#include <cmath>

#include "common/host_device.h"

namespace gapkern::contrastive::sm90 {

// Results below 2^-126 are zero on the device.
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

GAPKERN_HD float exponential(float acc, float k, float shift) { return exp2_fast(fmaf(k, acc, shift)); }

// A weight g 2^-lse2 as one float that neither over- nor underflows: log2 |g| - lse2, the sign in the lowest bit.
GAPKERN_HD float encode_weight(double g, double lse2) {
  const double magnitude = g < 0 ? -g : g, least = -1e30, most = 1e30;
  double exponent = magnitude == 0 ? least : log2(magnitude) - lse2;
  exponent = exponent < least ? least : exponent > most ? most : exponent;
  return from_bits((to_bits(float(exponent)) & ~1u) | uint32_t(g < 0));
}

// The weight times 2^v.
GAPKERN_HD float encoded_term(float v, float weight) {
  return from_bits(to_bits(exp2_fast(v + weight)) ^ (to_bits(weight) << 31));
}

GAPKERN_HD float logit_gradient(float acc, float k, float shift, bool apart, float a, float b) {
  if (!apart) return exponential(acc, k, shift) * (a + b);
  const float v = k * acc;
  return encoded_term(v, a) + encoded_term(v, b);
}

// z (s <x, y> + bias) with z = 1 where the column is the row's label, and -1 elsewhere. Numbers of rows and columns
// come as floats, exact up to 2^24.
GAPKERN_HD float signed_logit(float acc, float scale, float bias, float label, float column) {
  const float s = fmaf(scale, acc, bias);
  return label == column ? s : -s;
}

GAPKERN_HD float exponential_of_minus_magnitude(float u) { return exp2_fast(-1.44269504f * (u < 0 ? -u : u)); }

GAPKERN_HD float sigmoid_loss(float acc, float scale, float bias, float label, float column) {
  const float u = signed_logit(acc, scale, bias, label, column);
  return (u < 0 ? -u : 0.f) + log1pf(exponential_of_minus_magnitude(u));
}

GAPKERN_HD float sigmoid_gradient(float acc, float scale, float bias, float label, float column) {
  const float u = signed_logit(acc, scale, bias, label, column), e = exponential_of_minus_magnitude(u);
  const float sigmoid = (u < 0 ? 1.f : e) * reciprocal_fast(1 + e);  // of -u
  return label == column ? -sigmoid : sigmoid;
}

}  // namespace gapkern::contrastive::sm90

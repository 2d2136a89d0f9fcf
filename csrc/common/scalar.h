// vec.h's face with one lane: numerics written for vectors, on CUDA and wherever device kernels run on the CPU.
#pragma once
#include <cmath>

#include "common/host_device.h"

#define GAPKERN_INLINE GAPKERN_HD

namespace gapkern::scalar {

using f32v = float;
using f64v = double;

template <class T>
struct Vec {
  using type = T;
};

template <class T>
GAPKERN_HD T splat(T x) {
  return x;
}
template <class V>
GAPKERN_HD V at_least(V a, V low) {
  return a < low ? low : a;
}

GAPKERN_HD float root(float x) { return sqrtf(x); }
GAPKERN_HD double root(double x) { return sqrt(x); }
GAPKERN_HD float exp2(float x) { return exp2f(x); }
GAPKERN_HD double exp2(double x) { return ::exp2(x); }

// x = 2^exponent mantissa, mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
GAPKERN_HD void split(float x, float* exponent, float* mantissa) {
  const uint32_t bits = to_bits(x) + (0x3f800000u - 0x3f3504f3u);
  *exponent = float(int32_t(bits >> 23) - 127);
  *mantissa = from_bits((bits & 0x007fffffu) + 0x3f3504f3u);
}
GAPKERN_HD void split(double x, double* exponent, double* mantissa) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits += 0x3ff0000000000000ull - 0x3fe6a09e667f3bcdull;
  *exponent = double(int32_t(bits >> 52) - 1023);
  bits = (bits & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull;
  memcpy(mantissa, &bits, sizeof bits);
}

}  // namespace gapkern::scalar

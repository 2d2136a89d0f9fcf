// bfloat16 and float16 as their bits, to and from float, in integer steps that vectorise on every instruction set.
// Rounding is to nearest even; NaN stays NaN, values beyond the range become infinite.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace gapkern {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

GAPKERN_HD float to_float(float x) { return x; }
GAPKERN_HD float to_float(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
GAPKERN_HD float to_float(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  // The exponent is 112 too small; the product is exact and right for subnormal numbers too.
  const float scaled = from_bits(magnitude) * 0x1p112f;
  const bool special = magnitude >= 0x0f800000u;
  return from_bits(sign | (special ? magnitude | 0x7f800000u : to_bits(scaled)));
}

GAPKERN_HD void from_float(float x, float* out) { *out = x; }
GAPKERN_HD void from_float(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x == x ? rounded : 0x7fc0u | (bits >> 16));
}
GAPKERN_HD void from_float(float x, Half* out) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  // Below 2^-14 the sum with 1/2 leaves the rounded multiple of 2^-24 in the low mantissa bits.
  const uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out->bits = uint16_t(sign | result);
}

// To and from float64.
GAPKERN_HD double widened(double x) { return x; }
template <class T>
GAPKERN_HD double widened(T x) {
  return double(to_float(x));
}
GAPKERN_HD void narrowed(double x, double* out) { *out = x; }
template <class T>
GAPKERN_HD void narrowed(double x, T* out) {
  from_float(float(x), out);
}

}  // namespace gapkern

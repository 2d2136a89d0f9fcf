// Which exponents the softmax losses' logits may reach, and what keeps their exponentials within the arithmetic's
// range.
#pragma once
#include <cmath>

#include "contrastive/contrastive.h"
#include "contrastive/kernels.h"

namespace gapkern::contrastive {

inline constexpr double kLog2e = 1.4426950408889634074, kLog2eLow = 2.0355273740931033e-17;
// Without a reference, 2^(k t) for |k t| <= 80: sums over 2^30 terms and the weights of the backward pass stay far from
// both ends of float32.
inline constexpr double kSafeExponent = 80;
// Up to here, exponents are shifted so that the largest possible one is again kSafeExponent, and the result stands if
// every sum comes out above 2^kLeastExponent, as it does for trained embeddings at the largest logit_scale in use, 100.
// Terms below float32's range are then far below such a sum's rounding.
inline constexpr double kShiftedExponent = 200;
inline constexpr double kLeastExponent = -75;
// At exponents of 1024, 13 fractional bits of float32 remain, and as many of a softmax: beyond, the arithmetic is
// float64. Unit vectors come there at a logit_scale of 710, or 177 with distances. Bfloat16 products need no more bits
// than bfloat16 has.
inline constexpr double kFloat32Exponent = 1024, kBf16Exponent = 65536;

// Of exponents k t, |t| <= largest_t, k = log2(e) scale.
template <class T>
class ExponentRange {
 public:
  ExponentRange(double scale, Similarity similarity, double largest_t, bool bf16_products)
      : scale_(scale), bound_(std::abs(scale) * kLog2e * largest_t), bf16_products_(bf16_products) {
    if (bound_ <= kSafeExponent) return;
    range_ = bound_ <= kShiftedExponent ? Range::shifted : Range::tracked;
    const bool never_positive = similarity == Similarity::sqeuclidean && scale > 0;
    if (shifted()) shift_ = std::ceil(never_positive ? 0 : bound_) - kSafeExponent;
  }

  double k() const { return scale_ * kLog2e; }
  double bound() const { return bound_; }  // no |k t| is larger
  double shift() const { return shift_; }
  bool shifted() const { return range_ == Range::shifted; }
  bool tracked() const { return range_ == Range::tracked; }
  // Whether the arithmetic should be float64.
  bool wants_double() const { return sizeof(T) < 8 && bound_ > (bf16_products_ ? kBf16Exponent : kFloat32Exponent); }
  // The logit, in units of t, whose exponential is 1.
  double reference() const { return shift_ == 0 ? 0 : shift_ / k(); }
  // Whether 2^log2 of a sum about a reference stays clear of the lower end once it is shifted.
  bool holds(double reference, double log2) const { return k() * reference - shift_ + log2 >= kLeastExponent; }

  Exponents<T> exponents() const {
    const T high = T(k());
    return {range_, high, T((k() - double(high)) + (std::fma(scale_, kLog2e, -k()) + scale_ * kLog2eLow)), T(shift_)};
  }

  // For shifted exponents with a sum that does not hold.
  void track() {
    range_ = Range::tracked;
    shift_ = 0;
  }

 private:
  double scale_, bound_;
  bool bf16_products_;
  Range range_ = Range::normal;
  double shift_ = 0;  // of exponents, an integer; Range::shifted only
};

}  // namespace gapkern::contrastive

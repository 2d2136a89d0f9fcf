// Parts of the sigmoid and its loss, for a vector of logits. Only for kernels_*.cpp.
#pragma once
#include "contrastive/tile.h"

namespace gapkern::contrastive {
namespace {

// log(1 + u) for u in [0, 1], to full relative precision: 2 artanh(u / (2 + u)), whose series in z^2 <= 1/9 is short.
template <class T>
GAPKERN_INLINE typename Vec<T>::type log1p(typename Vec<T>::type u) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const auto z = u / (u + T(2)), z2 = z * z;
  auto p = splat<T>(T(1) / T(2 * terms - 1));
#pragma GCC unroll 17
  for (int i = terms - 2; i >= 0; --i) p = p * z2 + T(1) / T(2 * i + 1);
  return p * (z + z);
}

// e^x for x <= 0; zero below the normal range.
template <class T>
GAPKERN_INLINE typename Vec<T>::type exp_of_negative(typename Vec<T>::type x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T log2e = T(1.4426950408889634074), low = T(single ? 1.92596303e-8 : 2.0355273740931033e-17);
  constexpr T least = T(single ? -87.33 : -708.39);
  const auto e = exp2_of_product<false>(at_least(x, splat<T>(least)), log2e, low, T(0));
  return x < least ? decltype(e){} : e;
}

}  // namespace
}  // namespace gapkern::contrastive

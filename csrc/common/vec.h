// Vectors for the CPU kernels: one source, the compiler's own vector types, as wide as the instruction set allows.
// Only for files listed with gapkern_simd_source(): everything has internal linkage, so that code compiled for one
// instruction set can never be picked by the linker for another.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(GAPKERN_ISA_avx512) || defined(GAPKERN_ISA_avx512bf16)
#define GAPKERN_VECTOR_BYTES 64
#elif defined(GAPKERN_ISA_avx2)
#define GAPKERN_VECTOR_BYTES 32
#else
#define GAPKERN_VECTOR_BYTES 16
#endif
#define GAPKERN_INLINE static inline __attribute__((always_inline))

namespace {

using f32v = float __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));
using f64v = double __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));
using i32v = int32_t __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));
using i64v = int64_t __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));
using u32v = uint32_t __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));
using u64v = uint64_t __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));

template <class T>
struct Vec;
template <>
struct Vec<float> {
  using type = f32v;
  static constexpr int size = GAPKERN_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  using type = f64v;
  static constexpr int size = GAPKERN_VECTOR_BYTES / 8;
};

template <class T>
GAPKERN_INLINE typename Vec<T>::type load(const T* p) {
  typename Vec<T>::type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T, class V>
GAPKERN_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
GAPKERN_INLINE typename Vec<T>::type splat(T x) {
  return x - typename Vec<T>::type{};
}

// Operand order keeps a NaN in `a`: both comparisons are false for it.
template <class V>
GAPKERN_INLINE V at_least(V a, V low) {
  return a < low ? low : a;
}
template <class V>
GAPKERN_INLINE V at_most(V a, V high) {
  return a > high ? high : a;
}

template <class T, class V>
GAPKERN_INLINE T sum(V v) {
  T lanes[Vec<T>::size];
  store(lanes, v);
  for (int width = Vec<T>::size / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class T, class V>
GAPKERN_INLINE T largest(V v) {
  T lanes[Vec<T>::size];
  store(lanes, v);
  T best = lanes[0];
  for (int i = 1; i < Vec<T>::size; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// 2^f for f in [-1/2, 1/2]. Relative error of the polynomials 3e-9 (float) and 4e-18 (double). Coefficients:
// interpolation at Chebyshev nodes.
GAPKERN_INLINE f32v exp2_of_fraction(f32v f) {
  f32v p = splat<float>(1.54614446e-4f);
  p = p * f + 1.34004282e-3f;
  p = p * f + 9.61805668e-3f;
  p = p * f + 5.55032723e-2f;
  p = p * f + 2.40226509e-1f;
  p = p * f + 6.93147207e-1f;
  return p * f + 1.f;
}

GAPKERN_INLINE f64v exp2_of_fraction(f64v f) {
  f64v p = splat<double>(4.45581790833606449e-10);
  p = p * f + 7.07419429728852101e-9;
  p = p * f + 1.01780570877339411e-7;
  p = p * f + 1.32154325359123762e-6;
  p = p * f + 1.52527338415567726e-5;
  p = p * f + 1.54035304637243542e-4;
  p = p * f + 1.33335581464064707e-3;
  p = p * f + 9.61812910758725667e-3;
  p = p * f + 5.5504108664821627e-2;
  p = p * f + 2.40226506959101596e-1;
  p = p * f + 6.93147180559945309e-1;
  return p * f + 1.0;
}

// The upper half of a significand: products of two are exact.
GAPKERN_INLINE f32v upper_half(f32v x) { return (f32v)((u32v)x & 0xfffff000u); }
GAPKERN_INLINE f64v upper_half(f64v x) { return (f64v)((u64v)x & 0xfffffffff8000000ull); }
GAPKERN_INLINE float upper_half(float x) { return upper_half(splat(x))[0]; }
GAPKERN_INLINE double upper_half(double x) { return upper_half(splat(x))[0]; }

template <class V>
struct Exponent;
template <>
struct Exponent<f32v> {
  using Bits = u32v;
  static constexpr float shifter = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr uint32_t of_shifter = 0x4b400000u, bias = 127u;
  static constexpr int position = 23;
};
template <>
struct Exponent<f64v> {
  using Bits = u64v;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr uint64_t of_shifter = 0x4338000000000000ULL, bias = 1023u;
  static constexpr int position = 52;
};

// 2^x: results below the normal range are zero, above it infinity; NaN stays NaN.
template <class V>
GAPKERN_INLINE V exp2(V x) {
  using E = Exponent<V>;
  x = at_most(at_least(x, V{} - decltype(E::shifter)(E::bias)), V{} + decltype(E::shifter)(E::bias + 1));
  const V rounded = x + E::shifter;
  const V p = exp2_of_fraction(x - (rounded - E::shifter));
  typename E::Bits n;
  std::memcpy(&n, &rounded, sizeof n);
  n = (n - E::of_shifter + E::bias) << E::position;
  V scale;
  std::memcpy(&scale, &n, sizeof scale);
  return p * scale;
}

// a b + c, rounded once but for its last bits: where there is no fused instruction the factors are split so that the
// product of their upper halves is exact, and b_high is b's upper half.
template <class V, class T>
GAPKERN_INLINE V fused(V a, T b, T b_high, V c) {
#if defined(__FMA__) || defined(__aarch64__)
  (void)b_high;
  return a * b + c;
#else
  const V high = upper_half(a);
  return (high * b_high + c) + ((a - high) * b + high * (b - b_high));
#endif
}

// 2^(x k - shift), k = k_high + k_low, for an integer shift. The product is not rounded before its integer part is
// taken off: the relative error is that of x, however large x k is. The result is a normal number, or with `clamped` is
// within a factor of two of the least one where it would be smaller.
template <bool clamped, class V, class T>
GAPKERN_INLINE V exp2_of_product(V x, T k_high, T k_low, T shift) {
  using E = Exponent<V>;
  const T shifter = E::shifter - shift;
  V rounded = x * k_high + shifter;
  if (clamped) rounded = at_least(rounded, V{} + (E::shifter - T(E::bias - 1)));
  V fraction = fused(x, k_high, upper_half(k_high), shifter - rounded) + x * k_low;
  if (clamped) fraction = at_least(fraction, V{} - T(1));
  V p = exp2_of_fraction(fraction);
  typename E::Bits n, bits;
  std::memcpy(&n, &rounded, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << E::position;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

}  // namespace

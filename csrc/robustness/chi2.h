// Tails of the normal distribution, and of the noncentral chi-square distribution with D degrees of freedom and
// noncentrality lambda: in vectors where an instruction set is named, in scalars for CUDA.
//
// Lugannani and Rice (1980): SF(q) = Phi(-w) + phi(w) (1/u - 1/w). With s = 2q / (D + sqrt(D^2 + 4 lambda q)), the
// saddle is t = (1 - 1/s) / 2, and with delta = s - 1, rho = (delta - log s) / delta^2:
//   w = delta sqrt(D rho + lambda),  u = delta sqrt(D/2 + lambda s),
//   1/u - 1/w = (D kappa - lambda) / (sqrt(A B) (sqrt A + sqrt B)),  A = D/2 + lambda s,  B = D rho + lambda,
//   kappa = (rho - 1/2) / delta.
// Every quantity is formed without differences of near numbers, so nothing special happens at the mean (delta = 0).
// Absolute error against the true tail below 2e-5 for D >= 64 and for D + lambda >= 200.
#pragma once
#include <cmath>

#include "robustness/robustness.h"

#ifdef GAPKERN_ISA
#include "common/vec.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define GAPKERN_LANES GAPKERN_ISA
#else
#include "common/scalar.h"
#define GAPKERN_LANES device
#endif
#ifdef __CUDACC__
#define GAPKERN_CHI2 __host__ __device__ inline
#else
#define GAPKERN_CHI2 inline
#endif

namespace gapkern::robustness::GAPKERN_LANES {
#ifndef GAPKERN_ISA
using namespace gapkern::scalar;
#endif
namespace {

#ifdef GAPKERN_ISA
GAPKERN_INLINE f32v root(f32v x) {
#if GAPKERN_VECTOR_BYTES == 64
  return f32v(_mm512_sqrt_ps(__m512(x)));
#elif GAPKERN_VECTOR_BYTES == 32
  return f32v(_mm256_sqrt_ps(__m256(x)));
#elif defined(__aarch64__)
  return f32v(vsqrtq_f32(float32x4_t(x)));
#else
  for (int i = 0; i < Vec<float>::size; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

GAPKERN_INLINE f64v root(f64v x) {
#if GAPKERN_VECTOR_BYTES == 64
  return f64v(_mm512_sqrt_pd(__m512d(x)));
#elif GAPKERN_VECTOR_BYTES == 32
  return f64v(_mm256_sqrt_pd(__m256d(x)));
#elif defined(__aarch64__)
  return f64v(vsqrtq_f64(float64x2_t(x)));
#else
  for (int i = 0; i < Vec<double>::size; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// x = 2^exponent mantissa, mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
GAPKERN_INLINE void split(f32v x, f32v* exponent, f32v* mantissa) {
  u32v bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x3f800000u - 0x3f3504f3u;
  *exponent = __builtin_convertvector(i32v(bits >> 23) - 127, f32v);
  bits = (bits & 0x007fffffu) + 0x3f3504f3u;
  std::memcpy(mantissa, &bits, sizeof bits);
}

GAPKERN_INLINE void split(f64v x, f64v* exponent, f64v* mantissa) {
  using u64v = uint64_t __attribute__((vector_size(GAPKERN_VECTOR_BYTES)));
  u64v bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x3ff0000000000000ull - 0x3fe6a09e667f3bcdull;
  // The biased exponent as a double without a 64-bit conversion: in the mantissa of 2^52.
  u64v raised = (bits >> 52) | 0x4330000000000000ull;
  f64v e;
  std::memcpy(&e, &raised, sizeof e);
  *exponent = e - splat<double>(4503599627370496.0 + 1023.0);
  bits = (bits & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull;
  std::memcpy(mantissa, &bits, sizeof bits);
}
#endif

// (atanh r - r) / r^3 for |r| <= 0.172.
GAPKERN_INLINE f32v atanh_rest(f32v r) {
  const f32v r2 = r * r;
  return 1.f / 3 + r2 * (1.f / 5 + r2 * (1.f / 7 + r2 * (1.f / 9)));
}
GAPKERN_INLINE f64v atanh_rest(f64v r) {
  const f64v r2 = r * r;
  return 1. / 3 +
         r2 * (1. / 5 +
               r2 * (1. / 7 + r2 * (1. / 9 + r2 * (1. / 11 + r2 * (1. / 13 + r2 * (1. / 15 + r2 * (1. / 17)))))));
}

// Mills' ratio Phi(-x) / phi(x) for x >= 0: (x + 3.75) times it, interpolated in (x - 3.75) / (x + 3.75) at Chebyshev
// nodes; relative error 2e-7 (float), 2e-12 (double).
GAPKERN_INLINE f32v mills(f32v x) {
  const f32v inverse = 1.f / (x + 3.75f), t = (x - 3.75f) * inverse;
  f32v p = splat<float>(-0.000109637855f);
  for (const float c : {-0.000196482928f, 0.00111888408f, 0.00143795092f, -0.0104103919f, 0.00296709757f, 0.0939675659f,
                        -0.379803217f, 0.884689236f, -1.47436938f, 1.88070834f})
    p = p * t + c;
  return p * inverse;
}
GAPKERN_INLINE f64v mills(f64v x) {
  const f64v inverse = 1. / (x + 3.75), t = (x - 3.75) * inverse;
  f64v p = splat<double>(6.6201969071693433e-07);
  for (const double c :
       {3.1359792678999263e-07, -5.8424949961560502e-06, -4.9624035874115628e-06, 3.2394247407251284e-05,
        4.3389813696213674e-05, -0.00017515641264854052, -0.00029407933196682088, 0.0011775269432063484,
        0.0015288951839336597, -0.010434740143602196, 0.0029286128363217542, 0.093971801446220304, -0.37979645818852675,
        0.88468902603324906, -1.4743697189747653, 1.8807083358297338})
    p = p * t + c;
  return p * inverse;
}

// log x for positive normal x; relative error 1e-14.
GAPKERN_INLINE f64v natural_log(f64v x) {
  f64v e, m;
  split(x, &e, &m);
  const f64v r = (m - 1.) / (m + 1.);
  return e * 0.69314718055994530942 + 2. * r * (1. + r * r * atanh_rest(r));
}

// log x given x and x - 1, of which the latter may have more digits, for positive normal x.
GAPKERN_INLINE f32v log1p_of(f32v x, f32v less_one) {
  f32v e, m;
  split(x, &e, &m);
  const f32v d = e == f32v{} ? less_one : m - 1.f;
  const f32v r = d / (2.f + d);
  return e * 0.693147181f + 2.f * r * (1.f + r * r * atanh_rest(r));
}

// log Phi(x), without the underflow of far tails or the rounding of those near 1.
GAPKERN_INLINE f32v log_phi(f32v x) {
  const auto below = x < f32v{};
  const f32v size = below ? -x : x, ratio = mills(size), exponent = -0.5f * size * size - 0.918938533f;
  const f32v tail = exp2(1.44269504f * exponent) * ratio;
  const f32v whole = log1p_of(below ? ratio : 1.f - tail, below ? ratio - 1.f : -tail);
  return below ? whole + exponent : whole;
}

// A point of a distribution seen from its saddle.
template <class V>
struct Saddle {
  V w;           // signed root of twice the exponent: below zero left of the mean
  V correction;  // 1/u - 1/w
  V s;
};

// Whether s, increasing in q and decreasing in lambda, stays so near 1 that log s needs no splitting.
GAPKERN_CHI2 bool near_mean(double q, double dims, double lambda) {
  const double s = 2 * q / (dims + std::sqrt(dims * dims + 4 * lambda * q));
  return s > 0.71 && s < 1.41;
}

// q = D + lambda + excess; separate, since q and lambda may be near. `near_only`: near_mean() for all.
template <class T, bool near_only, class V = typename Vec<T>::type>
GAPKERN_INLINE Saddle<V> saddle(V q, V excess, V lambda, T dims) {
  const V s = (q + q) / (dims + root(dims * dims + T(4) * lambda * q));
  const V delta = excess / (lambda * (s + T(1)) + dims);
  V exponent{}, mantissa = delta;
  if (!near_only) split(s, &exponent, &mantissa);
  const auto near = exponent == V{};
  const V d = near_only ? delta : (near ? delta : mantissa - T(1));
  const V inverse = T(1) / (T(2) + d), r = d * inverse, c = atanh_rest(r);
  V rho = inverse - T(2) * r * inverse * inverse * c;
  V kappa = T(-0.5) * inverse - T(2) * inverse * inverse * inverse * c;
  if (!near_only) {
    const V log_s = exponent * T(0.69314718055994530942) + T(2) * r * (T(1) + r * r * c);
    const V over = T(1) / (near ? splat<T>(T(1)) : delta);
    const V far_rho = (delta - log_s) * over * over;
    kappa = near ? kappa : (far_rho - T(0.5)) * over;
    rho = near ? rho : far_rho;
  }
  const V a = dims * T(0.5) + lambda * s, b = dims * rho + lambda;
  const V root_a = root(a), root_b = root(b);
  return {delta * root_b, (dims * kappa - lambda) / (root_a * root_b * (root_a + root_b)), s};
}

constexpr double kLog2e = 1.4426950408889634074, kInverseRoot2Pi = 0.39894228040143267794;

// P(X > q) where the saddle lies right of the mean, P(X <= q) where it lies left of it.
template <class T, class V>
GAPKERN_INLINE V near_tail(const Saddle<V>& p) {
  const auto left = p.w < V{};
  const V size = left ? -p.w : p.w, correction = left ? -p.correction : p.correction;
  const V density = exp2(T(-0.5 * kLog2e) * size * size) * T(kInverseRoot2Pi);
  const V tail = density * (mills(size) + correction);
  return tail > V{} ? tail : V{};
}

// log P(X > q), without the underflow of far tails or the rounding of those near 1.
template <bool near_only>
GAPKERN_INLINE f32v log_survival(f32v q, f32v excess, f32v lambda, float dims) {
  const Saddle<f32v> p = saddle<float, near_only>(q, excess, lambda, dims);
  const auto left = p.w < f32v{};
  const f32v size = left ? -p.w : p.w;
  const f32v ratio = at_least(mills(size) + (left ? -p.correction : p.correction), splat<float>(1e-30f));
  const f32v exponent = -0.5f * size * size - 0.918938533f;
  const f32v below = exp2(float(kLog2e) * exponent) * ratio;
  const f32v whole = log1p_of(left ? 1.f - below : ratio, left ? -below : ratio - 1.f);
  return left ? whole : whole + exponent;
}

// q - D - lambda where P(X > q) = Phi(-z), by Newton's method on the logarithm of the nearer tail.
GAPKERN_INLINE f64v quantile_excess(f64v z, f64v log_upper, f64v log_lower, double dims, double lambda) {
  const f64v l = splat<double>(lambda);
  const double mean = dims + lambda, spread = 2 * (dims + 2 * lambda) / (9 * mean * mean);
  // Start: the cube root of X / mean is nearly normal.
  f64v cube = 1. - spread + std::sqrt(spread) * z;
  cube = at_least(cube, splat<double>(0.01));
  f64v at = mean * (cube * cube * cube - 1.);
  for (int i = 0; i < 6; ++i) {
    const f64v q = at_least(mean + at, splat<double>(1e-9 * mean));
    const Saddle<f64v> p = saddle<double, false>(q, at, l, dims);
    const auto left = p.w < f64v{};
    const f64v size = left ? -p.w : p.w;
    const f64v ratio = mills(size) + (left ? -p.correction : p.correction);
    const f64v log_tail =
        natural_log(at_least(ratio, splat<double>(1e-300))) - 0.5 * size * size - 0.91893853320467274178;
    const f64v curvature = root(2. * dims * p.s * p.s + 4. * l * p.s * p.s * p.s);
    const f64v wanted = left ? log_lower : log_upper;
    const f64v step = (log_tail - wanted) * ratio * curvature;
    at = at_least(at + (left ? -step : step), splat<double>(-mean * (1 - 1e-9)));
  }
  return at;
}

// The Poisson mixture sum_k e^(-l/2) (l/2)^k / k! Q(D/2 + k, q/2): every term is positive. For moderate D + lambda.
GAPKERN_CHI2 double mixture_survival(double q, double dims, double lambda) {
  if (q <= 0) return 1;
  const double x = q / 2, half = lambda / 2;
  // Regularised upper incomplete gamma Q(a, x) up from a = 1/2 or 1, by Q(a + 1, x) = Q(a, x) + x^a e^-x / Gamma(a+1).
  const bool odd = std::fmod(dims, 2.0) != 0;
  double a = odd ? 0.5 : 1.0;
  double upper = odd ? std::erfc(std::sqrt(x)) : std::exp(-x);
  double step = odd ? 2 * std::sqrt(x / 3.14159265358979323846) * std::exp(-x) : x * std::exp(-x);
  const auto next = [&] {
    upper += step;
    a += 1;
    step *= x / a;
  };
  while (a < dims / 2) next();
  double weight = std::exp(-half), covered = 0, total = 0;
  for (int k = 0; k < 2000; ++k) {
    total += weight * (upper < 1 ? upper : 1);
    covered += weight;
    if (k > half && 1 - covered < 1e-14) break;
    weight *= half / (k + 1);
    next();
  }
  return total + (covered < 1 ? 1 - covered : 0) * (upper < 1 ? upper : 1);
}

GAPKERN_CHI2 bool small(double dims, double lambda) { return dims < 64 && dims + lambda < 200; }

// A noncentral chi-square's standard deviation.
GAPKERN_CHI2 double deviation(double dims, double lambda) { return std::sqrt(2 * (dims + 2 * lambda)); }

// A sum of log tails over rivals, each ahead of the target by `least` to `most`, is a sum over a grid, once every rival
// is spread over the six points around it by Lagrange's weights: tails are taken at the grid's points only.
// `deviation`: the least of the laws' standard deviations.
struct Grid {
  double first, step;
  int64_t points;

  GAPKERN_CHI2 Grid(double least, double most, double deviation) : step(kGridStep * deviation) {
    first = least - 2 * step;
    points = int64_t((most - least) / step) + 7;
  }
  // Less work than tails for each rival.
  GAPKERN_CHI2 bool pays(int64_t rivals) const { return 3 * points <= 2 * rivals && points <= kGridPoints; }
  GAPKERN_CHI2 double last() const { return first + double(points - 1) * step; }
};

}  // namespace
}  // namespace gapkern::robustness::GAPKERN_LANES

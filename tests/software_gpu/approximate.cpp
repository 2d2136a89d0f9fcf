// The instructions whose last bits the ISA leaves open: the right value, moved at random within the documented error.
#include <cmath>
#include <limits>

#include "lanes.h"

namespace software_gpu {
namespace {

// A number in [-1, 1] for a value: a device rounds the same value the same way every time, the seed says how.
double whim(double value) {
  uint64_t z;
  memcpy(&z, &value, 8);
  z = (z ^ device.rounding_seed * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 29)) * 0x94d049bb133111ebull;
  return int32_t(z >> 32) * (1.0 / 2147483648.0);
}
// The documented error of the approximations, as a share of the result.
double moved(double value, double most) { return value * (1 + most * whim(value)); }
inline bool subnormal(float x) { return x != 0 && std::abs(x) < std::numeric_limits<float>::min(); }
inline float flush(float x) { return subnormal(x) ? std::copysign(0.f, x) : x; }

template <bool ftz>
struct Exp2 {
  static float of(float a) {
    if (ftz) a = flush(a);
    if (a != a) return tidy(a);
    if (a == 0) return 1;
    if (std::isinf(a)) return a > 0 ? a : 0;
    const float r = float(moved(std::exp2(double(a)), 0x1p-22));  // 2 units in the last place
    return ftz ? flush(r) : r;
  }
};
template <bool ftz>
struct Log2 {
  static float of(float a) {
    if (ftz) a = flush(a);
    if (a != a || a < 0) return tidy(std::numeric_limits<float>::quiet_NaN());
    if (a == 0) return -std::numeric_limits<float>::infinity();
    if (std::isinf(a) || a == 1) return a == 1 ? 0 : a;
    const double right = std::log2(double(a));
    const double u = whim(right);
    const bool near_one = a >= 0.5f && a <= 2.f;  // an absolute error there, a relative one elsewhere
    return float(near_one ? right + u * 0x1p-22 : right * (1 + u * 0x1p-22));
  }
};
template <bool ftz>
struct RcpApprox {
  static float of(float a) {
    if (ftz) a = flush(a);
    if (a != a) return tidy(a);
    if (a == 0 || std::isinf(a)) return 1 / a;
    const float r = float(moved(1 / double(a), 0x1p-23));
    return ftz ? flush(r) : r;
  }
};
// Of the upper 32 bits alone, and no others in the result.
struct RcpGross {
  static double of(double a) {
    uint64_t b;
    memcpy(&b, &a, 8);
    b &= 0xffffffff00000000ull;
    memcpy(&a, &b, 8);
    if (a != a) return std::numeric_limits<double>::quiet_NaN();
    if (a == 0 || std::isinf(a)) return 1 / a;
    double r = moved(1 / a, 0x1p-20);
    if (std::abs(a) < std::numeric_limits<double>::min()) return std::copysign(INFINITY, a);
    if (std::abs(r) < std::numeric_limits<double>::min()) r = std::copysign(0., a);
    memcpy(&b, &r, 8);
    b &= 0xffffffff00000000ull;
    memcpy(&r, &b, 8);
    return r;
  }
};
template <bool ftz>
struct SqrtApprox {
  static float of(float a) {
    if (ftz) a = flush(a);
    if (a == 0 || std::isinf(a) || !(a > 0)) return tidy(std::sqrt(a));
    return float(moved(std::sqrt(double(a)), 0x1p-23));
  }
};
template <bool ftz>
struct RsqrtApprox {
  static float of(float a) {
    if (ftz) a = flush(a);
    if (a == 0) return 1 / a;
    if (!(a > 0)) return tidy(std::numeric_limits<float>::quiet_NaN());
    return std::isinf(a) ? 0 : float(moved(1 / std::sqrt(double(a)), 0x1.7p-23));
  }
};

}  // namespace

void approximation_handlers() {
  on("ex2.approx.f32", "ww", unary<float, float, Exp2<false>>);
  on("ex2.approx.ftz.f32", "ww", unary<float, float, Exp2<true>>);
  on("lg2.approx.f32", "ww", unary<float, float, Log2<false>>);
  on("lg2.approx.ftz.f32", "ww", unary<float, float, Log2<true>>);
  on("rcp.approx.f32", "ww", unary<float, float, RcpApprox<false>>);
  on("rcp.approx.ftz.f32", "ww", unary<float, float, RcpApprox<true>>);
  on("rcp.approx.ftz.f64", "dd", unary<double, double, RcpGross>);
  on("sqrt.approx.f32", "ww", unary<float, float, SqrtApprox<false>>);
  on("sqrt.approx.ftz.f32", "ww", unary<float, float, SqrtApprox<true>>);
  on("rsqrt.approx.f32", "ww", unary<float, float, RsqrtApprox<false>>);
  on("rsqrt.approx.ftz.f32", "ww", unary<float, float, RsqrtApprox<true>>);
}

}  // namespace software_gpu

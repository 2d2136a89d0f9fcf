// mov, cvt and cvta: values between registers of other types and widths.
#include <cmath>
#include <limits>

#include "lanes.h"

namespace software_gpu {
namespace {

struct Same {
  template <class T>
  static T of(T a) {
    return a;
  }
};
template <class D>
struct To {
  template <class T>
  static D of(T a) {
    return D(a);
  }
};
struct ToFloat {
  static float of(double a) {
    const float r = float(a);
    uint32_t canonical = 0x7fffffffu;
    float nan;
    memcpy(&nan, &canonical, 4);
    return r != r ? nan : r;
  }
};
// Saturating, towards zero; a NaN as the ISA says for each pair of types.
template <class D>
struct Truncate {
  template <class T>
  static D of(T a) {
    using L = std::numeric_limits<D>;
    if (a != a) return sizeof(T) == 8 || sizeof(D) == 8 ? D(std::make_unsigned_t<D>(1) << (sizeof(D) * 8 - 1)) : D(0);
    const T t = std::trunc(a);
    if (t < T(L::min())) return L::min();
    if (t >= std::ldexp(T(1), L::digits)) return L::max();
    return D(t);
  }
};
template <double (*round)(double)>
struct Round {
  static double of(double a) { return round(a); }
};

uint32_t to_bfloat16(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  if (x != x) return 0x7fff;
  return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
uint32_t to_float16(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  const uint32_t sign = (b >> 16) & 0x8000;
  if (x != x) return 0x7fff;
  const double a = std::abs(double(x));
  if (a == 0) return sign;
  if (a >= 65520) return sign | 0x7c00;
  int e;
  std::frexp(a, &e);
  const int lowest = std::max(e - 11, -24);  // the unit in the last place
  const double units = std::nearbyint(std::ldexp(a, -lowest));
  if (lowest == -24) return sign | uint32_t(units);  // up to 1024: a subnormal, or the least normal number
  return sign | uint32_t((lowest + 25) * 1024 + (units - 1024));
}
template <uint32_t (*half)(float)>
Step pack(Warp& w, Inst& in, uint32_t m) {
  uint32_t out[kLanes];
  const float *a = w.r<float>(in.a), *b = w.r<float>(in.b);
  for (int i = 0; i < kLanes; ++i) out[i] = half(a[i]) << 16 | half(b[i]);
  put(w.r<uint32_t>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a] & w.defined[in.b]);
  return Step::done;
}
template <uint32_t (*half)(float)>
struct Narrow {
  static uint16_t of(float a) { return uint16_t(half(a)); }
};

// {lower, upper} = whole, and back; T is a half's type, W the whole's.
template <class W, class T>
Step split(Warp& w, Inst& in, uint32_t m) {
  T low[kLanes], high[kLanes];
  const W* a = w.r<W>(in.a);
  for (int i = 0; i < kLanes; ++i) low[i] = T(a[i]), high[i] = T(a[i] >> (sizeof(T) * 8));
  const uint32_t known = w.defined[in.a];
  put(w.r<T>(in.d), low, m);
  w.define(in.d, m, known);
  put(w.r<T>(in.p), high, m);
  w.define(in.p, m, known);
  return Step::done;
}
template <class W, class T>
Step unite(Warp& w, Inst& in, uint32_t m) {
  W out[kLanes];
  const T *a = w.r<T>(in.a), *b = w.r<T>(in.b);
  for (int i = 0; i < kLanes; ++i) out[i] = W(W(a[i]) | W(b[i]) << (sizeof(T) * 8));
  put(w.r<W>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a] & w.defined[in.b]);
  return Step::done;
}

void move(const std::string& form, char width, Handler whole, Handler apart, Handler together, char half) {
  instructions()[form] = [=](Decoder& d, const Statement& s, Inst& in) {
    d.expect(s, 2);
    const Operand &to = s.operands[0], &from = s.operands[1];
    if (to.kind == Operand::vector) {
      if (to.parts.size() != 2 || !half) d.refuse(s, "a vector of other than two halves");
      in.a = d.source(from, width);
      in.d = d.target(to.parts[0], half);
      in.p = d.target(to.parts[1], half);
      in.run = apart;
    } else if (from.kind == Operand::vector) {
      if (from.parts.size() != 2 || !half) d.refuse(s, "a vector of other than two halves");
      in.a = d.source(from.parts[0], half);
      in.b = d.source(from.parts[1], half);
      in.d = d.target(to, width);
      in.run = together;
    } else {
      in.a = d.source(from, width);
      in.d = d.target(to, width);
      in.run = whole;
    }
  };
}

}  // namespace

void conversion_handlers() {
  for (const char* t : {"mov.b32", "mov.u32", "mov.s32", "mov.f32"})
    move(t, 'w', unary<uint32_t, uint32_t, Same>, split<uint32_t, uint16_t>, unite<uint32_t, uint16_t>, 'h');
  for (const char* t : {"mov.b64", "mov.u64", "mov.s64", "mov.f64"})
    move(t, 'd', unary<uint64_t, uint64_t, Same>, split<uint64_t, uint32_t>, unite<uint64_t, uint32_t>, 'w');
  for (const char* t : {"mov.b16", "mov.u16", "mov.s16"})
    move(t, 'h', unary<uint16_t, uint16_t, Same>, nullptr, nullptr, 0);
  for (const char* t : {"cvta.to.global.u64", "cvta.global.u64", "cvta.param.u64"})
    on(t, "dd", unary<uint64_t, uint64_t, Same>);

  on("cvt.u16.u32", "hw", unary<uint16_t, uint32_t, To<uint16_t>>);
  on("cvt.s16.s32", "hw", unary<uint16_t, uint32_t, To<uint16_t>>);
  on("cvt.u32.u16", "wh", unary<uint32_t, uint16_t, To<uint32_t>>);
  on("cvt.s32.s16", "wh", unary<int32_t, int16_t, To<int32_t>>);
  on("cvt.u64.u16", "dh", unary<uint64_t, uint16_t, To<uint64_t>>);
  on("cvt.u32.u64", "wd", unary<uint32_t, uint64_t, To<uint32_t>>);
  on("cvt.u64.u32", "dw", unary<uint64_t, uint32_t, To<uint64_t>>);
  on("cvt.s64.s32", "dw", unary<int64_t, int32_t, To<int64_t>>);
  on("cvt.f64.f32", "dw", unary<double, float, To<double>>);
  on("cvt.rn.f32.f64", "wd", unary<float, double, ToFloat>);
  on("cvt.rn.f32.s32", "ww", unary<float, int32_t, To<float>>);
  on("cvt.rn.f32.u32", "ww", unary<float, uint32_t, To<float>>);
  on("cvt.rn.f32.s64", "wd", unary<float, int64_t, To<float>>);
  on("cvt.rn.f32.u64", "wd", unary<float, uint64_t, To<float>>);
  on("cvt.rn.f64.s32", "dw", unary<double, int32_t, To<double>>);
  on("cvt.rn.f64.u32", "dw", unary<double, uint32_t, To<double>>);
  on("cvt.rn.f64.s64", "dd", unary<double, int64_t, To<double>>);
  on("cvt.rn.f64.u64", "dd", unary<double, uint64_t, To<double>>);
  on("cvt.rzi.s32.f32", "ww", unary<int32_t, float, Truncate<int32_t>>);
  on("cvt.rzi.u32.f32", "ww", unary<uint32_t, float, Truncate<uint32_t>>);
  on("cvt.rzi.s64.f32", "dw", unary<int64_t, float, Truncate<int64_t>>);
  on("cvt.rzi.s32.f64", "wd", unary<int32_t, double, Truncate<int32_t>>);
  on("cvt.rzi.u32.f64", "wd", unary<uint32_t, double, Truncate<uint32_t>>);
  on("cvt.rzi.s64.f64", "dd", unary<int64_t, double, Truncate<int64_t>>);
  on("cvt.rzi.u64.f64", "dd", unary<uint64_t, double, Truncate<uint64_t>>);
  on("cvt.rpi.f64.f64", "dd", unary<double, double, Round<std::ceil>>);
  on("cvt.rmi.f64.f64", "dd", unary<double, double, Round<std::floor>>);
  on("cvt.rzi.f64.f64", "dd", unary<double, double, Round<std::trunc>>);
  on("cvt.rni.f64.f64", "dd", unary<double, double, Round<std::nearbyint>>);
  on("cvt.rn.bf16.f32", "hw", unary<uint16_t, float, Narrow<to_bfloat16>>);
  on("cvt.rn.f16.f32", "hw", unary<uint16_t, float, Narrow<to_float16>>);
  on("cvt.rn.bf16x2.f32", "www", pack<to_bfloat16>);
  on("cvt.rn.f16x2.f32", "www", pack<to_float16>);
}

}  // namespace software_gpu

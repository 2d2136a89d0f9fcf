// Arithmetic as the PTX ISA states it, bit for bit.
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "lanes.h"

namespace software_gpu {
namespace {

struct Add {
  template <class T>
  static T of(T a, T b) {
    return tidy(T(a + b));
  }
};
struct Sub {
  template <class T>
  static T of(T a, T b) {
    return tidy(T(a - b));
  }
};
struct Mul {
  template <class T>
  static T of(T a, T b) {
    return tidy(T(a * b));
  }
};
struct Div {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return T(~T(0));
      if (std::is_signed_v<T> && b == T(-1)) return T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a));
      return T(a / b);
    } else {
      return tidy(a / b);
    }
  }
};
struct Rem {
  template <class T>
  static T of(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Fma {
  template <class T>
  static T of(T a, T b, T c) {
    return tidy(std::fma(a, b, c));
  }
};
struct AddToZero {
  static float of(float a, float b) {
    const double sum = double(a) + b, got = sum - a, rest = (a - (sum - got)) + (b - got);
    float r = float(sum);
    if (!std::isfinite(sum)) return tidy(r);
    if (std::isinf(r)) return std::copysign(std::numeric_limits<float>::max(), r);
    // r rounds the sum to nearest: one step back where its magnitude is beyond the exact sum's.
    const double over = (double(r) - sum) - rest;
    if (r > 0 && over > 0) r = std::nextafter(r, 0.f);
    if (r < 0 && over < 0) r = std::nextafter(r, 0.f);
    return r;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return tidy(b);
      if (b != b) return a;
      if (a == b) return std::signbit(a) ? a : b;
    }
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return tidy(b);
      if (b != b) return a;
      if (a == b) return std::signbit(a) ? b : a;
    }
    return a > b ? a : b;
  }
};
struct Abs {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_integral_v<T>) return a < 0 ? T(-a) : a;
    return std::abs(a);
  }
};
struct Neg {
  template <class T>
  static T of(T a) {
    return T(-a);
  }
};
struct Sqrt {
  template <class T>
  static T of(T a) {
    return tidy(std::sqrt(a));
  }
};
struct Reciprocal {
  template <class T>
  static T of(T a) {
    return tidy(T(1) / a);
  }
};
struct CopySign {
  template <class T>
  static T of(T sign, T value) {
    return std::copysign(value, sign);
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return T(~a);
  }
};
struct Shl {
  template <class T>
  static T of(T a, uint32_t n) {
    return n >= sizeof(T) * 8 ? T(0) : T(a << n);
  }
};
struct Shr {
  template <class T>
  static T of(T a, uint32_t n) {
    const uint32_t most = sizeof(T) * 8;
    if (std::is_signed_v<T>) return T(a >> (n >= most ? most - 1 : n));
    return n >= most ? T(0) : T(a >> n);
  }
};
struct MulHigh {
  template <class T>
  static T of(T a, T b) {
    if constexpr (sizeof(T) == 8) {
      using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      return T((W(a) * W(b)) >> 64);
    } else {
      using W = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      return T((W(a) * W(b)) >> 32);
    }
  }
};
template <class W>
struct MulWide {
  template <class T>
  static W of(T a, T b) {
    return W(a) * W(b);
  }
};
struct MadLow {
  template <class T>
  static T of(T a, T b, T c) {
    return T(a * b + c);
  }
};
template <class W>
struct MadWide {
  template <class T>
  static W of(T a, T b, W c) {
    return W(a) * W(b) + c;
  }
};
struct PopCount {
  static uint32_t of(uint32_t a) { return uint32_t(__builtin_popcount(a)); }
  static uint32_t of(uint64_t a) { return uint32_t(__builtin_popcountll(a)); }
};
struct Clz {
  static uint32_t of(uint32_t a) { return a ? uint32_t(__builtin_clz(a)) : 32; }
  static uint32_t of(uint64_t a) { return a ? uint32_t(__builtin_clzll(a)) : 64; }
};
struct Reverse {
  static uint32_t of(uint32_t a) {
    uint32_t r = 0;
    for (int i = 0; i < 32; ++i) r |= ((a >> i) & 1) << (31 - i);
    return r;
  }
};
struct Permute {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pick = c >> (4 * i);
      uint32_t byte = uint32_t(both >> (8 * (pick & 7))) & 255;
      if (pick & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * i);
    }
    return r;
  }
};

template <class T>
Step insert_field(Warp& w, Inst& in, uint32_t m) {
  T out[kLanes];
  const T *a = w.r<T>(in.a), *b = w.r<T>(in.b);
  const uint32_t *c = w.r<uint32_t>(in.c), *d = w.r<uint32_t>(in.p);
  const uint32_t most = sizeof(T) * 8;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t pos = c[i] & 255, len = d[i] & 255;
    out[i] = b[i];
    for (uint32_t k = 0; k < len && pos + k < most; ++k) {
      const T bit = T(1) << (pos + k);
      out[i] = T((out[i] & ~bit) | (((a[i] >> k) & 1) ? bit : 0));
    }
  }
  put(w.r<T>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a] & w.defined[in.b] & w.defined[in.c] & w.defined[in.p]);
  return Step::done;
}

template <class T, class F>
void each(const char* name, const char* type, char width) {
  const char shape[] = {width, width, width, 0};
  static std::deque<std::string> kept;
  kept.emplace_back(shape);
  on(std::string(name) + type, kept.back().c_str(), binary<T, T, T, F>);
}
template <class T>
void integers(const char* type, char width) {
  each<T, Add>("add", type, width);
  each<T, Sub>("sub", type, width);
  each<T, Min>("min", type, width);
  each<T, Max>("max", type, width);
  each<T, Div>("div", type, width);
  each<T, Rem>("rem", type, width);
  each<T, Mul>("mul.lo", type, width);
}
template <class T>
void floats(const char* type, char width) {
  for (const char* rounding : {"", ".rn"}) {
    each<T, Add>((std::string("add") + rounding).c_str(), type, width);
    each<T, Sub>((std::string("sub") + rounding).c_str(), type, width);
    each<T, Mul>((std::string("mul") + rounding).c_str(), type, width);
  }
  each<T, Div>("div.rn", type, width);
  each<T, Min>("min", type, width);
  each<T, Max>("max", type, width);
  each<T, CopySign>("copysign", type, width);
}
template <class T>
void logic(const std::string& type, const char* two, const char* one) {
  on("and" + type, two, binary<T, T, T, And>);
  on("or" + type, two, binary<T, T, T, Or>);
  on("xor" + type, two, binary<T, T, T, Xor>);
  on("not" + type, one, unary<T, T, Not>);
}

}  // namespace

void scalar_handlers() {
  integers<int16_t>(".s16", 'h');
  integers<uint16_t>(".u16", 'h');
  integers<int32_t>(".s32", 'w');
  integers<uint32_t>(".u32", 'w');
  integers<int64_t>(".s64", 'd');
  integers<uint64_t>(".u64", 'd');
  floats<float>(".f32", 'w');
  floats<double>(".f64", 'd');
  on("add.rz.f32", "www", binary<float, float, float, AddToZero>);
  on("fma.rn.f32", "wwww", ternary<float, float, float, Fma>);
  on("fma.rn.f64", "dddd", ternary<double, double, double, Fma>);
  on("mad.lo.s32", "wwww", ternary<uint32_t, uint32_t, uint32_t, MadLow>);
  on("mad.lo.u32", "wwww", ternary<uint32_t, uint32_t, uint32_t, MadLow>);
  on("mad.lo.s64", "dddd", ternary<uint64_t, uint64_t, uint64_t, MadLow>);
  on("mad.wide.s32", "dwwd", ternary<int64_t, int32_t, int64_t, MadWide<int64_t>>);
  on("mad.wide.u32", "dwwd", ternary<uint64_t, uint32_t, uint64_t, MadWide<uint64_t>>);
  on("mul.wide.s32", "dww", binary<int64_t, int32_t, int32_t, MulWide<int64_t>>);
  on("mul.wide.u32", "dww", binary<uint64_t, uint32_t, uint32_t, MulWide<uint64_t>>);
  on("mul.wide.s16", "whh", binary<int32_t, int16_t, int16_t, MulWide<int32_t>>);
  on("mul.wide.u16", "whh", binary<uint32_t, uint16_t, uint16_t, MulWide<uint32_t>>);
  on("mul.hi.s32", "www", binary<int32_t, int32_t, int32_t, MulHigh>);
  on("mul.hi.u32", "www", binary<uint32_t, uint32_t, uint32_t, MulHigh>);
  on("mul.hi.s64", "ddd", binary<int64_t, int64_t, int64_t, MulHigh>);
  on("mul.hi.u64", "ddd", binary<uint64_t, uint64_t, uint64_t, MulHigh>);
  on("abs.f32", "ww", unary<float, float, Abs>);
  on("abs.f64", "dd", unary<double, double, Abs>);
  on("abs.s32", "ww", unary<int32_t, int32_t, Abs>);
  on("neg.f32", "ww", unary<float, float, Neg>);
  on("neg.f64", "dd", unary<double, double, Neg>);
  on("neg.s32", "ww", unary<uint32_t, uint32_t, Neg>);
  on("neg.s64", "dd", unary<uint64_t, uint64_t, Neg>);
  on("sqrt.rn.f32", "ww", unary<float, float, Sqrt>);
  on("sqrt.rn.f64", "dd", unary<double, double, Sqrt>);
  on("rcp.rn.f32", "ww", unary<float, float, Reciprocal>);
  on("rcp.rn.f64", "dd", unary<double, double, Reciprocal>);
  logic<uint16_t>(".b16", "hhh", "hh");
  logic<uint32_t>(".b32", "www", "ww");
  logic<uint64_t>(".b64", "ddd", "dd");
  on("shl.b16", "hhw", binary<uint16_t, uint16_t, uint32_t, Shl>);
  on("shl.b32", "www", binary<uint32_t, uint32_t, uint32_t, Shl>);
  on("shl.b64", "ddw", binary<uint64_t, uint64_t, uint32_t, Shl>);
  on("shr.u16", "hhw", binary<uint16_t, uint16_t, uint32_t, Shr>);
  on("shr.s16", "hhw", binary<int16_t, int16_t, uint32_t, Shr>);
  for (const char* t : {"shr.u32", "shr.b32"}) on(t, "www", binary<uint32_t, uint32_t, uint32_t, Shr>);
  on("shr.s32", "www", binary<int32_t, int32_t, uint32_t, Shr>);
  for (const char* t : {"shr.u64", "shr.b64"}) on(t, "ddw", binary<uint64_t, uint64_t, uint32_t, Shr>);
  on("shr.s64", "ddw", binary<int64_t, int64_t, uint32_t, Shr>);
  on("popc.b32", "ww", unary<uint32_t, uint32_t, PopCount>);
  on("popc.b64", "wd", unary<uint32_t, uint64_t, PopCount>);
  on("clz.b32", "ww", unary<uint32_t, uint32_t, Clz>);
  on("clz.b64", "wd", unary<uint32_t, uint64_t, Clz>);
  on("brev.b32", "ww", unary<uint32_t, uint32_t, Reverse>);
  on("prmt.b32", "wwww", ternary<uint32_t, uint32_t, uint32_t, Permute>);
  const auto field = [](const char* form, char width, Handler handler) {
    instructions()[form] = [width, handler](Decoder& d, const Statement& s, Inst& in) {
      d.expect(s, 5);
      in.a = d.source(s.operands[1], width);
      in.b = d.source(s.operands[2], width);
      in.c = d.source(s.operands[3], 'w');
      in.p = d.source(s.operands[4], 'w');
      in.d = d.target(s.operands[0], width);
      in.run = handler;
    };
  };
  field("bfi.b32", 'w', insert_field<uint32_t>);
  field("bfi.b64", 'd', insert_field<uint64_t>);
}

}  // namespace software_gpu

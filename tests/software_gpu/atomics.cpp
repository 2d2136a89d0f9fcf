// atom and red on global and shared memory, and the additions of bulk reductions. Without an order: they are relaxed.
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace software_gpu {
namespace {

enum class Op { add, least, most, conjoin, disjoin, differ, exchange, compare };

template <class T>
T flushed(T x) {
  return x;
}
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

template <class T, Op op, bool flush>
T applied(T old, T x, T y) {
  if constexpr (op == Op::add) return flush ? flushed(T(flushed(old) + flushed(x))) : T(old + x);
  if constexpr (op == Op::least) return std::min(old, x);
  if constexpr (op == Op::most) return std::max(old, x);
  if constexpr (op == Op::exchange) return x;
  if constexpr (op == Op::compare) return old == x ? y : old;
  if constexpr (std::is_integral_v<T>) {
    if constexpr (op == Op::conjoin) return old & x;
    if constexpr (op == Op::disjoin) return old | x;
    if constexpr (op == Op::differ) return old ^ x;
  }
  return old;
}

// in.v: the operands, in.c of them (a vector's elements; two for cas); in.d: where the old value goes, or -1.
template <class T, Op op, bool shared>
Step atomic(Warp& w, Inst& in, uint32_t m) {
  const uint32_t unknown = m & ~w.defined[in.a];
  if (unknown) fault("uninitialised", "the address in lane %d was never defined", __builtin_ctz(unknown));
  const uint32_t elements = op == Op::compare ? 1 : uint32_t(in.c), bytes = elements * uint32_t(sizeof(T));
  T old[kLanes] = {};
  for (int k = 0; k < kLanes; ++k) {  // the lanes' order is as free as that of warps
    const int lane = device.last_group_first ? kLanes - 1 - k : k;
    if (!(m >> lane & 1)) continue;
    const uint64_t address = (in.b ? w.r<uint64_t>(in.a)[lane] : w.r<uint32_t>(in.a)[lane]) + uint64_t(in.imm);
    bool known = true;
    for (int i = 0; i < in.c; ++i) known &= (w.defined[in.v[size_t(i)]] >> lane & 1) != 0;
    Access by = by_lane(w, lane);
    by.atomic = true;
    uint8_t* place;
    if constexpr (shared) {
      const SharedPlace at = shared_place(w, uint32_t(address), bytes, bytes, false);
      if (!known) fault("uninitialised", "an atomic's operand was never defined in lane %d", lane);
      touch_shared(*at.cta, at.offset, bytes, true, by);
      place = &at.cta->shared[at.offset];
    } else {
      if (address % bytes)
        fault("misaligned", "global memory: 0x%llx for an atomic of %u bytes, lane %d",
              static_cast<unsigned long long>(address), bytes, lane);
      touch_global(address, bytes, true, by, false, known);
      place = global_bytes(address, bytes);
    }
    for (uint32_t i = 0; i < elements; ++i) {
      T was, x = w.r<T>(in.v[i])[lane], y = op == Op::compare ? w.r<T>(in.v[1])[lane] : T{};
      memcpy(&was, place + i * sizeof(T), sizeof was);
      if (i == 0) old[lane] = was;
      const T now = applied<T, op, !shared>(was, x, y);
      memcpy(place + i * sizeof(T), &now, sizeof now);
    }
  }
  if (in.d >= 0) {
    put(w.r<T>(in.d), old, m);
    w.define(in.d, m, kAll);
  }
  return Step::done;
}

template <class T, Op op, bool shared>
void form(const std::string& space, const std::string& suffix, int elements = 1) {
  for (const bool result : {false, true})
    for (const char* order : {"", ".relaxed.gpu", ".relaxed.cta", ".relaxed.sys"}) {
      if (result && elements > 1) continue;
      const std::string name = std::string(result ? "atom" : "red") + order + space + suffix;
      if (!result && (op == Op::exchange || op == Op::compare)) continue;
      instructions()[name] = [=](Decoder& d, const Statement& s, Inst& in) {
        constexpr char width = sizeof(T) == 8 ? 'd' : 'w';
        d.expect(s, (result ? 2u : 1u) + (op == Op::compare ? 2u : 1u));
        const Operand& address = s.operands[result];
        if (address.kind != Operand::address || address.parts.size() != 1) d.refuse(s, "expected an address");
        const char wide = d.width_of(address.parts[0]) ? d.width_of(address.parts[0]) : shared ? 'w' : 'd';
        if (wide == 'w' && !shared) d.refuse(s, "an address of 32 bits");
        in.a = d.source(address.parts[0], wide);
        in.b = wide == 'd';
        in.imm = address.offset;
        std::vector<Operand> values(s.operands.begin() + result + 1, s.operands.end());
        if (values[0].kind == Operand::vector) values = std::vector<Operand>(values[0].parts);
        in.c = op == Op::compare ? 2 : elements;
        if (int(values.size()) != in.c) d.refuse(s, "a vector of the wrong length");
        for (size_t i = 0; i < values.size(); ++i) in.v[i] = d.source(values[i], width);
        if (result && s.operands[0].kind != Operand::discard) in.d = d.target(s.operands[0], width);
        in.run = atomic<T, op, shared>;
      };
    }
}

template <bool shared>
void forms(const std::string& space) {
  form<uint32_t, Op::add, shared>(space, ".add.u32");
  form<int32_t, Op::add, shared>(space, ".add.s32");
  form<uint64_t, Op::add, shared>(space, ".add.u64");
  form<float, Op::add, shared>(space, ".add.f32");
  form<double, Op::add, shared>(space, ".add.f64");
  form<uint32_t, Op::least, shared>(space, ".min.u32");
  form<int32_t, Op::least, shared>(space, ".min.s32");
  form<uint32_t, Op::most, shared>(space, ".max.u32");
  form<int32_t, Op::most, shared>(space, ".max.s32");
  form<uint64_t, Op::least, shared>(space, ".min.u64");
  form<uint64_t, Op::most, shared>(space, ".max.u64");
  form<uint32_t, Op::conjoin, shared>(space, ".and.b32");
  form<uint32_t, Op::disjoin, shared>(space, ".or.b32");
  form<uint32_t, Op::differ, shared>(space, ".xor.b32");
  form<uint32_t, Op::exchange, shared>(space, ".exch.b32");
  form<uint64_t, Op::exchange, shared>(space, ".exch.b64");
  form<uint32_t, Op::compare, shared>(space, ".cas.b32");
  form<uint64_t, Op::compare, shared>(space, ".cas.b64");
}

template <class T>
void add_one(uint8_t* to, const uint8_t* from) {
  T a, b;
  memcpy(&a, to, sizeof a);
  memcpy(&b, from, sizeof b);
  a = T(a + b);
  memcpy(to, &a, sizeof a);
}

float of_half(uint16_t h, bool bfloat) {
  if (bfloat) {
    const uint32_t bits = uint32_t(h) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  _Float16 x;
  memcpy(&x, &h, 2);
  return float(x);
}
uint16_t to_half(float x, bool bfloat) {
  uint16_t h;
  if (!bfloat) {
    const _Float16 y = _Float16(x);
    memcpy(&h, &y, 2);
    return h;
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void add_elements(uint8_t* to, const uint8_t* from, uint32_t bytes, int type) {
  constexpr uint32_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  if (type < 2 || type > 9) fault("bad tensor map", "elements of the type %d are not added", type);
  for (uint32_t i = 0; i < bytes; i += sizes[type]) {
    uint8_t* a = to + i;
    const uint8_t* b = from + i;
    if (type == 2 || type == 3) add_one<uint32_t>(a, b);
    if (type == 4 || type == 5) add_one<uint64_t>(a, b);
    if (type == 7) add_one<float>(a, b);
    if (type == 8) add_one<double>(a, b);
    if (type == 6 || type == 9) {
      uint16_t x, y;
      memcpy(&x, a, 2);
      memcpy(&y, b, 2);
      x = to_half(of_half(x, type == 9) + of_half(y, type == 9), type == 9);
      memcpy(a, &x, 2);
    }
  }
}

void atomic_handlers() {
  forms<false>(".global");
  forms<true>(".shared");
  forms<true>(".shared::cta");
  form<float, Op::add, false>(".global", ".add.v2.f32", 2);
  form<float, Op::add, false>(".global", ".add.v4.f32", 4);
}

}  // namespace software_gpu

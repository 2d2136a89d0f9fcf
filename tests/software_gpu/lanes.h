// One operation over the lanes of a warp, whole vectors at a time.
#pragma once
#include <type_traits>

#include "decode.h"

namespace software_gpu {

inline float tidy(float x) {  // a NaN that arithmetic makes is the canonical one
  uint32_t canonical = 0x7fffffffu;
  float nan;
  memcpy(&nan, &canonical, 4);
  return x != x ? nan : x;
}
inline double tidy(double x) { return x; }
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> tidy(T x) {
  return x;
}

template <class T, class V>
inline void put(T* to, const V (&from)[kLanes], uint32_t mask) {
  if (mask == kAll) {
    for (int i = 0; i < kLanes; ++i) to[i] = T(from[i]);
  } else {
    for (int i = 0; i < kLanes; ++i) to[i] = (mask >> i) & 1 ? T(from[i]) : to[i];
  }
}

// D is the destination's element, A, B, C the sources'; F::of makes one of the others. Lanes that are off are computed
// and dropped.
template <class D, class A, class F>
Step unary(Warp& w, Inst& in, uint32_t m) {
  D out[kLanes];
  const A* a = w.r<A>(in.a);
  for (int i = 0; i < kLanes; ++i) out[i] = F::of(a[i]);
  put(w.r<D>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a]);
  return Step::done;
}
template <class D, class A, class B, class F>
Step binary(Warp& w, Inst& in, uint32_t m) {
  D out[kLanes];
  const A* a = w.r<A>(in.a);
  const B* b = w.r<B>(in.b);
  for (int i = 0; i < kLanes; ++i) out[i] = F::of(a[i], b[i]);
  put(w.r<D>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a] & w.defined[in.b]);
  return Step::done;
}
template <class D, class A, class C, class F>
Step ternary(Warp& w, Inst& in, uint32_t m) {
  D out[kLanes];
  const A *a = w.r<A>(in.a), *b = w.r<A>(in.b);
  const C* c = w.r<C>(in.c);
  for (int i = 0; i < kLanes; ++i) out[i] = F::of(a[i], b[i], c[i]);
  put(w.r<D>(in.d), out, m);
  w.define(in.d, m, w.defined[in.a] & w.defined[in.b] & w.defined[in.c]);
  return Step::done;
}

}  // namespace software_gpu

// Comparisons, choices and the logic of predicates.
#include "lanes.h"

namespace software_gpu {
namespace {

struct Eq {
  template <class T>
  static bool of(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool of(T a, T b) {
    return a == a && b == b && a != b;
  }
};
struct Lt {
  template <class T>
  static bool of(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool of(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool of(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool of(T a, T b) {
    return a >= b;
  }
};
template <class F>
struct OrUnordered {
  template <class T>
  static bool of(T a, T b) {
    return a != a || b != b || F::of(a, b);
  }
};
struct BothNumbers {
  template <class T>
  static bool of(T a, T b) {
    return a == a && b == b;
  }
};
struct AnyNan {
  template <class T>
  static bool of(T a, T b) {
    return a != a || b != b;
  }
};

inline void put_predicate(Warp& w, int p, uint32_t value, uint32_t m, uint32_t known) {
  w.pred[p] = (w.pred[p] & ~m) | (value & m);
  w.pred_defined[p] = (w.pred_defined[p] & ~m) | (known & m);
}

template <class T, class F>
Step compare(Warp& w, Inst& in, uint32_t m) {
  const T *a = w.r<T>(in.a), *b = w.r<T>(in.b);
  uint32_t out = 0;
  for (int i = 0; i < kLanes; ++i) out |= uint32_t(F::of(a[i], b[i])) << i;
  put_predicate(w, in.d, out, m, w.defined[in.a] & w.defined[in.b]);
  return Step::done;
}
template <class T>
Step choose(Warp& w, Inst& in, uint32_t m) {
  T out[kLanes];
  const T *a = w.r<T>(in.a), *b = w.r<T>(in.b);
  const uint32_t p = w.pred[in.c];
  for (int i = 0; i < kLanes; ++i) out[i] = (p >> i) & 1 ? a[i] : b[i];
  put(w.r<T>(in.d), out, m);
  w.define(in.d, m, ((w.defined[in.a] & p) | (w.defined[in.b] & ~p)) & w.pred_defined[in.c]);
  return Step::done;
}
struct And {
  static uint32_t of(uint32_t a, uint32_t b) { return a & b; }
};
struct Or {
  static uint32_t of(uint32_t a, uint32_t b) { return a | b; }
};
struct Xor {
  static uint32_t of(uint32_t a, uint32_t b) { return a ^ b; }
};
template <class F>
Step of_predicates(Warp& w, Inst& in, uint32_t m) {
  const uint32_t a = w.pred[in.a], b = w.pred[in.b];
  uint32_t known = w.pred_defined[in.a] & w.pred_defined[in.b];
  if (std::is_same_v<F, And>) known |= (w.pred_defined[in.a] & ~a) | (w.pred_defined[in.b] & ~b);
  if (std::is_same_v<F, Or>) known |= (w.pred_defined[in.a] & a) | (w.pred_defined[in.b] & b);
  put_predicate(w, in.d, F::of(a, b), m, known);
  return Step::done;
}
Step not_predicate(Warp& w, Inst& in, uint32_t m) {
  put_predicate(w, in.d, ~w.pred[in.a], m, w.pred_defined[in.a]);
  return Step::done;
}
Step move_predicate(Warp& w, Inst& in, uint32_t m) {
  put_predicate(w, in.d, w.pred[in.a], m, w.pred_defined[in.a]);
  return Step::done;
}

template <class T>
void comparisons(const std::string& type, const char* shape) {
  on("setp.eq" + type, shape, compare<T, Eq>);
  on("setp.ne" + type, shape, compare<T, Ne>);
  on("setp.lt" + type, shape, compare<T, Lt>);
  on("setp.le" + type, shape, compare<T, Le>);
  on("setp.gt" + type, shape, compare<T, Gt>);
  on("setp.ge" + type, shape, compare<T, Ge>);
  if constexpr (std::is_floating_point_v<T>) {
    on("setp.equ" + type, shape, compare<T, OrUnordered<Eq>>);
    on("setp.neu" + type, shape, compare<T, OrUnordered<Ne>>);
    on("setp.ltu" + type, shape, compare<T, OrUnordered<Lt>>);
    on("setp.leu" + type, shape, compare<T, OrUnordered<Le>>);
    on("setp.gtu" + type, shape, compare<T, OrUnordered<Gt>>);
    on("setp.geu" + type, shape, compare<T, OrUnordered<Ge>>);
    on("setp.num" + type, shape, compare<T, BothNumbers>);
    on("setp.nan" + type, shape, compare<T, AnyNan>);
  }
}

}  // namespace

void comparison_handlers() {
  comparisons<int16_t>(".s16", "phh");
  comparisons<uint16_t>(".u16", "phh");
  comparisons<uint16_t>(".b16", "phh");
  comparisons<int32_t>(".s32", "pww");
  comparisons<uint32_t>(".u32", "pww");
  comparisons<uint32_t>(".b32", "pww");
  comparisons<int64_t>(".s64", "pdd");
  comparisons<uint64_t>(".u64", "pdd");
  comparisons<uint64_t>(".b64", "pdd");
  comparisons<float>(".f32", "pww");
  comparisons<double>(".f64", "pdd");
  for (const char* t : {".b32", ".f32", ".u32", ".s32"}) on(std::string("selp") + t, "wwwp", choose<uint32_t>);
  for (const char* t : {".b64", ".f64", ".u64", ".s64"}) on(std::string("selp") + t, "dddp", choose<uint64_t>);
  for (const char* t : {".b16", ".u16", ".s16"}) on(std::string("selp") + t, "hhhp", choose<uint16_t>);
  on("and.pred", "ppp", of_predicates<And>);
  on("or.pred", "ppp", of_predicates<Or>);
  on("xor.pred", "ppp", of_predicates<Xor>);
  on("not.pred", "pp", not_predicate);
  on("mov.pred", "pp", move_predicate);
}

}  // namespace software_gpu

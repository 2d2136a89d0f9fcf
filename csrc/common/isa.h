// The instruction sets the CPU kernels are compiled for, and the one this process uses.
#pragma once
#include <cstdlib>
#include <cstring>

namespace gapkern {

enum class Isa : int { portable, avx2, avx512, avx512bf16 };

inline const char* isa_name(Isa isa) {
  static const char* names[] = {"portable", "avx2", "avx512", "avx512bf16"};
  return names[static_cast<int>(isa)];
}

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

// GAPKERN_ISA lowers the choice (it never raises it above what the processor has): every path can be tested on
// one machine. Read once per process.
inline Isa active_isa() {
  static const Isa chosen = [] {
    const Isa best = best_isa();
    const char* wish = std::getenv("GAPKERN_ISA");
    if (wish == nullptr) return best;
    for (int i = 0; i <= static_cast<int>(best); ++i)
      if (std::strcmp(wish, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
    return best;
  }();
  return chosen;
}

}  // namespace gapkern

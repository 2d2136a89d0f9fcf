// The instruction sets the CPU kernels are compiled for, and the one this process uses.
#pragma once
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace gapkern {

// From the least to the best.
#if defined(__aarch64__)
enum class Isa : int { neon, neonbf16 };
inline constexpr const char* kIsaNames[] = {"neon", "neonbf16"};
#elif defined(__x86_64__)
enum class Isa : int { portable, avx2, avx512, avx512bf16 };
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16"};
#else
enum class Isa : int { portable };
inline constexpr const char* kIsaNames[] = {"portable"};
#endif

inline const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

inline Isa best_isa() {
#if defined(__aarch64__)
#if defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, of Linux's user interface
  return (getauxval(AT_HWCAP2) & bf16) != 0 ? Isa::neonbf16 : Isa::neon;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  const bool known = sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0;
  return known && found != 0 ? Isa::neonbf16 : Isa::neon;
#else
  return Isa::neon;
#endif
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
  return Isa::portable;
#else
  return Isa::portable;
#endif
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

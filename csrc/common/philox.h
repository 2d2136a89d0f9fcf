// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) and what is drawn from it, for the CPU and for CUDA.
//
// Element (row, column) of a matrix takes word column % 4 of the block with
//   counter = (column / 4, row mod 2^32, row / 2^32, trial),  key = seed,
// so a value depends on its place alone: not on chunking, threads, device or the matrix's other dimensions.
// Everything is integer arithmetic and single IEEE operations. Compiled without contraction (-ffp-contract=off,
// -fmad=false) the results are the same bits everywhere.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace gapkern::philox {

GAPKERN_HD uint32_t high_word(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

struct Block {
  uint32_t word[4];
};

GAPKERN_HD Block block(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;  // golden ratio, sqrt(3) - 1
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t low0 = multiplier0 * c0, high0 = high_word(multiplier0, c0);
    const uint32_t low1 = multiplier1 * c2, high1 = high_word(multiplier1, c2);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += weyl0;
    k1 += weyl1;
  }
  return {{c0, c1, c2, c3}};
}

#ifdef __CUDA_ARCH__
GAPKERN_HD float root(float x) { return __fsqrt_rn(x); }
#else
GAPKERN_HD float root(float x) { return __builtin_sqrtf(x); }
#endif

// Uniform on (-1, 1): centres of 2^32 equal cells, rounded to float.
GAPKERN_HD float uniform(uint32_t bits) { return (float(int32_t(bits)) + 0.5f) * 0x1p-31f; }

// Two independent standard normals (Box and Muller); |z| <= 6.66, absolute error below 1e-5 but for radii below 0.01,
// which the rounding of u near 1 makes coarse.
GAPKERN_HD void normals(uint32_t bits0, uint32_t bits1, float* z0, float* z1) {
  // -2 ln u with u = (cell + 1/2) / 2^31 in (0, 1]: u = m 2^e, m in [sqrt(1/2), sqrt(2)), ln m by its atanh series.
  const float u = (float(int32_t(bits0 >> 1)) + 0.5f) * 0x1p-31f;
  const uint32_t raised = to_bits(u) + (0x3f800000u - 0x3f3504f3u);
  const float e = float(int32_t(raised >> 23) - 127);
  const float m = from_bits((raised & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
  const float log_u = e * 0.693147180559945f + 2.0f * s * series;
  const float squared = -2.0f * log_u;
  const float radius = root(squared > 0.0f ? squared : 0.0f);
  // The angle is bits1 / 2^32 turns: the nearest quarter turn, and the remainder within an eighth.
  const uint32_t quarter = (bits1 + 0x20000000u) >> 30;
  const float x = float(int32_t(bits1 - (quarter << 30))) * (0x1p-30f * 1.57079632679489662f), x2 = x * x;
  const float sine = x * (1.0f + x2 * (-1.0f / 6 + x2 * (1.0f / 120 + x2 * (-1.0f / 5040 + x2 * (1.0f / 362880)))));
  const float cosine =
      1.0f + x2 * (-0.5f + x2 * (1.0f / 24 + x2 * (-1.0f / 720 + x2 * (1.0f / 40320 + x2 * (-1.0f / 3628800)))));
  const bool swapped = quarter & 1;
  const float a = swapped ? sine : cosine, b = swapped ? cosine : sine;
  // Quarter turns 0..3: (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c).
  z0[0] = radius * (((quarter + 1) & 2) ? -a : a);
  z1[0] = radius * ((quarter & 2) ? -b : b);
}

}  // namespace gapkern::philox

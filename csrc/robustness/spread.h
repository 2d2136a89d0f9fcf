// Rivals spread over equidistant points, so that a sum over rivals of a function of how far each is ahead becomes a sum
// over points. A rival gives the six points around it Lagrange's weights: the error is 0.0049 step^6 times the
// function's sixth derivative.
#pragma once
#include <algorithm>

#include "common/vec.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gapkern::robustness::GAPKERN_ISA {
namespace {

// Lagrange's weights of the points -2 to 3 for a place t among them, by powers of t; two lanes stay empty.
struct Lagrange {
  alignas(32) float of_power[6][8]{};
  constexpr Lagrange() {
    for (int k = 0; k < 6; ++k) {
      double polynomial[6]{1};
      int degree = 0;
      for (int other = 0; other < 6; ++other) {
        if (other == k) continue;
        const double root = other - 2, scale = 1. / (k - other);
        ++degree;
        for (int p = degree; p > 0; --p) polynomial[p] = (polynomial[p - 1] - root * polynomial[p]) * scale;
        polynomial[0] *= -root * scale;
      }
      for (int p = 0; p < 6; ++p) of_power[p][k] = float(polynomial[p]);
    }
  }
};

// The lanes of x below `limit`, in their order; returns how many. Writes Vec<float>::size floats.
GAPKERN_INLINE int keep_below(f32v x, float limit, float* out) {
#if GAPKERN_VECTOR_BYTES == 64
  const __mmask16 below = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(limit), _CMP_LT_OQ);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(below, __m512(x)));
  return __builtin_popcount(below);
#else
#if GAPKERN_VECTOR_BYTES == 32
  if (_mm256_movemask_ps(_mm256_cmp_ps(__m256(x), _mm256_set1_ps(limit), _CMP_LT_OQ)) == 0) return 0;
#endif
  float lanes[Vec<float>::size];
  store(lanes, x);
  int kept = 0;
  for (int i = 0; i < Vec<float>::size; ++i) {
    out[kept] = lanes[i];
    kept += lanes[i] < limit;
  }
  return kept;
#endif
}

template <int most_points>
struct Spread {
  static constexpr int kBlock = 4096;  // rivals summed in float32 at a time
  alignas(64) double weight[most_points]{};

  // ahead[j] / step + origin is a rival's place, at least 2 and less than points - 3.
  void add(const float* ahead, int64_t rivals, double inverse_step, double origin, int points) {
    for (int64_t first = 0; first < rivals; first += kBlock)
      block(ahead + first, std::min<int64_t>(kBlock, rivals - first), float(inverse_step), float(origin), points);
  }

 private:
  void block(const float* ahead, int64_t rivals, float inverse_step, float origin, int points) {
    using f32x8 = float __attribute__((vector_size(32)));
    constexpr int width = Vec<float>::size;
    static constexpr Lagrange lagrange;
    f32x8 c[6];
    for (int p = 0; p < 6; ++p) std::memcpy(&c[p], lagrange.of_power[p], sizeof c[p]);
    // A row for each place's integer part: sums of overlapping points would wait for one another's stores.
    alignas(64) float rows[most_points][8];
    std::memset(rows, 0, points * sizeof rows[0]);
    i32v least = (i32v{} + points - 4), most = (i32v{} + 2);
    for (int64_t j = 0; j < rivals; j += width) {
      const int count = int(std::min<int64_t>(width, rivals - j));
      float lanes[width]{};
      std::memcpy(lanes, ahead + j, count * sizeof(float));
      const f32v place = load(lanes) * inverse_step;
      i32v whole = __builtin_convertvector(place + origin, i32v);
      whole = at_most(at_least(whole, (i32v{} + 2)), (i32v{} + points - 4));
      float t[width];
      int32_t row[width];
      store(t, place - (__builtin_convertvector(whole, f32v) - origin));
      store(row, whole);
      if (count == width) {
        least = at_most(whole, least);
        most = at_least(whole, most);
      } else {
        for (int i = 0; i < count; ++i) {
          least[0] = std::min(least[0], row[i]);
          most[0] = std::max(most[0], row[i]);
        }
      }
      for (int i = 0; i < count; ++i) {
        const f32x8 at = t[i] - f32x8{};
        f32x8 sum;
        std::memcpy(&sum, rows[row[i]], sizeof sum);
        sum += ((((c[5] * at + c[4]) * at + c[3]) * at + c[2]) * at + c[1]) * at + c[0];
        std::memcpy(rows[row[i]], &sum, sizeof sum);
      }
    }
    int low = least[0], high = most[0];
    for (int i = 1; i < width; ++i) {
      low = std::min(low, least[i]);
      high = std::max(high, most[i]);
    }
    for (int i = low; i <= high; ++i)
      for (int k = 0; k < 6; ++k) weight[i - 2 + k] += double(rows[i][k]);
  }
};

}  // namespace
}  // namespace gapkern::robustness::GAPKERN_ISA

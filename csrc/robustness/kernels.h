// What robustness/cpu.cpp asks of each instruction set.
#pragma once
#include <cstdint>

#include "common/each_isa.h"

namespace gapkern::robustness {

inline constexpr int64_t kSpare = 16;  // floats: a vector's, written beyond the last rival

struct Kernels {
  // The probability that row `target` of `count` stays nearest; scratch [count + kSpare]: uninitialised.
  double (*stays_nearest_f32)(const float* squared, int64_t count, int64_t target, double variance, double dims,
                              float* scratch);
  double (*stays_nearest_f64)(const double* squared, int64_t count, int64_t target, double variance, double dims,
                              float* scratch);
  // The probability that row `target` of `count` keeps the largest score; deviation: of each noisy score, >= 0.
  // NaN where a score is NaN.
  double (*stays_largest_f32)(const float* scores, int64_t count, int64_t target, double deviation, float* scratch);
  double (*stays_largest_f64)(const double* scores, int64_t count, int64_t target, double deviation, float* scratch);
  // Survival function of the noncentral chi-square distribution, as stays_nearest evaluates it; for tests.
  double (*survival)(double x, double dims, double noncentrality);
};

GAPKERN_DECLARE_FOR_EACH_ISA(const Kernels& kernels())

}  // namespace gapkern::robustness

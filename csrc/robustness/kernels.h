// What robustness/cpu.cpp asks of each instruction set.
#pragma once
#include <cstdint>

namespace gapkern::robustness {

struct Kernels {
  // The probability that row `target` of `count` stays nearest; room [count] is work space.
  double (*stays_nearest)(const double* squared, int64_t count, int64_t target, double variance, double dims,
                          float* room);
  // Survival function of the noncentral chi-square distribution, as stays_nearest evaluates it; for tests.
  double (*survival)(double x, double dims, double noncentrality);
};

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();
}

}  // namespace gapkern::robustness

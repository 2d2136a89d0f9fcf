// What meanshift/cpu.cpp asks of each instruction set: rows of contiguous matrices.
#pragma once
#include <cstdint>

#include "common/each_isa.h"
#include "common/half.h"

namespace gapkern::meanshift {

template <class T>
struct Rows {
  void (*sum)(const T* x, int64_t rows, int64_t columns, double* total);  // adds to total [columns]
  void (*apply)(const T* x, int64_t rows, int64_t columns, const double* shift, bool normalize, T* out);
};

struct Kernels {
  Rows<float> f32;
  Rows<double> f64;
  Rows<BFloat16> bf16;
  Rows<Half> f16;
};

GAPKERN_DECLARE_FOR_EACH_ISA(const Kernels& kernels())

}  // namespace gapkern::meanshift

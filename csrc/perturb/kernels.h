// What perturb/cpu.cpp asks of each instruction set: rows of contiguous matrices.
#pragma once
#include <cstdint>

#include "common/each_isa.h"

namespace gapkern::perturb {

struct Kernels {
  void (*bits)(int64_t rows, int64_t columns, uint64_t seed, uint32_t trial, int64_t first_row, int32_t* out);
  // out = x + scale * noise; law as in perturb.h.
  void (*noise_f32)(const float* x, int64_t rows, int64_t columns, int law, double scale, uint64_t seed, uint32_t trial,
                    int64_t first_row, float* out);
  void (*noise_f64)(const double* x, int64_t rows, int64_t columns, int law, double scale, uint64_t seed,
                    uint32_t trial, int64_t first_row, double* out);
  // low and width hold one value per column: the lowest cell's lower end, and the extent of a cell.
  void (*quantize_f32)(const float* x, int64_t rows, int64_t columns, const float* low, const float* width,
                       int64_t bins, float* out);
  void (*quantize_f64)(const double* x, int64_t rows, int64_t columns, const double* low, const double* width,
                       int64_t bins, double* out);
};

GAPKERN_DECLARE_FOR_EACH_ISA(const Kernels& kernels())

}  // namespace gapkern::perturb

// Choosing the kernels of this process's instruction set, for the CPU operators.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/isa.h"
#include "common/pages.h"

// The table that `accessor()` returns in the namespace of the active instruction set, within the current namespace.
#if defined(__x86_64__)
#define GAPKERN_FOR_ACTIVE_ISA(accessor)                                          \
  (::gapkern::active_isa() == ::gapkern::Isa::avx512bf16 ? avx512bf16::accessor() \
   : ::gapkern::active_isa() == ::gapkern::Isa::avx512   ? avx512::accessor()     \
   : ::gapkern::active_isa() == ::gapkern::Isa::avx2     ? avx2::accessor()       \
                                                         : portable::accessor())
#elif defined(__aarch64__)
#define GAPKERN_FOR_ACTIVE_ISA(accessor) \
  (::gapkern::active_isa() == ::gapkern::Isa::neonbf16 ? neonbf16::accessor() : neon::accessor())
#else
#define GAPKERN_FOR_ACTIVE_ISA(accessor) portable::accessor()
#endif

namespace gapkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `t` contiguous in `type`; `t` itself where it already is.
inline Tensor as_type(const Tensor& t, ScalarType type) {
  Tensor converted = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return torch::stable::contiguous(converted);
}

// A CPU tensor of x's shape and dtype, contiguous, to be written whole.
inline Tensor fresh_like(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() > 0) want_huge_pages(out.data_ptr(), out.numel() * out.element_size());
  return out;
}

// The type the CPU kernels compute in: float64 for float64, float32 for the rest.
inline ScalarType arithmetic_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows per parallel task, so that each has some work: about 2^14 elements.
inline int64_t rows_per_task(int64_t columns) {
  const int64_t rows = (int64_t(1) << 14) / (columns > 0 ? columns : 1);
  return rows > 0 ? rows : 1;
}

}  // namespace gapkern

// The mean shift on the CPU; rows go to threads, the arithmetic of a row is kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "meanshift/kernels.h"
#include "meanshift/meanshift.h"

namespace gapkern::meanshift {
namespace {

const Kernels& table() { return GAPKERN_FOR_ACTIVE_ISA(kernels); }

// Calls f with the row kernels of x's dtype.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(table().f32);
    case ScalarType::Double:
      return f(table().f64);
    case ScalarType::BFloat16:
      return f(table().bf16);
    case ScalarType::Half:
      return f(table().f16);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

template <class T>
void sum_rows(const Rows<T>& kernels, const Tensor& x, std::vector<double>& partial) {
  const int64_t n = x.size(0), d = x.size(1);
  const T* from = static_cast<const T*>(x.data_ptr());
  parallel_for(0, (n + kRowsPerSum - 1) / kRowsPerSum, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * kRowsPerSum;
      kernels.sum(from + row * d, std::min(kRowsPerSum, n - row), d, partial.data() + p * d);
    }
  });
}

Tensor sum(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 2, "x: expected shape (N, D), got ", input.dim(), " dimensions");
  const Tensor x = torch::stable::contiguous(input);
  const int64_t d = x.size(1), parts = (x.size(0) + kRowsPerSum - 1) / kRowsPerSum;
  std::vector<double> partial(parts * d, 0.);
  by_dtype(x, [&](const auto& kernels) { sum_rows(kernels, x, partial); });
  Tensor out = torch::stable::new_zeros(x, {d}, ScalarType::Double);
  double* total = out.mutable_data_ptr<double>();
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t c = 0; c < d; ++c) total[c] += partial[p * d + c];
  return out;
}

template <class T>
void apply_rows(const Rows<T>& kernels, const Tensor& x, const double* shift, bool normalize, Tensor& out) {
  const int64_t n = x.size(0), d = x.size(1);
  const T* from = static_cast<const T*>(x.data_ptr());
  T* to = static_cast<T*>(out.data_ptr());
  parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    kernels.apply(from + begin * d, end - begin, d, shift, normalize, to + begin * d);
  });
}

Tensor apply(const Tensor& input, const Tensor& shift, bool normalize) {
  STD_TORCH_CHECK(input.dim() == 2, "x: expected shape (N, D), got ", input.dim(), " dimensions");
  STD_TORCH_CHECK(shift.numel() == input.size(1), "shift: expected D = ", input.size(1), " elements, got ",
                  shift.numel());
  const Tensor x = torch::stable::contiguous(input), by = as_type(shift, ScalarType::Double);
  Tensor out = fresh_like(x);
  const double* values = by.const_data_ptr<double>();
  by_dtype(x, [&](const auto& kernels) { apply_rows(kernels, x, values, normalize, out); });
  return out;
}

}  // namespace
}  // namespace gapkern::meanshift

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("meanshift_sum", TORCH_BOX(&gapkern::meanshift::sum));
  m.impl("meanshift_apply", TORCH_BOX(&gapkern::meanshift::apply));
}

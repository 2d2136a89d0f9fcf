// Exact robustness on the CPU; queries go to threads, the integral of a query is kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "robustness/arguments.h"
#include "robustness/kernels.h"

namespace gapkern::robustness {
namespace {

const Kernels& table() { return GAPKERN_FOR_ACTIVE_ISA(kernels); }

// p[i][c] for the T targets of each of Q queries.
template <class T, class StaysNearest>
void fill(StaysNearest* stays_nearest, const Tensor& squared, const Tensor& rows, double variance, double dims,
          Tensor& out) {
  const int64_t g = squared.size(1), t = rows.size(1);
  const T* d = squared.const_data_ptr<T>();
  const int64_t* target = rows.const_data_ptr<int64_t>();
  double* p = out.mutable_data_ptr<double>();
  parallel_for(0, squared.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room(g + 1);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < t; ++c)
        if (target[i * t + c] >= 0)
          p[i * t + c] = stays_nearest(d + i * g, g, target[i * t + c], variance, dims, room.data());
  });
}

Tensor exact(const Tensor& distances, const Tensor& targets, double variance, int64_t dims) {
  check_exact(distances, targets, variance, dims);
  const bool single = distances.scalar_type() == ScalarType::Float;
  const Tensor squared = torch::stable::contiguous(distances), rows = torch::stable::contiguous(targets);
  const int64_t q = squared.size(0), g = squared.size(1), t = rows.size(1);
  Tensor out = torch::stable::new_zeros(squared, {q, t}, ScalarType::Double);
  const int64_t* target = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < q * t; ++i)
    STD_TORCH_CHECK(target[i] >= -1 && target[i] < g, "targets: expected values in [-1, G = ", g, "), got ", target[i]);
  if (single)
    fill<float>(table().stays_nearest_f32, squared, rows, variance, double(dims), out);
  else
    fill<double>(table().stays_nearest_f64, squared, rows, variance, double(dims), out);
  return out;
}

}  // namespace
}  // namespace gapkern::robustness

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) { m.impl("robustness_exact", TORCH_BOX(&gapkern::robustness::exact)); }

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

// p[i][c] for the T targets of each of Q queries: of_row(scores of the query, G, target, query, scratch).
template <class T, class Probability>
void fill(const Tensor& scores, const Tensor& rows, const Probability& probability, Tensor& out) {
  const int64_t g = scores.size(1), t = rows.size(1);
  const T* d = scores.const_data_ptr<T>();
  const int64_t* target = rows.const_data_ptr<int64_t>();
  double* p = out.mutable_data_ptr<double>();
  parallel_for(0, scores.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(g + kSpare);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < t; ++c)
        if (target[i * t + c] >= 0) p[i * t + c] = probability(d + i * g, g, target[i * t + c], i, scratch.data());
  });
}

template <class Single, class Double>
Tensor probabilities(const Tensor& scores, const Tensor& targets, const Single& in_float, const Double& in_double) {
  const Tensor values = torch::stable::contiguous(scores), rows = torch::stable::contiguous(targets);
  const int64_t q = values.size(0), g = values.size(1), t = rows.size(1);
  Tensor out = torch::stable::new_zeros(values, {q, t}, ScalarType::Double);
  const int64_t* target = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < q * t; ++i)
    STD_TORCH_CHECK(target[i] >= -1 && target[i] < g, "targets: expected values in [-1, G = ", g, "), got ", target[i]);
  if (scores.scalar_type() == ScalarType::Float)
    fill<float>(values, rows, in_float, out);
  else
    fill<double>(values, rows, in_double, out);
  return out;
}

Tensor exact(const Tensor& distances, const Tensor& targets, double variance, int64_t dims) {
  check_exact(distances, targets, variance, dims);
  return probabilities(
      distances, targets,
      [&](const float* d, int64_t g, int64_t target, int64_t, float* scratch) {
        return table().stays_nearest_f32(d, g, target, variance, double(dims), scratch);
      },
      [&](const double* d, int64_t g, int64_t target, int64_t, float* scratch) {
        return table().stays_nearest_f64(d, g, target, variance, double(dims), scratch);
      });
}

Tensor exact_inner(const Tensor& scores, const Tensor& targets, const Tensor& deviations) {
  check_exact_inner(scores, targets, deviations);
  const Tensor of_queries = torch::stable::contiguous(deviations);
  const double* deviation = of_queries.const_data_ptr<double>();
  for (int64_t i = 0; i < of_queries.numel(); ++i)
    STD_TORCH_CHECK(deviation[i] >= 0, "deviations: expected numbers >= 0, got ", deviation[i]);
  return probabilities(
      scores, targets,
      [&](const float* s, int64_t g, int64_t target, int64_t i, float* scratch) {
        return table().stays_largest_f32(s, g, target, deviation[i], scratch);
      },
      [&](const double* s, int64_t g, int64_t target, int64_t i, float* scratch) {
        return table().stays_largest_f64(s, g, target, deviation[i], scratch);
      });
}

}  // namespace
}  // namespace gapkern::robustness

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("robustness_exact", TORCH_BOX(&gapkern::robustness::exact));
  m.impl("robustness_exact_inner", TORCH_BOX(&gapkern::robustness::exact_inner));
}

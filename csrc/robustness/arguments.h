// The robustness operators' checks, shared by the CPU and CUDA implementations.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <limits>

namespace gapkern::robustness {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_targets(const char* name, const Tensor& values, const Tensor& targets) {
  STD_TORCH_CHECK(values.dim() == 2 && targets.dim() == 2 && values.size(0) == targets.size(0),
                  "targets: expected (Q, T) beside ", name, " (Q, G)");
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::Double, name,
                  ": expected float32 or float64");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "targets: expected int64");
}

inline void check_exact(const Tensor& distances, const Tensor& targets, double variance, int64_t dims) {
  check_targets("distances", distances, targets);
  STD_TORCH_CHECK(variance > 0, "variance: expected a number > 0, got ", variance);
  STD_TORCH_CHECK(dims > 0, "dims: expected an integer > 0, got ", dims);
}

inline void check_exact_inner(const Tensor& scores, const Tensor& targets, const Tensor& deviations) {
  check_targets("scores", scores, targets);
  STD_TORCH_CHECK(
      deviations.dim() == 1 && deviations.size(0) == scores.size(0) && deviations.scalar_type() == ScalarType::Double,
      "deviations: expected float64 [Q = ", scores.size(0), "]");
}

inline void check_nearest(const Tensor& queries, const Tensor& gallery, const Tensor& centre) {
  STD_TORCH_CHECK(queries.dim() == 2 && gallery.dim() == 2 && queries.size(1) == gallery.size(1),
                  "gallery: expected (G, D) beside queries (Q, D)");
  STD_TORCH_CHECK(gallery.size(0) > 0 && gallery.size(0) <= std::numeric_limits<int32_t>::max(),
                  "gallery: expected at least one row and fewer than 2^31, got ", gallery.size(0));
  const ScalarType type = queries.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "queries: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(gallery.scalar_type() == type, "gallery: expected the dtype of queries");
  STD_TORCH_CHECK(centre.numel() == queries.size(1) && centre.scalar_type() == ScalarType::Float,
                  "centre: expected float32 [D = ", queries.size(1), "]");
}

}  // namespace gapkern::robustness

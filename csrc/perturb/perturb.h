// The perturbation operators' contract, shared by the CPU and CUDA implementations. x is [N, D].
//
// perturb_bits(x, seed, trial, first_row) -> int32 [N, D]: the words of Philox4x32-10 that belong to rows
//   first_row .. first_row + N - 1 (common/philox.h); x lends its shape and device.
// perturb_noise(x, law, std, seed, trial, first_row) -> x + std * noise in x's dtype, noise of unit variance per
//   coordinate and mean zero: "gaussian", or "uniform" on (-sqrt 3, sqrt 3). Noise is drawn in float32 and added in
//   float32 (float64 for float64), rounded once. The same bits on every device.
// perturb_noisy_gallery(x, shift, law, std, seed, trial, first_row, normalize, when) -> with when = "after"
//   perturb_noise(meanshift_apply(x, shift, normalize), ...), with "before" meanshift_apply(perturb_noise(x, ...),
//   shift, normalize): the noise comes after or before the shift. On CUDA in one pass, with sums in x's arithmetic
//   type.
// perturb_quantize(x, low, high, bins) -> x with each coordinate at the centre of its cell: [low, high] in `bins` equal
//   cells, values outside go to the nearest cell; low and high float32 (float64 for float64), [D] or [1]. A range
//   without extent leaves its coordinates as they are; NaN stays NaN.
// Work and traffic: one read and one write of N D elements.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <limits>
#include <string>

#include "perturb/values.h"

namespace gapkern::perturb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Stream check_stream(const Tensor& x, int64_t seed, int64_t trial, int64_t first_row) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (N, D), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(trial >= 0 && trial <= std::numeric_limits<uint32_t>::max(),
                  "trial: expected an integer in [0, 2^32), got ", trial);
  STD_TORCH_CHECK(first_row >= 0, "first_row: expected an integer >= 0, got ", first_row);
  return {uint64_t(seed), uint32_t(trial), first_row};
}

inline Law check_law(const std::string& law) {
  STD_TORCH_CHECK(law == "gaussian" || law == "uniform", "law: expected 'gaussian' or 'uniform', got '", law, "'");
  return law == "gaussian" ? Law::gaussian : Law::uniform;
}

// Whether noise comes before the shift.
inline bool check_when(const std::string& when) {
  STD_TORCH_CHECK(when == "after" || when == "before", "when: expected 'after' or 'before', got '", when, "'");
  return when == "before";
}

inline void check_range(const Tensor& x, const Tensor& low, const Tensor& high, int64_t bins) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (N, D), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(bins >= 2 && bins <= (1 << 24), "bins: expected an integer in [2, 2^24], got ", bins);
  const int64_t count = low.numel();
  STD_TORCH_CHECK(count == high.numel() && (count == 1 || count == x.size(1)),
                  "low and high: expected 1 or D = ", x.size(1), " elements, got ", count, " and ", high.numel());
}

}  // namespace gapkern::perturb

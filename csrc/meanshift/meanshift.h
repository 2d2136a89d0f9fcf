// The mean shift's contract (Chowers et al., CVPR 2026, Eq. 11), shared by every implementation. x is [N, D].
//
// meanshift_sum(x) -> float64 [D]: column sums.
// meanshift_gram(x, mean) -> float64 [D, D]: sum_i (x_i - mean)(x_i - mean)^T; a library product, in gapkern/ops.
// meanshift_apply(x, shift, normalize) -> x_i + shift in x's dtype, and with `normalize` divided by
//   max(||x_i + shift||, 1e-12), rounded once. shift [D] has any dtype. Formed in float64 on the CPU; on CUDA in
//   float64 for float64 inputs, and for narrower ones in float32 with the shift rounded to it.
//
// Every sum is in float64 and has a fixed order that does not depend on the number of threads.
// Traffic: one read of x for the sum; one read and one write for the shift. Non-temporal stores were tried and lose:
// the pages of a fresh result have just been zeroed in the caches.
#pragma once
#include <cstdint>

namespace gapkern::meanshift {

inline constexpr int64_t kRowsPerSum = 512;  // rows whose partial sum one task forms

}  // namespace gapkern::meanshift

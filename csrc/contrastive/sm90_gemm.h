// The matrix products on Hopper's tensor cores, without PyTorch's headers: CUTLASS alone takes half a minute each.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gapkern::contrastive::sm90 {

inline constexpr int kTileM = 128, kTileN = 256;

enum class Element { bfloat16, float16 };

// x [rows, depth] and y [columns, depth], contiguous, 16-byte aligned, depth a multiple of 8.
struct Problem {
  const void* x;
  const void* y;
  int rows, columns, depth;
  Element element;
  int device, multiprocessors;
};

// row_part [tiles across, kTileM * tiles down], column_part [tiles down, kTileN * tiles across]: sums of the tiles' e.
// kept [rows, pitch] bfloat16 receives e, or is null; pitch is a multiple of 8. bfloat16 inputs only.
cudaError_t launch_sums(const Problem& problem, const float* control, float* row_part, float* column_part, void* kept,
                        int64_t pitch, cudaStream_t stream);
// ds [rows, pitch] in the inputs' type, as in every function below.
cudaError_t launch_gradient(const Problem& problem, const float* control, const float* apart, const float* row_weight,
                            const float* column_weight, void* ds, int64_t pitch, cudaStream_t stream);
// loss_part, grad_part and scale_part as row_part: sums of the tiles' losses, dS, and dS <x, y>. labels [rows] has the
// number of each row's label, numbers [columns] each column's.
struct SigmoidSums {
  float *loss_part, *grad_part, *scale_part;
};
cudaError_t launch_sigmoid(const Problem& problem, const float* scale, const float* bias, const float* labels,
                           const float* numbers, const SigmoidSums& sums, void* ds, int64_t pitch, cudaStream_t stream);

}  // namespace gapkern::contrastive::sm90

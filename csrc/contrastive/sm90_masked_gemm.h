// The matrix products over classes of pairs, as those of contrastive/sm90_gemm.h.
#pragma once
#include "contrastive/sm90_gemm.h"

namespace gapkern::contrastive::sm90 {

// Classes of pairs (gapkern/ops/contrastive/masked.py). Rows and columns come as records of floats, those of columns at
// a multiple of 16 bytes and with a whole tile at the end: the bits of the class's number; the limit of <x, y>, or the
// sigmoid loss's weight; for the gradient the weights, as above, of negatives and of positives.
inline constexpr uint32_t kNoRow = ~0u, kNoColumn = ~1u;  // numbers of rows and columns without a class

struct ClassParts {
  float* row_part;  // as of the sums
  float* column_part;
};
struct MaskedSumsArguments {
  const float* control;
  const float* condition;         // nothing is done where it points to 0; or null
  int label;                      // as of the sigmoid loss
  const float* rows;              // [rows, 2]
  const float* columns;           // [kTileN * tiles across, 2]
  ClassParts negative, positive;  // of positives null where they are left out
};
struct MaskedGradientArguments {
  const float* control;
  const float* rows;     // [rows, 4]
  const float* columns;  // [kTileN * tiles across, 4]
};
struct MaskedSigmoidArguments {
  const float* scale;
  const float* bias;
  const float* rows;     // [rows, 2]
  const float* columns;  // [kTileN * tiles across, 2]
  bool soft;             // whether the weights are targets
  float* loss_part;      // as of the sigmoid loss
  float* gradient_part;
  float* scale_part;
};

cudaError_t launch_masked_sums(const Problem& problem, const MaskedSumsArguments& arguments, cudaStream_t stream);
cudaError_t launch_masked_gradient(const Problem& problem, const MaskedGradientArguments& arguments, void* ds,
                                   int64_t pitch, cudaStream_t stream);
cudaError_t launch_masked_sigmoid(const Problem& problem, const MaskedSigmoidArguments& arguments, void* ds,
                                  int64_t pitch, cudaStream_t stream);

}  // namespace gapkern::contrastive::sm90

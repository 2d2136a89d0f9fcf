// The matrix products on Hopper's tensor cores, without PyTorch's headers: CUTLASS alone takes half a minute each.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gapkern::contrastive::sm90 {

inline constexpr int kTileM = 128, kTileN = 256;
inline constexpr int kTerms = 3;      // bfloat16 numbers whose sum has float32's 24 bits
inline constexpr int kPartRows = 64;  // of a tile, whose columns are summed together

enum class Element { bfloat16, float16 };

// x [rows, depth] and y [columns, depth], contiguous, 16-byte aligned, depth a multiple of 8.
struct Problem {
  const void* x;
  const void* y;
  int rows, columns, depth;
  Element element;
  int device, multiprocessors;
};

// What a product's epilogue is told, and where it writes.
struct SumsArguments {
  const float* control;  // k and -c
  int label;             // the column of the first row's label; each next row's is a column further
  float* row_part;       // [tiles across, kTileM * tiles down]: sums of e over each tile's columns
  float* column_part;    // [kTileM / kPartRows * tiles down, kTileN * tiles across]: over kPartRows rows
};
struct GradientArguments {
  const float* control;
  const float* row_weight;     // [rows], common or separate (contrastive/epilogue.cuh)
  const float* column_weight;  // [kTileN * tiles across], at a multiple of 8 bytes
  const float* condition;      // nothing is done where it points to 0; or null
};
struct SigmoidArguments {
  const float* scale;
  const float* bias;
  int label;             // as of the sums; rows whose label is no column have none
  float* loss_part;      // as row_part: sums of the losses,
  float* gradient_part;  // of dS,
  float* scale_part;     // and of dS <x, y>
};

// kept [rows, pitch] bfloat16 receives e, zero at the labels, or is null; pitch is a multiple of 8. bfloat16 inputs
// only.
cudaError_t launch_sums(const Problem& problem, const SumsArguments& arguments, void* kept, int64_t pitch,
                        cudaStream_t stream);
// ds [terms, rows, pitch] in the inputs' type, whose sum it is: one term, or kTerms of bfloat16.
cudaError_t launch_gradient(const Problem& problem, const GradientArguments& arguments, void* ds, int64_t pitch,
                            int terms, cudaStream_t stream);
cudaError_t launch_sigmoid(const Problem& problem, const SigmoidArguments& arguments, void* ds, int64_t pitch,
                           int terms, cudaStream_t stream);

}  // namespace gapkern::contrastive::sm90

// What every operator on CUDA needs around its launches.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "common/cuda.cuh"
#include "common/dispatch.h"

namespace gapkern {

inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls f with a null pointer to the element type behind x's dtype.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

// Whether rows of `columns` elements can be read 16 bytes at a time.
inline bool packs(const Tensor& x, int64_t columns) {
  const int64_t bytes = x.element_size();
  return columns * bytes % 16 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

// A pointer of another device's would be read as this one's.
inline void expect_device_of(const Tensor& like, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  ": expected the device cuda:", like.get_device_index());
}

// And that many elements.
inline void expect(const Tensor& like, const Tensor& x, int64_t count, const char* name) {
  expect_device_of(like, x, name);
  STD_TORCH_CHECK(x.numel() == count, name, ": expected ", count, " elements, got ", x.numel());
}

// Rows x [N, D] that are to be shifted: contiguous, with the shift in the type of the arithmetic and the result
// allocated.
struct Shifted {
  Tensor x, by, out;
};
inline Shifted check_shifted(const Tensor& x, const Tensor& shift) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (N, D), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(shift.numel() == x.size(1), "shift: expected D = ", x.size(1), " elements, got ", shift.numel());
  expect_device_of(x, shift, "shift");
  const Tensor rows = torch::stable::contiguous(x);
  return {rows, as_type(shift, arithmetic_type(rows)), torch::stable::empty_like(rows)};
}

inline unsigned blocks(int64_t work, int64_t per_block, int64_t most = int64_t(1) << 20) {
  const int64_t wanted = (work + per_block - 1) / per_block;
  return unsigned(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace gapkern

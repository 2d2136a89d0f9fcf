// What the host side of the Hopper operators shares: the checks of their inputs, and tensors of results.
#pragma once
#include "common/cuda_host.h"
#include "contrastive/sm90_gemm.h"
#include "contrastive/sm90_parts.cuh"

namespace gapkern::contrastive::sm90 {

inline int64_t tiles(int64_t count, int64_t per_tile) { return (count + per_tile - 1) / per_tile; }
inline int64_t pitch_of(int64_t columns) { return tiles(columns, 8) * 8; }

inline Tensor doubles(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Double);
}
inline Tensor floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}
inline double* out(Tensor& x) { return x.mutable_data_ptr<double>(); }

// Images and texts as the products need them, or, for kernels without tensor cores, of float32 too.
enum class Float32 { refused, taken };
struct Inputs {
  Tensor images, texts;
  int64_t rows, columns, depth;

  Inputs(const Tensor& x, const Tensor& y, Float32 float32 = Float32::refused)
      : images(torch::stable::contiguous(x)),
        texts(torch::stable::contiguous(y)),
        rows(x.size(0)),
        columns(y.size(0)),
        depth(x.size(1)) {
    const ScalarType type = x.scalar_type();
    expect_device_of(x, y, "texts");
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "images and texts: expected the same dims");
    STD_TORCH_CHECK(rows > 0 && columns > 0 && depth > 0, "images and texts: expected filled matrices");
    STD_TORCH_CHECK(rows < int64_t(1) << 31 && columns < int64_t(1) << 31, "images and texts: too many rows");
    const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
    STD_TORCH_CHECK((half || (float32 == Float32::taken && type == ScalarType::Float)) && y.scalar_type() == type,
                    "images and texts: expected bfloat16 or float16");
    STD_TORCH_CHECK(packs(images, depth) && packs(texts, depth),
                    "images and texts: expected dims a multiple of 8 and rows at multiples of 16 bytes");
  }
  bool bfloat16() const { return images.scalar_type() == ScalarType::BFloat16; }

  Problem problem() const {
    const int device = images.get_device_index();
    int multiprocessors = 0, major = 0, minor = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    STD_TORCH_CHECK(major == 9 && minor == 0, "images: expected a device of capability 9.0, got ", major, ".", minor);
    return {images.data_ptr(),
            texts.data_ptr(),
            int(rows),
            int(columns),
            int(depth),
            bfloat16() ? Element::bfloat16 : Element::float16,
            device,
            multiprocessors};
  }
  // Calls f with the products of images and texts, or the other way round.
  template <Float32 float32 = Float32::refused, class F>
  void with(const F& f, bool transposed = false) const {
    const Tensor& x = transposed ? texts : images;
    const Tensor& y = transposed ? images : texts;
    const auto call = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      f(Products<T>{static_cast<const T*>(x.data_ptr()), static_cast<const T*>(y.data_ptr()), x.size(0), y.size(0),
                    depth});
    };
    if (bfloat16())
      call(static_cast<BFloat16*>(nullptr));
    else if (images.scalar_type() == ScalarType::Half)
      call(static_cast<Half*>(nullptr));
    else if constexpr (float32 == Float32::taken)
      call(static_cast<float*>(nullptr));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

inline void expect_labels(const Inputs& in, int64_t label_offset) {
  STD_TORCH_CHECK(label_offset >= 0 && label_offset + in.rows <= in.columns, "label_offset: outside texts");
}

// Puts grad_label [rows] float64 into dS at the labels, of the rows that have one.
void write_labels(const Inputs& in, const Tensor& grad_label, int64_t label_offset, int64_t terms, Tensor& ds);

inline void succeed(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "gapkern: ", what, " on Hopper: ", cudaGetErrorString(status));
}

}  // namespace gapkern::contrastive::sm90

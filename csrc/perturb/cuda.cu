// The perturbation operators on CUDA. Compiled with -fmad=false: the values are the CPU's, bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "perturb/perturb.h"

namespace gapkern::perturb {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// One thread per Philox block: four neighbouring columns of one row.
template <class Body>
__global__ void over_blocks(int64_t rows, int64_t columns, Stream s, Body body) {
  const int64_t per_row = (columns + 3) / 4;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < rows * per_row;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t r = i / per_row, b = i - r * per_row, row = s.first_row + r;
    const philox::Block block =
        philox::block(uint32_t(b), uint32_t(row), uint32_t(uint64_t(row) >> 32), s.trial, s.seed);
    const int64_t left = columns - 4 * b;
    body(block, r * columns + 4 * b, left < 4 ? int(left) : 4);
  }
}

struct WriteBits {
  int32_t* out;
  __device__ void operator()(const philox::Block& block, int64_t at, int count) const {
    for (int w = 0; w < count; ++w) out[at + w] = int32_t(block.word[w]);
  }
};

template <Law law, class T>
struct AddNoise {
  using A = typename Arithmetic<T>::type;
  const T* x;
  T* out;
  A scale;
  __device__ void operator()(const philox::Block& block, int64_t at, int count) const {
    float z[4];
    unit_noise<law>(block, z, z + 1, z + 2, z + 3);
    for (int w = 0; w < count; ++w) out[at + w] = T(A(x[at + w]) + scale * A(z[w]));
  }
};

template <class T, class A>
__global__ void quantize_all(const T* x, int64_t elements, int64_t columns, const A* low, const A* high, bool shared,
                             A bins, T* out) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < elements; i += int64_t(gridDim.x) * kThreads) {
    const int64_t c = shared ? 0 : i % columns;
    out[i] = T(quantized(A(x[i]), low[c], (high[c] - low[c]) / bins, bins));
  }
}

unsigned grid(int64_t work) {
  return unsigned(std::max<int64_t>(1, std::min(kMostBlocks, (work + kThreads - 1) / kThreads)));
}

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class Body>
void launch(const Tensor& x, const Stream& s, const Body& body) {
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  over_blocks<<<grid(x.size(0) * ((x.size(1) + 3) / 4)), kThreads, 0, stream_of(x)>>>(x.size(0), x.size(1), s, body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls f with a null pointer of the CUDA type behind x's dtype.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

Tensor bits(const Tensor& x, int64_t seed, int64_t trial, int64_t first_row) {
  const Stream s = check_stream(x, seed, trial, first_row);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Int);
  launch(x, s, WriteBits{out.mutable_data_ptr<int32_t>()});
  return out;
}

Tensor noise(const Tensor& input, std::string law_name, double std, int64_t seed, int64_t trial, int64_t first_row) {
  const Stream s = check_stream(input, seed, trial, first_row);
  const Law law = check_law(law_name);
  const Tensor x = torch::stable::contiguous(input);
  Tensor out = torch::stable::empty_like(x);
  by_dtype(x, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* in = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    const auto scale = typename Arithmetic<T>::type(std);
    if (law == Law::gaussian)
      launch(x, s, AddNoise<Law::gaussian, T>{in, to, scale});
    else
      launch(x, s, AddNoise<Law::uniform, T>{in, to, scale});
  });
  return out;
}

Tensor quantize(const Tensor& input, const Tensor& low, const Tensor& high, int64_t bins) {
  check_range(input, low, high, bins);
  const Tensor x = torch::stable::contiguous(input);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor l = torch::stable::contiguous(torch::stable::to(low, type));
  const Tensor h = torch::stable::contiguous(torch::stable::to(high, type));
  by_dtype(x, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using A = typename Arithmetic<T>::type;
    quantize_all<T, A><<<grid(x.numel()), kThreads, 0, stream_of(x)>>>(
        static_cast<const T*>(x.data_ptr()), x.numel(), x.size(1), static_cast<const A*>(l.data_ptr()),
        static_cast<const A*>(h.data_ptr()), l.numel() == 1, A(bins), static_cast<T*>(out.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace gapkern::perturb

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("perturb_bits", TORCH_BOX(&gapkern::perturb::bits));
  m.impl("perturb_noise", TORCH_BOX(&gapkern::perturb::noise));
  m.impl("perturb_quantize", TORCH_BOX(&gapkern::perturb::quantize));
}

// The perturbation operators on CUDA. Compiled with -fmad=false: the values are the CPU's, bit for bit.
#include "common/cuda_host.h"
#include "perturb/kernels.cuh"
#include "perturb/perturb.h"

namespace gapkern::perturb {
namespace {

unsigned grid(int64_t work) { return blocks(work, kThreads); }

template <class Body>
void launch(const Tensor& x, const Stream& s, const Body& body) {
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  over_blocks<<<grid(x.size(0) * ((x.size(1) + 3) / 4)), kThreads, 0, stream_of(x)>>>(x.size(0), x.size(1), s, body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
    const auto scale = typename Wide<T>::type(std);
    const bool packed = x.size(1) % 4 == 0 && reinterpret_cast<uintptr_t>(in) % sizeof(Pack<T, 4>) == 0;
    if (law == Law::gaussian)
      launch(x, s, AddNoise<Law::gaussian, T>{in, to, scale, packed});
    else
      launch(x, s, AddNoise<Law::uniform, T>{in, to, scale, packed});
  });
  return out;
}

template <class T, bool packed>
void launch_noisy(const Shifted& rows, bool normalize, bool noise_first, Law law, double std, const Stream& s) {
  using A = typename Wide<T>::type;
  const Tensor& x = rows.x;
  noisy_rows<T, packed><<<blocks(x.size(0), kThreads / kWarp), kThreads, 0, stream_of(x)>>>(
      static_cast<const T*>(x.data_ptr()), x.size(0), x.size(1), static_cast<const A*>(rows.by.data_ptr()), normalize,
      noise_first, law, A(std), s, static_cast<T*>(rows.out.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor noisy_gallery(const Tensor& input, const Tensor& shift, std::string law_name, double std, int64_t seed,
                     int64_t trial, int64_t first_row, bool normalize, std::string when) {
  const Stream s = check_stream(input, seed, trial, first_row);
  const Law law = check_law(law_name);
  const bool noise_first = check_when(when);
  const Shifted rows = check_shifted(input, shift);
  if (rows.x.numel() == 0) return rows.out;
  const torch::stable::accelerator::DeviceGuard guard(rows.x.get_device_index());
  const int64_t columns = rows.x.size(1);
  by_dtype(rows.x, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (packs(rows.x, columns) && columns % Run<T, true>::kCount == 0 && packs(rows.by, columns))
      launch_noisy<T, true>(rows, normalize, noise_first, law, std, s);
    else
      launch_noisy<T, false>(rows, normalize, noise_first, law, std, s);
  });
  return rows.out;
}

Tensor quantize(const Tensor& input, const Tensor& low, const Tensor& high, int64_t bins) {
  check_range(input, low, high, bins);
  expect_device_of(input, low, "low");
  expect_device_of(input, high, "high");
  const Tensor x = torch::stable::contiguous(input);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor l = torch::stable::contiguous(torch::stable::to(low, type));
  const Tensor h = torch::stable::contiguous(torch::stable::to(high, type));
  by_dtype(x, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using A = typename Wide<T>::type;
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
  m.impl("perturb_noisy_gallery", TORCH_BOX(&gapkern::perturb::noisy_gallery));
  m.impl("perturb_quantize", TORCH_BOX(&gapkern::perturb::quantize));
}

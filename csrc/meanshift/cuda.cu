// The mean shift on CUDA.
#include "common/cuda_host.h"
#include "meanshift/kernels.cuh"
#include "meanshift/meanshift.h"

namespace gapkern::meanshift {
namespace {

template <class T, int pack>
void launch_sum(const T* x, int64_t rows, int64_t columns, double* partial, cudaStream_t stream) {
  const dim3 grid(blocks(columns, kWarp * pack), blocks(rows, kRowsPerBlock));
  sum_rows<T, pack><<<grid, kSumWarps * kWarp, 0, stream>>>(x, rows, columns, partial);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// [ceil(N / kRowsPerBlock), D] partial sums.
Tensor partial_sums(const Tensor& x) {
  const int64_t n = x.size(0), d = x.size(1), parts = (n + kRowsPerBlock - 1) / kRowsPerBlock;
  STD_TORCH_CHECK(parts <= 65535, "x: expected at most ", 65535 * kRowsPerBlock, " rows at once, got ", n);
  Tensor partial = torch::stable::new_empty(x, {parts, d}, ScalarType::Double);
  by_dtype(x, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* from = static_cast<const T*>(x.data_ptr());
    double* to = partial.mutable_data_ptr<double>();
    if (packs(x, d))
      launch_sum<T, kPack<T>>(from, n, d, to, stream_of(x));
    else
      launch_sum<T, 1>(from, n, d, to, stream_of(x));
  });
  return partial;
}

Tensor sum(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 2, "x: expected shape (N, D), got ", input.dim(), " dimensions");
  const Tensor x = torch::stable::contiguous(input);
  if (x.numel() == 0) return torch::stable::new_zeros(x, {x.size(1)}, ScalarType::Double);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor partial = partial_sums(x);
  while (partial.size(0) > 1) partial = partial_sums(partial);
  return torch::stable::view(partial, {x.size(1)});
}

template <class T, int pack>
void launch_apply(const Shifted& s, bool normalize) {
  using A = typename Wide<T>::type;
  const Tensor& x = s.x;
  const unsigned grid = blocks(x.size(0), kApplyWarps);
  const auto kernel = normalize ? apply_rows<T, pack, true> : apply_rows<T, pack, false>;
  kernel<<<grid, kApplyWarps * kWarp, 0, stream_of(x)>>>(static_cast<const T*>(x.data_ptr()), x.size(0), x.size(1),
                                                         static_cast<const A*>(s.by.data_ptr()),
                                                         static_cast<T*>(s.out.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor apply(const Tensor& input, const Tensor& shift, bool normalize) {
  const Shifted s = check_shifted(input, shift);
  if (s.x.numel() == 0) return s.out;
  const torch::stable::accelerator::DeviceGuard guard(s.x.get_device_index());
  by_dtype(s.x, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (packs(s.x, s.x.size(1)))
      launch_apply<T, kPack<T>>(s, normalize);
    else
      launch_apply<T, 1>(s, normalize);
  });
  return s.out;
}

}  // namespace
}  // namespace gapkern::meanshift

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("meanshift_sum", TORCH_BOX(&gapkern::meanshift::sum));
  m.impl("meanshift_apply", TORCH_BOX(&gapkern::meanshift::apply));
}

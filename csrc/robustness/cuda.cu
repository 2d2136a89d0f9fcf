// Exact robustness and nearest neighbours on CUDA.
#include "common/cuda_host.h"
#include "robustness/arguments.h"
#include "robustness/inner.cuh"
#include "robustness/kernels.cuh"
#include "robustness/nearest.cuh"

namespace gapkern::robustness {
namespace {

// launch(values, rows, out) with pointers of the values' type, a block for each target.
template <class Launch>
Tensor probabilities(const Tensor& scores, const Tensor& targets, const Launch& launch) {
  expect_device_of(scores, targets, "targets");
  const Tensor values = torch::stable::contiguous(scores), rows = torch::stable::contiguous(targets);
  const int64_t count = rows.numel();
  STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "targets: expected fewer than 2^31, got ", count);
  Tensor out = torch::stable::new_empty(values, {rows.size(0), rows.size(1)}, ScalarType::Double);
  if (count == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const int64_t* target = rows.const_data_ptr<int64_t>();
  double* p = out.mutable_data_ptr<double>();
  if (values.scalar_type() == ScalarType::Float)
    launch(values.const_data_ptr<float>(), target, unsigned(count), p);
  else
    launch(values.const_data_ptr<double>(), target, unsigned(count), p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor exact(const Tensor& distances, const Tensor& targets, double variance, int64_t dims) {
  check_exact(distances, targets, variance, dims);
  return probabilities(distances, targets, [&](auto* d, const int64_t* target, unsigned count, double* p) {
    stays_nearest<<<count, kExactThreads, 0, stream_of(distances)>>>(d, distances.size(1), target, targets.size(1),
                                                                     variance, double(dims), p);
  });
}

Tensor exact_inner(const Tensor& scores, const Tensor& targets, const Tensor& deviations) {
  check_exact_inner(scores, targets, deviations);
  expect_device_of(scores, deviations, "deviations");
  const Tensor of_queries = torch::stable::contiguous(deviations);
  return probabilities(scores, targets, [&](auto* s, const int64_t* target, unsigned count, double* p) {
    stays_largest<<<count, kExactThreads, 0, stream_of(scores)>>>(s, scores.size(1), target, targets.size(1),
                                                                  of_queries.const_data_ptr<double>(), p);
  });
}

// As many parts of the gallery as keep every multiprocessor busy a few times over.
int64_t parts_for(int64_t query_tiles, int64_t gallery_tiles, int device) {
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = (8 * int64_t(processors) + query_tiles - 1) / query_tiles;
  const int64_t parts = wanted < gallery_tiles ? wanted : gallery_tiles;
  return parts < 65535 ? parts : 65535;
}

template <class T>
Tensor norms_of(const Tensor& x, const float* centre, Tensor& largest) {
  Tensor norms = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  centred_norms<T><<<unsigned(largest.size(0)), kNormWarps * kWarp, 0, stream_of(x)>>>(
      static_cast<const T*>(x.data_ptr()), x.size(0), x.size(1), centre, norms.mutable_data_ptr<float>(),
      largest.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return norms;
}

using Nearest = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
void search(const Tensor& y, const Tensor& x, const float* centre, Nearest& out) {
  const int64_t q = y.size(0), g = x.size(0), d = y.size(1);
  const int64_t query_tiles = (q + kTile - 1) / kTile, gallery_tiles = (g + kTile - 1) / kTile;
  const int64_t parts = parts_for(query_tiles, gallery_tiles, x.get_device_index());
  const cudaStream_t stream = stream_of(x);
  Tensor largest = torch::stable::new_empty(x, {blocks(g, kNormWarps, kNormBlocks)}, ScalarType::Float);
  Tensor unused = torch::stable::new_empty(x, {blocks(q, kNormWarps, kNormBlocks)}, ScalarType::Float);
  const Tensor norms = norms_of<T>(x, centre, largest), own = norms_of<T>(y, centre, unused);
  Tensor scratch = torch::stable::new_empty(x, {parts, q, int64_t(sizeof(Found))}, ScalarType::Byte);
  Found* found = static_cast<Found*>(scratch.data_ptr());
  const T *queries = static_cast<const T*>(y.data_ptr()), *gallery = static_cast<const T*>(x.data_ptr());
  const auto aligned = [](const void* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; };
  const bool packed = d % 4 == 0 && aligned(queries, sizeof(Pack<T, 4>)) && aligned(gallery, sizeof(Pack<T, 4>)) &&
                      aligned(centre, sizeof(Pack<float, 4>));
  const auto kernel = packed ? nearest_tiles<T, true> : nearest_tiles<T, false>;
  kernel<<<dim3(unsigned(query_tiles), unsigned(parts)), kNearestThreads, 0, stream>>>(
      queries, q, gallery, g, d, centre, norms.const_data_ptr<float>(), found);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  auto& [row, best, second, margin] = out;
  nearest_combine<<<blocks(q, kTile, query_tiles), kTile, 0, stream>>>(
      found, parts, q, own.const_data_ptr<float>(), largest.const_data_ptr<float>(), int(largest.size(0)),
      row.mutable_data_ptr<int64_t>(), best.mutable_data_ptr<float>(), second.mutable_data_ptr<float>(),
      margin.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Nearest nearest(const Tensor& queries, const Tensor& gallery, const Tensor& centre) {
  check_nearest(queries, gallery, centre);
  expect_device_of(queries, gallery, "gallery");
  expect_device_of(queries, centre, "centre");
  const Tensor y = torch::stable::contiguous(queries), x = torch::stable::contiguous(gallery);
  const Tensor middle = torch::stable::contiguous(centre);
  const auto result = [&](ScalarType type) { return torch::stable::new_empty(y, {y.size(0)}, type); };
  Nearest out{result(ScalarType::Long), result(ScalarType::Float), result(ScalarType::Float),
              result(ScalarType::Float)};
  if (y.size(0) == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const float* at = middle.const_data_ptr<float>();
  switch (y.scalar_type()) {
    case ScalarType::Half:
      search<Half>(y, x, at, out);
      break;
    case ScalarType::BFloat16:
      search<BFloat16>(y, x, at, out);
      break;
    default:
      search<float>(y, x, at, out);
  }
  return out;
}

}  // namespace
}  // namespace gapkern::robustness

STABLE_TORCH_LIBRARY_IMPL(gapkern, CUDA, m) {
  m.impl("robustness_exact", TORCH_BOX(&gapkern::robustness::exact));
  m.impl("robustness_exact_inner", TORCH_BOX(&gapkern::robustness::exact_inner));
  m.impl("robustness_nearest", TORCH_BOX(&gapkern::robustness::nearest));
}

// The perturbation operators on the CPU; rows go to threads, the arithmetic of a row is kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "perturb/kernels.h"
#include "perturb/perturb.h"

namespace gapkern::perturb {
namespace {

const Kernels& table() { return GAPKERN_FOR_ACTIVE_ISA(kernels); }

template <class F>
void over_rows(const Tensor& x, const F& body) {
  parallel_for(0, x.size(0), rows_per_task(x.size(1)), [&](int64_t begin, int64_t end) { body(begin, end - begin); });
}

Tensor in_dtype_of(const Tensor& x, const Tensor& result) {
  return x.scalar_type() == result.scalar_type() ? result : torch::stable::to(result, x.scalar_type());
}

Tensor bits(const Tensor& x, int64_t seed, int64_t trial, int64_t first_row) {
  const Stream s = check_stream(x, seed, trial, first_row);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Int);
  int32_t* p = out.mutable_data_ptr<int32_t>();
  const int64_t d = x.size(1);
  over_rows(x, [&](int64_t r, int64_t rows) { table().bits(rows, d, s.seed, s.trial, s.first_row + r, p + r * d); });
  return out;
}

template <class T, class F>
Tensor noisy(const Tensor& x, const F& kernel, Law law, double std, const Stream& s) {
  const Tensor from = as_type(x, arithmetic_type(x));
  Tensor out = fresh_like(from);
  const T* in = from.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t d = x.size(1);
  over_rows(x, [&](int64_t r, int64_t rows) {
    kernel(in + r * d, rows, d, int(law), std, s.seed, s.trial, s.first_row + r, to + r * d);
  });
  return in_dtype_of(x, out);
}

Tensor noise(const Tensor& x, std::string law_name, double std, int64_t seed, int64_t trial, int64_t first_row) {
  const Stream s = check_stream(x, seed, trial, first_row);
  const Law law = check_law(law_name);
  if (x.scalar_type() == ScalarType::Double) return noisy<double>(x, table().noise_f64, law, std, s);
  return noisy<float>(x, table().noise_f32, law, std, s);
}

template <class T, class F>
Tensor cells(const Tensor& x, const F& kernel, const Tensor& low, const Tensor& high, int64_t bins) {
  const ScalarType type = arithmetic_type(x);
  const Tensor from = as_type(x, type), l = as_type(low, type), h = as_type(high, type);
  const int64_t d = x.size(1);
  const T *lowest = l.const_data_ptr<T>(), *highest = h.const_data_ptr<T>();
  const bool shared = l.numel() == 1;
  std::vector<T> lows(d), widths(d);
  for (int64_t c = 0; c < d; ++c) {
    lows[c] = lowest[shared ? 0 : c];
    widths[c] = (highest[shared ? 0 : c] - lows[c]) / T(bins);
  }
  Tensor out = fresh_like(from);
  const T* in = from.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  over_rows(
      x, [&](int64_t r, int64_t rows) { kernel(in + r * d, rows, d, lows.data(), widths.data(), bins, to + r * d); });
  return in_dtype_of(x, out);
}

Tensor quantize(const Tensor& x, const Tensor& low, const Tensor& high, int64_t bins) {
  check_range(x, low, high, bins);
  if (x.scalar_type() == ScalarType::Double) return cells<double>(x, table().quantize_f64, low, high, bins);
  return cells<float>(x, table().quantize_f32, low, high, bins);
}

}  // namespace
}  // namespace gapkern::perturb

STABLE_TORCH_LIBRARY_IMPL(gapkern, CPU, m) {
  m.impl("perturb_bits", TORCH_BOX(&gapkern::perturb::bits));
  m.impl("perturb_noise", TORCH_BOX(&gapkern::perturb::noise));
  m.impl("perturb_quantize", TORCH_BOX(&gapkern::perturb::quantize));
}

// Sums over the pairs of a class and their gradients, compiled once per instruction set.
#include "contrastive/class_sums.h"

namespace gapkern::contrastive::GAPKERN_ISA {
namespace {

constexpr int kLanes = 16;

// Running sums in a fixed order, which vectorise without leave to reorder.
template <class Term>
GAPKERN_HD double sum_over(int64_t depth, const Term& term) {
  double lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= depth; c += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] += term(c + i);
  for (; c < depth; ++c) lanes[c % kLanes] += term(c);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

GAPKERN_HD double square(double x) { return x * x; }

template <class T>
void sums(const ClassBlock<T>& b, double* scratch, double* out) {
  const double count = double(b.other.count);
  double* __restrict total = scratch;
  for (int64_t c = 0; c < b.depth; ++c) total[c] = 0;
  for (int64_t k = 0; k < b.other.count; ++k) {
    const T* y = b.other.values + b.other.members[k] * b.stride;
    for (int64_t c = 0; c < b.depth; ++c) total[c] += widened(y[c]);
  }
  double spread = 0;  // of the other side's rows about their mean
  if (b.distances) {
    for (int64_t c = 0; c < b.depth; ++c) total[c] /= count;
    for (int64_t k = 0; k < b.other.count; ++k) {
      const T* y = b.other.values + b.other.members[k] * b.stride;
      spread += sum_over(b.depth, [&](int64_t c) { return square(widened(y[c]) - total[c]); });
    }
  }
  for (int64_t k = 0; k < b.own.count; ++k) {
    const int64_t i = b.own.members[k], label = b.label[i];
    const T* x = b.own.values + i * b.stride;
    const T* y = b.other.values + label * b.stride;
    if (b.distances && label < 0)
      out[i] = -(spread + count * sum_over(b.depth, [&](int64_t c) { return square(widened(x[c]) - total[c]); }));
    else if (b.distances)
      out[i] = -(spread + sum_over(b.depth, [&](int64_t c) {
                   return count * square(widened(x[c]) - total[c]) - square(widened(x[c]) - widened(y[c]));
                 }));
    else if (label < 0)
      out[i] = sum_over(b.depth, [&](int64_t c) { return widened(x[c]) * total[c]; });
    else
      out[i] = sum_over(b.depth, [&](int64_t c) { return widened(x[c]) * (total[c] - widened(y[c])); });
  }
}

template <class T>
void gradient(const ClassBlock<T>& b, const double* by_own, const double* by_other, double* scratch, T* out) {
  double* __restrict total = scratch;
  double* __restrict weighted = scratch + b.depth;
  for (int64_t c = 0; c < 2 * b.depth; ++c) total[c] = 0;
  double weights = 0;
  for (int64_t k = 0; k < b.other.count; ++k) {
    const int64_t j = b.other.members[k];
    const T* y = b.other.values + j * b.stride;
    const double weight = by_other[j];
    weights += weight;
    for (int64_t c = 0; c < b.depth; ++c) {
      total[c] += widened(y[c]);
      weighted[c] += weight * widened(y[c]);
    }
  }
  for (int64_t k = 0; k < b.own.count; ++k) {
    const int64_t i = b.own.members[k], label = b.label[i];
    const double own = by_own[i], of_label = label < 0 ? 0 : own + by_other[label];
    const double of_itself = own * double(b.other.count) + weights - of_label;
    const T* x = b.own.values + i * b.stride;
    const T* y = b.other.values + (label < 0 ? b.other.members[0] : label) * b.stride;
    T* __restrict to = out + i * b.stride;
    if (b.distances)
      for (int64_t c = 0; c < b.depth; ++c)
        narrowed(2 * (own * total[c] + weighted[c] - of_label * widened(y[c]) - of_itself * widened(x[c])), to + c);
    else
      for (int64_t c = 0; c < b.depth; ++c) narrowed(own * total[c] + weighted[c] - of_label * widened(y[c]), to + c);
  }
}

}  // namespace

const ClassSumsKernels& class_sums_kernels() {
  static const ClassSumsKernels table{{sums<float>, gradient<float>},
                                      {sums<double>, gradient<double>},
                                      {sums<BFloat16>, gradient<BFloat16>},
                                      {sums<Half>, gradient<Half>}};
  return table;
}

}  // namespace gapkern::contrastive::GAPKERN_ISA

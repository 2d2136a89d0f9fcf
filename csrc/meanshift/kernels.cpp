// Sums and shifts of rows, compiled once per instruction set.
#include "meanshift/kernels.h"

#include <algorithm>
#include <cmath>

namespace gapkern::meanshift::GAPKERN_ISA {
namespace {

template <class T>
void sum(const T* x, int64_t rows, int64_t columns, double* total) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) total[c] += widened(x[r * columns + c]);
}

// Eight running sums: a fixed order, and one that vectorises without leave to reorder.
template <class T>
double squared_norm(const T* x, int64_t columns, const double* shift) {
  double lanes[8] = {};
  int64_t c = 0;
  for (; c + 8 <= columns; c += 8)
    for (int i = 0; i < 8; ++i) {
      const double y = widened(x[c + i]) + shift[c + i];
      lanes[i] += y * y;
    }
  for (; c < columns; ++c) {
    const double y = widened(x[c]) + shift[c];
    lanes[0] += y * y;
  }
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <class T>
void apply(const T* x, int64_t rows, int64_t columns, const double* shift, bool normalize, T* __restrict out) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * columns;
    const double scale = normalize ? 1.0 / std::max(std::sqrt(squared_norm(row, columns, shift)), 1e-12) : 1.0;
    for (int64_t c = 0; c < columns; ++c) narrowed((widened(row[c]) + shift[c]) * scale, out + r * columns + c);
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table{{sum<float>, apply<float>},
                             {sum<double>, apply<double>},
                             {sum<BFloat16>, apply<BFloat16>},
                             {sum<Half>, apply<Half>}};
  return table;
}

}  // namespace gapkern::meanshift::GAPKERN_ISA

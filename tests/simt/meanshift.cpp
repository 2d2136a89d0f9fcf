#include "check.h"
#include "meanshift/kernels.cuh"

using namespace gapkern;
using namespace gapkern::meanshift;

template <class T, int pack>
void sums(const std::string& name, int64_t rows, int64_t columns) {
  const check::vector<T> x = check::random<T>(rows * columns);
  check::vector<double> truth(columns, 0.);
  for (int64_t i = 0; i < rows * columns; ++i) truth[i % columns] += double(to_wide(x[i]));
  const int64_t parts = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  check::kernel("sum_rows " + name, 1e-11, [&] {
    check::vector<double> partial = check::poisoned<double>(parts * columns), total(columns, 0.);
    const dim3 grid(unsigned((columns + kWarp * pack - 1) / (kWarp * pack)), unsigned(parts));
    simt::launch(grid, kSumWarps * kWarp, sum_rows<T, pack>, x.data(), rows, columns, partial.data());
    for (int64_t i = 0; i < parts * columns; ++i) total[i % columns] += partial[i];
    return check::error(total, truth, 1e-2);
  });
}

template <class T, int pack, bool normalize>
void applied(const std::string& name, double tolerance, int64_t rows, int64_t columns) {
  using A = typename Wide<T>::type;
  check::vector<T> x = check::random<T>(rows * columns);
  check::vector<A> shift = check::random<A>(columns);
  // A row that the shift takes to zero, where it must stay.
  for (int64_t c = 0; c < columns; ++c) {
    from_wide(-shift[c], &x[3 * columns + c]);
    shift[c] = -to_wide(x[3 * columns + c]);
  }
  check::vector<double> truth(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    double squared = 0;
    for (int64_t c = 0; c < columns; ++c) {
      truth[r * columns + c] = double(to_wide(x[r * columns + c])) + double(shift[c]);
      squared += truth[r * columns + c] * truth[r * columns + c];
    }
    for (int64_t c = 0; normalize && squared > 0 && c < columns; ++c) truth[r * columns + c] /= std::sqrt(squared);
  }
  check::kernel("apply_rows " + name, tolerance, [&] {
    check::vector<T> out = check::poisoned<T>(rows * columns);
    // Fewer blocks than rows: each warp takes several.
    simt::launch(2, kApplyWarps * kWarp, apply_rows<T, pack, normalize>, x.data(), rows, columns, shift.data(),
                 out.data());
    return check::error(out, truth, 1e-3);
  });
}

int main() {
  sums<float, 4>("float32, 16 bytes at a time", 1100, 264);
  sums<BFloat16, 8>("bfloat16, 16 bytes at a time", 300, 512);
  sums<Half, 1>("float16, ragged", 37, 101);
  sums<double, 1>("float64, one column", 5, 1);
  applied<float, 4, false>("float32", 1e-6, 37, 132);
  applied<float, 4, true>("float32, normalised", 2e-6, 37, 132);
  applied<float, 1, true>("float32, ragged", 2e-6, 19, 7);
  applied<BFloat16, 8, true>("bfloat16", 5e-3, 21, 64);
  applied<Half, 8, false>("float16", 1e-3, 21, 64);
  applied<double, 2, true>("float64", 1e-13, 21, 130);
  return check::result();
}

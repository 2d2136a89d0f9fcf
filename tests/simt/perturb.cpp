#include "check.h"
#include "perturb/kernels.cuh"

using namespace gapkern;
using namespace gapkern::perturb;

constexpr Stream kStream{0x0123456789abcdefull, 7, (int64_t(1) << 32) - 3};

// The Philox words of element (row, column), as philox.h defines them.
philox::Block words(int64_t row, int64_t column) {
  const int64_t r = kStream.first_row + row;
  return philox::block(uint32_t(column / 4), uint32_t(r), uint32_t(uint64_t(r) >> 32), kStream.trial, kStream.seed);
}

template <Law law, class T>
void noise(const std::string& name, int64_t rows, int64_t columns, bool packed) {
  using A = typename Wide<T>::type;
  const check::vector<T> x = check::random<T>(rows * columns);
  const A scale = A(0.37);
  check::vector<double> truth(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    float z[4];
    const int64_t column = i % columns;
    unit_noise<law>(words(i / columns, column), z, z + 1, z + 2, z + 3);
    T rounded;
    from_wide(to_wide(x[i]) + scale * A(z[column % 4]), &rounded);
    truth[i] = double(to_wide(rounded));
  }
  check::kernel("noise " + name, 0, [&] {
    check::vector<T> out = check::poisoned<T>(rows * columns);
    simt::launch(2, kThreads, over_blocks<AddNoise<law, T>>, rows, columns, kStream,
                 AddNoise<law, T>{x.data(), out.data(), scale, packed});
    return check::error(out, truth);
  });
}

// The shift and the noise one after the other, results rounded to T in between.
template <class T, bool packed>
void noisy(const std::string& name, double tolerance, int64_t rows, int64_t columns, bool normalize, bool noise_first,
           Law law) {
  using A = typename Wide<T>::type;
  check::vector<T> x = check::random<T>(rows * columns);
  check::vector<A> shift = check::random<A>(columns);
  // A row that the shift takes to zero, where it stays unless there is noise before.
  for (int64_t c = 0; c < columns; ++c) {
    from_wide(-shift[c], &x[3 * columns + c]);
    shift[c] = -to_wide(x[3 * columns + c]);
  }
  const A std = A(0.37);
  const auto rounded = [](double v) {
    T narrow;
    from_wide(A(v), &narrow);
    return double(to_wide(narrow));
  };
  check::vector<double> truth(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    double* row = &truth[r * columns];
    const auto add_noise = [&] {
      for (int64_t c = 0; c < columns; ++c) {
        float z[4];
        const philox::Block block = words(r, c);
        if (law == Law::gaussian)
          unit_noise<Law::gaussian>(block, z, z + 1, z + 2, z + 3);
        else
          unit_noise<Law::uniform>(block, z, z + 1, z + 2, z + 3);
        row[c] = rounded(double(A(row[c]) + std * A(z[c % 4])));
      }
    };
    for (int64_t c = 0; c < columns; ++c) row[c] = double(to_wide(x[r * columns + c]));
    if (noise_first) add_noise();
    double squared = 0;
    for (int64_t c = 0; c < columns; ++c) {
      row[c] = double(A(row[c]) + shift[c]);
      squared += row[c] * row[c];
    }
    for (int64_t c = 0; c < columns; ++c)
      row[c] = rounded(normalize && squared > 0 ? row[c] / std::sqrt(squared) : row[c]);
    if (!noise_first) add_noise();
  }
  check::kernel("shift and noise " + name, tolerance, [&] {
    check::vector<T> out = check::poisoned<T>(rows * columns);
    // Fewer blocks than rows: each warp takes several.
    simt::launch(2, kThreads, noisy_rows<T, packed>, x.data(), rows, columns, shift.data(), normalize, noise_first, law,
                 std, kStream, out.data());
    return check::error(out, truth, 1e-2);
  });
}

template <class T>
void quantised(const std::string& name, int64_t rows, int64_t columns, bool shared) {
  using A = typename Wide<T>::type;
  const check::vector<T> x = check::random<T>(rows * columns);
  check::vector<A> low(shared ? 1 : columns), high(low.size());
  for (size_t c = 0; c < low.size(); ++c) low[c] = A(-1 - 0.01 * double(c)), high[c] = A(1.5);
  check::vector<double> truth(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t c = shared ? 0 : i % columns;
    T rounded;
    from_wide(quantized(A(to_wide(x[i])), low[c], (high[c] - low[c]) / A(32), A(32)), &rounded);
    truth[i] = double(to_wide(rounded));
  }
  check::kernel("quantise " + name, 0, [&] {
    check::vector<T> out = check::poisoned<T>(rows * columns);
    simt::launch(3, kThreads, quantize_all<T, A>, x.data(), rows * columns, columns, low.data(), high.data(), shared,
                 A(32), out.data());
    return check::error(out, truth);
  });
}

int main() {
  noise<Law::gaussian, float>("gaussian float32, ragged", 33, 10, false);
  noise<Law::gaussian, float>("gaussian float32, packed", 33, 64, true);
  noise<Law::uniform, BFloat16>("uniform bfloat16, packed", 50, 48, true);
  noise<Law::uniform, double>("uniform float64, ragged", 20, 7, false);
  noisy<float, false>("float32, ragged", 0, 21, 10, false, false, Law::gaussian);
  noisy<float, true>("float32, packed, noise first", 0, 21, 136, false, true, Law::uniform);
  noisy<float, true>("float32, packed, normalised", 1e-5, 21, 136, true, false, Law::gaussian);
  noisy<float, false>("float32, ragged, normalised, noise first", 1e-5, 21, 131, true, true, Law::gaussian);
  noisy<BFloat16, true>("bfloat16, packed, noise first", 0, 21, 264, false, true, Law::gaussian);
  noisy<BFloat16, true>("bfloat16, packed, normalised", 1e-2, 21, 264, true, false, Law::gaussian);
  noisy<Half, true>("float16, packed, normalised, noise first", 2e-3, 21, 72, true, true, Law::uniform);
  noisy<Half, false>("float16, ragged", 0, 5, 3, false, false, Law::gaussian);
  noisy<double, true>("float64, packed, normalised, noise first", 1e-13, 21, 132, true, true, Law::gaussian);
  noisy<double, false>("float64, ragged", 0, 21, 6, false, false, Law::uniform);
  quantised<float>("float32, a range for each column", 40, 33, false);
  quantised<Half>("float16, one range", 17, 20, true);
  const int64_t rows = 30, columns = 13;
  check::vector<double> truth(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i)
    truth[i] = double(int32_t(words(i / columns, i % columns).word[i % columns % 4]));
  check::kernel("bits", 0, [&] {
    check::vector<int32_t> out = check::poisoned<int32_t>(rows * columns);
    simt::launch(1, kThreads, over_blocks<WriteBits>, rows, columns, kStream, WriteBits{out.data()});
    return check::error(check::vector<double>(out.begin(), out.end()), truth);
  });
  return check::result();
}

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
  const std::vector<T> x = check::random<T>(rows * columns);
  const A scale = A(0.37);
  std::vector<double> truth(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    float z[4];
    const int64_t column = i % columns;
    unit_noise<law>(words(i / columns, column), z, z + 1, z + 2, z + 3);
    T rounded;
    from_wide(to_wide(x[i]) + scale * A(z[column % 4]), &rounded);
    truth[i] = double(to_wide(rounded));
  }
  check::kernel("noise " + name, 0, [&] {
    std::vector<T> out = check::poisoned<T>(rows * columns);
    simt::launch(2, kThreads, over_blocks<AddNoise<law, T>>, rows, columns, kStream,
                 AddNoise<law, T>{x.data(), out.data(), scale, packed});
    return check::error(out, truth);
  });
}

template <class T>
void quantised(const std::string& name, int64_t rows, int64_t columns, bool shared) {
  using A = typename Wide<T>::type;
  const std::vector<T> x = check::random<T>(rows * columns);
  std::vector<A> low(shared ? 1 : columns), high(low.size());
  for (size_t c = 0; c < low.size(); ++c) low[c] = A(-1 - 0.01 * double(c)), high[c] = A(1.5);
  std::vector<double> truth(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t c = shared ? 0 : i % columns;
    T rounded;
    from_wide(quantized(A(to_wide(x[i])), low[c], (high[c] - low[c]) / A(32), A(32)), &rounded);
    truth[i] = double(to_wide(rounded));
  }
  check::kernel("quantise " + name, 0, [&] {
    std::vector<T> out = check::poisoned<T>(rows * columns);
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
  quantised<float>("float32, a range for each column", 40, 33, false);
  quantised<Half>("float16, one range", 17, 20, true);
  const int64_t rows = 30, columns = 13;
  std::vector<double> truth(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i)
    truth[i] = double(int32_t(words(i / columns, i % columns).word[i % columns % 4]));
  check::kernel("bits", 0, [&] {
    std::vector<int32_t> out = check::poisoned<int32_t>(rows * columns);
    simt::launch(1, kThreads, over_blocks<WriteBits>, rows, columns, kStream, WriteBits{out.data()});
    return check::error(std::vector<double>(out.begin(), out.end()), truth);
  });
  return check::result();
}

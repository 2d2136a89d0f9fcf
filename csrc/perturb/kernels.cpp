// Noise and quantisation of rows, compiled once per instruction set. The loops are plain: four arrays, one per word of
// the Philox blocks, so that the compiler turns each step into vector operations.
#include "perturb/kernels.h"

#include <algorithm>

#include "perturb/values.h"

namespace gapkern::perturb::GAPKERN_ISA {
namespace {

constexpr int kBlocks = 64;  // Philox blocks at a time: 256 columns

struct Words {
  uint32_t at[4][kBlocks];  // at[w][b]: word w of block first + b
};

void draw(int64_t row, int64_t first, int64_t count, uint64_t seed, uint32_t trial, Words& words) {
  const uint32_t low = uint32_t(row), high = uint32_t(uint64_t(row) >> 32);
  for (int64_t b = 0; b < count; ++b) {
    const philox::Block block = philox::block(uint32_t(first + b), low, high, trial, seed);
    for (int w = 0; w < 4; ++w) words.at[w][b] = block.word[w];
  }
}

void bits(int64_t rows, int64_t columns, uint64_t seed, uint32_t trial, int64_t first_row, int32_t* out) {
  Words words;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 4 * kBlocks) {
      const int64_t here = std::min<int64_t>(4 * kBlocks, columns - c);
      draw(first_row + r, c / 4, (here + 3) / 4, seed, trial, words);
      for (int64_t i = 0; i < here; ++i) out[r * columns + c + i] = int32_t(words.at[i % 4][i / 4]);
    }
}

template <Law law, class T>
void add_noise(const T* x, int64_t rows, int64_t columns, double scale, uint64_t seed, uint32_t trial,
               int64_t first_row, T* out) {
  Words words;
  float z[4][kBlocks];
  const T factor = T(scale);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 4 * kBlocks) {
      const int64_t at = r * columns + c, here = std::min<int64_t>(4 * kBlocks, columns - c), blocks = (here + 3) / 4;
      draw(first_row + r, c / 4, blocks, seed, trial, words);
      for (int64_t b = 0; b < blocks; ++b) {
        const philox::Block block{{words.at[0][b], words.at[1][b], words.at[2][b], words.at[3][b]}};
        unit_noise<law>(block, &z[0][b], &z[1][b], &z[2][b], &z[3][b]);
      }
      const int64_t whole = here / 4;
      for (int64_t b = 0; b < whole; ++b)
        for (int w = 0; w < 4; ++w) out[at + 4 * b + w] = x[at + 4 * b + w] + factor * T(z[w][b]);
      for (int64_t i = 4 * whole; i < here; ++i) out[at + i] = x[at + i] + factor * T(z[i % 4][i / 4]);
    }
}

template <class T>
void noise(const T* x, int64_t rows, int64_t columns, int law, double scale, uint64_t seed, uint32_t trial,
           int64_t first_row, T* out) {
  if (law == int(Law::gaussian))
    add_noise<Law::gaussian>(x, rows, columns, scale, seed, trial, first_row, out);
  else
    add_noise<Law::uniform>(x, rows, columns, scale, seed, trial, first_row, out);
}

template <class T>
void quantize(const T* x, int64_t rows, int64_t columns, const T* low, const T* width, int64_t bins, T* out) {
  const T count = T(bins);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[r * columns + c] = quantized(x[r * columns + c], low[c], width[c], count);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table{bits, noise<float>, noise<double>, quantize<float>, quantize<double>};
  return table;
}

}  // namespace gapkern::perturb::GAPKERN_ISA

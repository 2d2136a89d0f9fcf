// One perturbed value: the arithmetic that the CPU and CUDA implementations share.
#pragma once
#include <cstdint>

#include "common/philox.h"

namespace gapkern::perturb {

enum class Law : int { gaussian, uniform };

// Where the noise of a matrix starts in the stream.
struct Stream {
  uint64_t seed;
  uint32_t trial;
  int64_t first_row;
};

// The four values of one Philox block, of mean zero and unit variance.
template <Law law>
GAPKERN_HD void unit_noise(const philox::Block& block, float* z0, float* z1, float* z2, float* z3) {
  if (law == Law::gaussian) {
    philox::normals(block.word[0], block.word[1], z0, z1);
    philox::normals(block.word[2], block.word[3], z2, z3);
  } else {
    constexpr float sqrt3 = 1.7320508075688772f;
    *z0 = sqrt3 * philox::uniform(block.word[0]);
    *z1 = sqrt3 * philox::uniform(block.word[1]);
    *z2 = sqrt3 * philox::uniform(block.word[2]);
    *z3 = sqrt3 * philox::uniform(block.word[3]);
  }
}

// The centre of x's cell among `bins` (at most 2^24) cells of `width` above low.
template <class T>
GAPKERN_HD T quantized(T x, T low, T width, T bins) {
  T cell = (x - low) / width;
  cell = cell < T(0) ? T(0) : cell;
  cell = cell > bins - T(1) ? bins - T(1) : cell;
  const T index = cell == cell ? T(int32_t(cell)) : cell;
  const T centre = low + (index + T(0.5)) * width;
  return width > T(0) ? centre : x;
}

}  // namespace gapkern::perturb

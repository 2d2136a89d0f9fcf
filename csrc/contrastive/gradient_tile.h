// How a tile of dS is stored as the left operand of dX and of dY. Only for kernels_*.cpp.
#pragma once
#include "contrastive/tile.h"

namespace gapkern::contrastive {
namespace {

template <class T>
GAPKERN_INLINE void store_gradient(Plain<T>, const GradientOutput& out, const T* tile, int rows, int64_t cols,
                                   int64_t i0) {
  for (int r = 0; r < rows; ++r)
    std::memcpy(static_cast<T*>(out.by_rows) + (i0 + r) * row_stride(1), tile + r * kStripe, size_t(cols) * sizeof(T));
}

#if defined(GAPKERN_ISA_avx512bf16)
GAPKERN_INLINE void store_gradient(Bf16Products, const GradientOutput& out, const float* tile, int rows, int64_t cols,
                                   int64_t i0) {
  auto* across = static_cast<uint32_t*>(out.by_rows) + i0 * row_stride(2);
  for (int r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += 32) {
      const float* t = tile + r * kStripe + j;
      _mm512_storeu_si512(across + r * row_stride(2) + j / 2,
                          (__m512i)_mm512_cvtne2ps_pbh((__m512)load(t + 16), (__m512)load(t)));
    }
  static_assert(kRows <= 16, "a panel's step is one vector");
  constexpr __mmask16 panel = (1u << kRows) - 1;
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
  const __m512i interleave = _mm512_load_si512(order);
  for (int64_t j = 0; j < cols; j += kRows) {
    auto* down = static_cast<uint32_t*>(out.by_columns) + j / kRows * out.panel + i0 / 2 * kRows;
    for (int r = 0; r < rows; r += 2, down += kRows) {
      const float* t = tile + r * kStripe + j;
      const __m512 even = _mm512_maskz_loadu_ps(panel, t);
      const __m512 odd = r + 1 < rows ? _mm512_maskz_loadu_ps(panel, t + kStripe) : _mm512_setzero_ps();
      __builtin_prefetch(down + kRows / 2 * kRows, 1);
      _mm512_mask_storeu_epi32(down, panel,
                               _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
  }
}
#elif defined(GAPKERN_ISA_neonbf16)
GAPKERN_INLINE void store_gradient(Bf16Products, const GradientOutput& out, const float* tile, int rows, int64_t cols,
                                   int64_t i0) {
  auto* across = static_cast<uint32_t*>(out.by_rows) + i0 * row_stride(2);
  for (int r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += 8) {
      const float* t = tile + r * kStripe + j;
      vst1q_u32(across + r * row_stride(2) + j / 2, Bf16Products::along(load(t), load(t + 4)));
    }
  static_assert(kStripe % kRows == 0 && kRows % 4 == 0, "panels are whole, of whole vectors");
  for (int64_t j = 0; j < cols; j += kRows) {
    auto* down = static_cast<uint32_t*>(out.by_columns) + j / kRows * out.panel + i0 / 2 * kRows;
    for (int r = 0; r < rows; r += 2, down += kRows)
      for (int v = 0; v < kRows; v += 4) {
        const float* t = tile + r * kStripe + j + v;
        Bf16Products::pack(load(t), r + 1 < rows ? load(t + kStripe) : f32v{}, down + v);
      }
  }
}
#endif

}  // namespace
}  // namespace gapkern::contrastive

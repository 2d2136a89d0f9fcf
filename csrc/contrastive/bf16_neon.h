// Products of bfloat16 on 64-bit Arm (FEAT_BF16), and logits kept as 16-bit integers. Only for kernels_*.cpp compiled
// for neonbf16.
//
// bfmmla adds a 2 x 4 times 4 x 2 product to a 2 x 2 block: twice the arithmetic of a dot product per lane. Packed
// words hold two neighbours along the depth, so that two words of a row are one row of its operand.
#pragma once
#include <arm_neon.h>

#include "common/half.h"
#include "common/vec.h"

namespace gapkern::contrastive {
namespace {

GAPKERN_INLINE uint32_t bf16_bits(float x) {
  BFloat16 rounded;
  from_float(x, &rounded);
  return rounded.bits;
}

struct Bf16Products {
  using T = float;
  using Word = uint32_t;
  using V = f32v;
  static constexpr int group = 2;
  static constexpr bool whole_tiles = true;

  // c += A B over `depth` words, A(r, k) = a[r * kRowStep + k * kDepthStep].
  template <int kRowStep, int kDepthStep, int kRows, int kVectors>
  GAPKERN_INLINE void multiply_tile(const Word* a, const Word* b, int64_t depth, V (&c)[kRows][kVectors]) {
    static_assert(kRows % 2 == 0 && (kRowStep == 1 || kDepthStep == 1));
    constexpr int columns = kVectors * 4;
    float32x4_t blocks[kRows / 2][columns / 2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows / 2; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < columns / 2; ++j) blocks[r][j] = vdupq_n_f32(0);
    int64_t k = 0;
    for (; k + 2 <= depth; k += 2, a += 2 * kDepthStep, b += 2 * columns)
      step<kRowStep, kDepthStep, true>(a, b, blocks);
    if (k < depth) step<kRowStep, kDepthStep, false>(a, b, blocks);
#pragma GCC unroll 8
    for (int r = 0; r < kRows / 2; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const float32x4_t left = blocks[r][2 * v], right = blocks[r][2 * v + 1];
        c[2 * r][v] = (V)vcombine_f32(vget_low_f32(left), vget_low_f32(right));
        c[2 * r + 1][v] = (V)vcombine_f32(vget_high_f32(left), vget_high_f32(right));
      }
  }

  GAPKERN_INLINE Word word(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
  GAPKERN_INLINE void pack(V first, V second, Word* out) {
    const uint16x4_t low = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)first));
    const uint16x4_t high = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)second));
    vst1q_u32(out, vorrq_u32(vmovl_u16(low), vshll_n_u16(high, 16)));
  }
  GAPKERN_INLINE void pack_along(V first, V second, Word* out) { vst1q_u32(out, along(first, second)); }
  // Eight elements that follow each other, as four words.
  GAPKERN_INLINE uint32x4_t along(V first, V second) {
    const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)first);
    return vreinterpretq_u32_bf16(vcvtq_high_bf16_f32(low, (float32x4_t)second));
  }

 private:
  // Two words of the depth, or one and zeros.
  template <int kRowStep, int kDepthStep, bool kBoth, int kPairs, int kColumnPairs>
  GAPKERN_INLINE void step(const Word* a, const Word* b, float32x4_t (&blocks)[kPairs][kColumnPairs]) {
    bfloat16x8_t right[kColumnPairs];
#pragma GCC unroll 8
    for (int j = 0; j < kColumnPairs; j += 2) {
      const uint32x4_t first = vld1q_u32(b + 2 * j);
      const uint32x4_t second = kBoth ? vld1q_u32(b + 2 * kColumnPairs + 2 * j) : vdupq_n_u32(0);
      right[j] = vreinterpretq_bf16_u32(vzip1q_u32(first, second));
      right[j + 1] = vreinterpretq_bf16_u32(vzip2q_u32(first, second));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kPairs; ++r) {
      const bfloat16x8_t left = rows<kRowStep, kDepthStep, kBoth>(a + 2 * r * kRowStep);
#pragma GCC unroll 8
      for (int j = 0; j < kColumnPairs; ++j) blocks[r][j] = vbfmmlaq_f32(blocks[r][j], left, right[j]);
    }
  }

  // Two rows of the left operand: {row 0: words 0, 1; row 1: words 0, 1}.
  template <int kRowStep, int kDepthStep, bool kBoth>
  GAPKERN_INLINE bfloat16x8_t rows(const Word* a) {
    uint32x2_t upper, lower;
    if constexpr (kDepthStep == 1 && kBoth) {
      upper = vld1_u32(a);
      lower = vld1_u32(a + kRowStep);
    } else if constexpr (kDepthStep == 1) {
      upper = vset_lane_u32(a[0], vdup_n_u32(0), 0);
      lower = vset_lane_u32(a[kRowStep], vdup_n_u32(0), 0);
    } else {
      const uint32x2_t first = vld1_u32(a), second = kBoth ? vld1_u32(a + kDepthStep) : vdup_n_u32(0);
      upper = vzip1_u32(first, second);
      lower = vzip2_u32(first, second);
    }
    return vreinterpretq_bf16_u32(vcombine_u32(upper, lower));
  }
};

GAPKERN_INLINE void encode(const float* t, float per_unit, int64_t count, int16_t* codes) {
  for (int64_t j = 0; j < count; j += 4) {
    const int16x4_t code = vqmovn_s32(vcvtnq_s32_f32((float32x4_t)(load(t + j) * per_unit)));
    std::memcpy(codes + j, &code, size_t(count - j < 4 ? count - j : 4) * sizeof *codes);
  }
}

GAPKERN_INLINE void decode(const int16_t* codes, float unit, int64_t count, float* t) {
  for (int64_t j = 0; j < count; j += 4) {
    int16x4_t code = vdup_n_s16(0);
    std::memcpy(&code, codes + j, size_t(count - j < 4 ? count - j : 4) * sizeof *codes);
    store(t + j, (f32v)vcvtq_f32_s32(vmovl_s16(code)) * unit);
  }
}

}  // namespace
}  // namespace gapkern::contrastive

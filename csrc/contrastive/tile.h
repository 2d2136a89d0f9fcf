// The register tile of the contrastive kernels: each arithmetic, the product of one tile, a panel of logits. Only for
// kernels_*.cpp, which are compiled once per instruction set.
#pragma once
#include "common/vec.h"
#include "contrastive/kernels.h"

#if GAPKERN_VECTOR_BYTES == 64
#include <immintrin.h>
#elif defined(GAPKERN_ISA_neonbf16)
#include "contrastive/bf16_neon.h"
#endif

// This instruction set has products of bfloat16: Bf16Products.
#if defined(GAPKERN_ISA_avx512bf16) || defined(GAPKERN_ISA_neonbf16)
#define GAPKERN_BF16_PRODUCTS
#endif

namespace gapkern::contrastive {
namespace {

// mr x 2 accumulators, two operand vectors and one broadcast fill the register file; on 32 registers of 16 bytes fewer
// do, but they must divide the stripe, and bfmmla takes pairs of rows.
#if GAPKERN_VECTOR_BYTES == 64
constexpr int kRows = 14;
#elif defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;

// One arithmetic: how rows become packed words, and the multiply-add of a broadcast word and a vector, or with
// `whole_tiles` that of a whole tile.
template <class Real>
struct Plain {
  using T = Real;
  using Word = Real;
  using V = typename Vec<T>::type;
  using Operand = V;
  static constexpr int group = 1;
  static constexpr bool whole_tiles = false;
  GAPKERN_INLINE Operand operand(const Word* p) { return load(p); }
  GAPKERN_INLINE V multiply_add(V c, Word a, Operand b) { return c + a * b; }
  GAPKERN_INLINE V subtract_square(V c, Word a, Operand b) {
    const V difference = b - a;
    return c - difference * difference;
  }
  GAPKERN_INLINE Word word(T x, T) { return x; }
  // One vector of a packed depth step, from the row (or two rows) it is made of.
  GAPKERN_INLINE void pack(V first, V, Word* out) { store(out, first); }
  // A vector of words from the elements of one row that follow each other: `group` vectors of them.
  GAPKERN_INLINE void pack_along(V first, V, Word* out) { store(out, first); }
};

#if defined(GAPKERN_ISA_avx512bf16)
GAPKERN_INLINE uint32_t round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

struct Bf16Products {
  using T = float;
  using Word = uint32_t;
  using V = f32v;
  using Operand = __m512i;
  static constexpr int group = 2;
  static constexpr bool whole_tiles = false;
  GAPKERN_INLINE Operand operand(const Word* p) { return _mm512_loadu_si512(p); }
  GAPKERN_INLINE V multiply_add(V c, Word a, Operand b) {
    return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
  GAPKERN_INLINE Word word(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }
  GAPKERN_INLINE void pack(V first, V second, Word* out) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  GAPKERN_INLINE void pack_along(V first, V second, Word* out) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};
#endif

template <class E>
constexpr int kWidth = kVectors * Vec<typename E::T>::size;

enum class Result { assign, add };

// What a tile sums over the depth: a b, or -(a - b)^2.
enum class Term { product, difference };

// out [rows, cols] (=, +=) A B over `depth` words, A(r, k) = a[r * kRowStep + k * kDepthStep]. Rows beyond `rows` are
// read but not written.
template <class E, int kRowStep, int kDepthStep, Result kResult, Term kTerm = Term::product>
GAPKERN_INLINE void tile_product(const typename E::Word* a, const typename E::Word* b, int64_t depth,
                                 typename E::T* out, int64_t out_stride, int rows, int cols) {
  using T = typename E::T;
  using V = typename E::V;
  constexpr int lanes = Vec<T>::size;
  V c[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      c[r][v] = V{};
      if (kResult == Result::add) __builtin_prefetch(out + r * out_stride + v * lanes, 1);
    }
  if constexpr (E::whole_tiles)
    E::template multiply_tile<kRowStep, kDepthStep>(a, b, depth, c);
  else
    for (int64_t k = 0; k < depth; ++k) {
      const typename E::Operand b0 = E::operand(b), b1 = E::operand(b + lanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const typename E::Word ar = a[r * kRowStep];
        if constexpr (kTerm == Term::product) {
          c[r][0] = E::multiply_add(c[r][0], ar, b0);
          c[r][1] = E::multiply_add(c[r][1], ar, b1);
        } else {
          c[r][0] = E::subtract_square(c[r][0], ar, b0);
          c[r][1] = E::subtract_square(c[r][1], ar, b1);
        }
      }
      a += kDepthStep;
      b += kVectors * lanes;
    }
  if (rows == kRows && cols == kVectors * lanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        T* p = out + r * out_stride + v * lanes;
        store(p, kResult == Result::add ? load(p) + c[r][v] : c[r][v]);
      }
    return;
  }
  T edge[kRows][kVectors * lanes];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(&edge[r][v * lanes], c[r][v]);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cols; ++j)
      out[r * out_stride + j] = kResult == Result::add ? out[r * out_stride + j] + edge[r][j] : edge[r][j];
}

// Squares are summed over this much of the depth, then those sums: squares do not cancel, so that one long sum would
// round more than what is left of it.
constexpr int64_t kDepthOfSquares = 64;

template <class E>
GAPKERN_INLINE void distance_tile(const typename E::Word* a, const typename E::Word* b, int64_t depth,
                                  typename E::T* tile) {
  constexpr int nr = kWidth<E>;
  constexpr Term squares = Term::difference;
  const auto part = [&](int64_t k) { return depth - k < kDepthOfSquares ? depth - k : kDepthOfSquares; };
  tile_product<E, 1, kRows, Result::assign, squares>(a, b, part(0), tile, kStripe, kRows, nr);
  for (int64_t k = kDepthOfSquares; k < depth; k += kDepthOfSquares)
    tile_product<E, 1, kRows, Result::add, squares>(a + k * kRows, b + k * nr, part(k), tile, kStripe, kRows, nr);
}

// t of one row panel, which starts at row i0 of the block, against the stripe from column j0 on, a multiple of nr.
template <class E>
void logit_tile(const LogitBlock<typename E::T>& block, int64_t i0, typename E::T* tile, int64_t j0 = 0) {
  constexpr int nr = kWidth<E>;
  const int64_t words = (block.depth + E::group - 1) / E::group;
  const auto* a = static_cast<const typename E::Word*>(block.images) + i0 * words;
  const auto* b = static_cast<const typename E::Word*>(block.texts) + j0 * words;
  for (int64_t j = j0; j < block.cols; j += nr, b += nr * words) {
    if constexpr (E::group == 1)
      if (block.distances) {
        distance_tile<E>(a, b, words, tile + j);
        continue;
      }
    tile_product<E, 1, kRows, Result::assign>(a, b, words, tile + j, kStripe, kRows, nr);
  }
}

// The kernels that `of(E{})` gives for each arithmetic E of this instruction set.
template <template <class> class Kernels, class F>
constexpr KernelSet<Kernels> kernel_set(const F& of) {
#if defined(GAPKERN_BF16_PRODUCTS)
  return {of(Plain<float>{}), of(Plain<double>{}), true, of(Bf16Products{})};
#else
  return {of(Plain<float>{}), of(Plain<double>{}), false, {}};
#endif
}

}  // namespace
}  // namespace gapkern::contrastive

// The register tile of the contrastive kernels: the arithmetic of each engine, the product of one tile and of dS,
// packing. Only for kernels.cpp, which is compiled once per instruction set.
#pragma once
#include "common/vec.h"
#include "contrastive/kernels.h"

#if GAPKERN_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

namespace gapkern::contrastive {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// mr x 2 accumulators, two operand vectors and one broadcast fill the register file.
#if GAPKERN_VECTOR_BYTES == 64
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;

// The arithmetic of one engine: how rows become packed words, and the multiply-add of a broadcast word and a vector.
template <class Real>
struct Plain {
  using T = Real;
  using Word = Real;
  using V = typename Vec<T>::type;
  using Operand = V;
  static constexpr int group = 1;
  GAPKERN_INLINE Operand operand(const Word* p) { return load(p); }
  GAPKERN_INLINE V multiply_add(V c, Word a, Operand b) { return c + a * b; }
  GAPKERN_INLINE V subtract_square(V c, Word a, Operand b) {
    const V difference = b - a;
    return c - difference * difference;
  }
  GAPKERN_INLINE Word word(T x, T) { return x; }
  // One vector of a packed depth step, from the row (or pair of rows) it is made of.
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

struct Pairs {
  using T = float;
  using Word = uint32_t;
  using V = f32v;
  using Operand = __m512i;
  static constexpr int group = 2;
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

// Words between the rows, and between the depth steps, of a panel of dS that a product reads.
template <class E, bool kAlongRows>
struct Steps {
  static constexpr int row = kAlongRows ? row_stride(E::group) : 1;
  static constexpr int depth = kAlongRows ? 1 : E::group > 1 ? kRows : row_stride(1);
};

// Asks for one of `parts` parts of a panel that is needed next: the tiles before it take as long as its way to the
// first-level cache.
template <class E, bool kAlongRows>
GAPKERN_INLINE void fetch(const typename E::Word* panel, int64_t depth, int64_t part, int64_t parts) {
  using S = Steps<E, kAlongRows>;
  constexpr int64_t line = 64 / int64_t(sizeof *panel);
  const int64_t from = part * depth / parts, to = (part + 1) * depth / parts;
  for (int r = 0; r < (kAlongRows ? kRows : 1); ++r)
    for (int64_t k = from; k < to; k += kAlongRows ? line : 1) __builtin_prefetch(panel + r * S::row + k * S::depth);
}

template <class E, bool kAlongRows, Result kResult>
void product(const ProductBlock<typename E::T>& b) {
  using S = Steps<E, kAlongRows>;
  constexpr int nr = kWidth<E>;
  const auto* a = static_cast<const typename E::Word*>(b.a);
  const auto* slices = static_cast<const typename E::Word*>(b.slices);
  const int64_t tiles = (b.cols + nr - 1) / nr;
  for (int64_t i = 0; i < b.rows; i += kRows, a += b.panel) {
    const int rows = b.rows - i < kRows ? int(b.rows - i) : kRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (i + kRows < b.rows) fetch<E, kAlongRows>(a + b.panel, b.depth, tile, tiles);
      const int64_t j = tile * nr;
      tile_product<E, S::row, S::depth, kResult>(a, slices + j * b.depth, b.depth, b.c + i * b.c_stride + j, b.c_stride,
                                                 rows, b.cols - j < nr ? int(b.cols - j) : nr);
    }
  }
}

template <class E, bool kAlongRows>
void product(const ProductBlock<typename E::T>& b) {
  if (b.first)
    product<E, kAlongRows, Result::assign>(b);
  else
    product<E, kAlongRows, Result::add>(b);
}

template <class E>
double squared_norm(const typename E::T* x, const typename E::T* centre, int64_t depth) {
  using T = typename E::T;
  constexpr int lanes = Vec<T>::size;
  typename Vec<T>::type total[4] = {};
  int64_t d = 0;
  for (; d + 4 * lanes <= depth; d += 4 * lanes)
    for (int u = 0; u < 4; ++u) {
      auto v = load(x + d + u * lanes);
      if (centre != nullptr) v -= load(centre + d + u * lanes);
      total[u] += v * v;
    }
  double rest = sum<T>((total[0] + total[1]) + (total[2] + total[3]));
  for (; d < depth; ++d) {
    const double v = centre == nullptr ? x[d] : T(x[d] - centre[d]);
    rest += v * v;
  }
  return rest;
}

template <class E>
void pack_panel(const typename E::T* x, int64_t rows, int width, int64_t depth, void* packed) {
  using T = typename E::T;
  auto* out = static_cast<typename E::Word*>(packed);
  const auto value = [&](int64_t r, int64_t d) -> T { return r < rows && d < depth ? x[r * depth + d] : T(0); };
  constexpr int64_t lanes = Vec<T>::size;  // words at a time
  const int64_t words = (depth + E::group - 1) / E::group;
  for (int64_t k0 = 0; k0 < words; k0 += lanes)
    for (int r = 0; r < width; ++r) {
      if (r < rows && (k0 + lanes) * E::group <= depth) {
        const T* from = x + r * depth + k0 * E::group;
        typename E::Word packed_words[lanes];
        E::pack_along(load(from), load(from + (E::group - 1) * lanes), packed_words);
        for (int64_t k = 0; k < lanes; ++k) out[(k0 + k) * width + r] = packed_words[k];
        continue;
      }
      for (int64_t k = k0; k < words && k < k0 + lanes; ++k)
        out[k * width + r] = E::word(value(r, k * E::group), value(r, k * E::group + E::group - 1));
    }
}

template <class E>
void pack_slice(const typename E::T* x, int64_t rows, int64_t width, int64_t slice, const typename E::T* centre,
                void* packed) {
  using T = typename E::T;
  using V = typename E::V;
  constexpr int nr = kWidth<E>, lanes = Vec<T>::size;
  auto* out = static_cast<typename E::Word*>(packed);
  const int64_t d0 = slice * nr, cols = width - d0 < nr ? width - d0 : nr;
  const int64_t words = (rows + E::group - 1) / E::group;
  T shift[nr] = {};
  for (int64_t j = 0; centre != nullptr && j < cols; ++j) shift[j] = centre[d0 + j];
  for (int64_t k = 0; k < words; ++k, out += nr) {
    const T* first = x + k * E::group * width + d0;
    const bool both = k * E::group + E::group <= rows;
    if (cols == nr) {
      for (int j = 0; j < nr; j += lanes) {
        const V second = both ? load(first + (E::group - 1) * width + j) - load(shift + j) : V{};
        E::pack(load(first + j) - load(shift + j), second, out + j);
      }
      continue;
    }
    for (int64_t j = 0; j < nr; ++j) {
      const T low = j < cols ? first[j] - shift[j] : T(0);
      const T high = j < cols && both ? first[(E::group - 1) * width + j] - shift[j] : T(0);
      out[j] = E::word(low, high);
    }
  }
}

// All ones in the lanes of columns [j, j + size) that are below cols.
template <class T>
GAPKERN_INLINE auto lanes_below(int64_t j, int64_t cols) {
  T index[Vec<T>::size];
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = T(i);
  return load(index) < splat<T>(T(cols - j));
}

template <class T>
GAPKERN_INLINE auto lane_at(int64_t lane) {
  T index[Vec<T>::size];
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = T(i);
  return load(index) == splat<T>(T(lane));
}

// All ones in the lanes of columns [j, j + size) that are below cols and not the label.
template <class T>
GAPKERN_INLINE auto others(int64_t j, int64_t cols, int64_t label) {
  const bool here = label >= j && label < j + Vec<T>::size;
  return lanes_below<T>(j, cols) & ~lane_at<T>(here ? label - j : -1);
}

}  // namespace
}  // namespace gapkern::contrastive

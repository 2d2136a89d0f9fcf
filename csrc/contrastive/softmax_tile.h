// What the softmax kernels do with a tile of logits: exponentials, and keeping it. Only for kernels_*.cpp.
#pragma once
#include "contrastive/mask.h"
#include "contrastive/tile.h"

namespace gapkern::contrastive {
namespace {

template <Range kRange, class T, class V>
GAPKERN_INLINE V exponential(V t, const Exponents<T>& e) {
  return exp2_of_product<kRange == Range::shifted>(t, e.k, e.k_low, kRange == Range::shifted ? e.shift : T(0));
}

// The reference of exponents: the largest logit, or zero where there is none.
template <class V>
GAPKERN_INLINE V finite_reference(V largest, V lowest) {
  return largest == lowest ? V{} : largest;
}

// Copies by non-temporal stores, where there are any: the copy is read in the backward pass, from memory.
template <class T>
GAPKERN_INLINE void stream(T* to, const T* from, int64_t count) {
#if GAPKERN_VECTOR_BYTES == 64
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && count % Vec<T>::size == 0) {
    for (int64_t j = 0; j < count; j += Vec<T>::size)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), (__m512i)load(from + j));
    return;
  }
#endif
  std::memcpy(to, from, size_t(count) * sizeof(T));
}

#if defined(GAPKERN_ISA_avx512bf16)
GAPKERN_INLINE void encode(const float* t, float per_unit, int64_t count, int16_t* codes) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m256i code = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(load(t + j) * per_unit)));
    if (count - j < 16)
      std::memcpy(codes + j, &code, size_t(count - j) * sizeof *codes);
    else if (reinterpret_cast<uintptr_t>(codes + j) % 32 == 0)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(codes + j), code);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j), code);
  }
}

GAPKERN_INLINE void decode(const int16_t* codes, float unit, int64_t count, float* t) {
  for (int64_t j = 0; j < count; j += 16) {
    __m256i code{};
    if (count - j < 16)
      std::memcpy(&code, codes + j, size_t(count - j) * sizeof *codes);
    else
      code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j));
    __builtin_prefetch(codes + j + kRows * count);
    store(t + j, (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(code)) * unit);
  }
}
#endif

template <class E>
GAPKERN_INLINE void keep(const KeptBlock<typename E::T>& kept, int64_t cols, const typename E::T* tile, int rows,
                         int64_t i0) {
  if (kept.t != nullptr)
    for (int r = 0; r < rows; ++r) stream(kept.t + (i0 + r) * cols, tile + r * kStripe, cols);
  if constexpr (E::group > 1)
    if (kept.codes != nullptr)
      for (int r = 0; r < rows; ++r) encode(tile + r * kStripe, 1 / kept.unit, cols, kept.codes + (i0 + r) * cols);
}

// Decodes the rows of a panel, where they are kept as codes.
template <class E>
GAPKERN_INLINE void decode(const KeptBlock<const typename E::T>& kept, int64_t cols, typename E::T* tile, int rows,
                           int64_t i0) {
  if constexpr (E::group > 1)
    for (int r = 0; kept.codes != nullptr && r < rows; ++r)
      decode(kept.codes + (i0 + r) * cols, kept.unit, cols, tile + r * kStripe);
}

// The first `count` lanes of a vector: past the last row of an allocation nothing may be read.
template <class T>
GAPKERN_INLINE auto load_first(const T* p, int64_t count) {
  T lanes[Vec<T>::size] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(T));
  return load(lanes);
}

// Of dS t and of dS.
struct GradientSums {
  double of_scale = 0, of_all = 0;

  // Adds row i's sums, and sets dS at its label, a column of the stripe or -1.
  template <class Block, class T, class V>
  [[gnu::always_inline]] void end_row(const Block& b, int64_t i, int64_t label, T* out, V of_t, V of_row) {
    T row = sum<T>(of_row);
    of_scale += sum<T>(of_t);
    of_all += row;
    if (label >= 0) {
      const T d = b.label_gradient[i];
      out[label] = d;
      row += d;
      if (d != 0) of_scale += double(d) * b.label_t[i];
      of_all += d;
      if (b.column_sum != nullptr) b.column_sum[label] += d;
    }
    if (b.row_sum != nullptr) b.row_sum[i] = row;
  }
};

// A row of dS = (row weight + column weight) exp2(k t), without its label.
template <Range kRange, class T>
class GradientRow {
 public:
  using V = typename Vec<T>::type;
  struct Lanes {
    V d, of_scale;  // dS, and dS t
  };

  [[gnu::always_inline]] GradientRow(const GradientBlock<T>& b, int64_t i)
      : b_(b),
        weight_(splat<T>(b.row_weight[i])),
        reference_(splat<T>(kTracked ? b.row_reference[i] : T(0))),
        log2_(splat<T>(kTracked ? b.row_log2[i] : T(0))),
        others_(b.cols, b.label + i, 1) {}

  // From column j on; t is the row's.
  [[gnu::always_inline]] Lanes at(const T* t, int64_t j) const {
    const T k = b_.exponents.k;
    const bool edge = j + Vec<T>::size > b_.cols;
    const V value = edge ? load_first(t + j, b_.cols - j) : load(t + j), column = load(b_.column_weight + j);
    V d;
    if (kTracked)
      d = weight_ * exp2((value - reference_) * k - log2_) +
          column * exp2((value - load(b_.column_reference + j)) * k - load(b_.column_log2 + j));
    else
      d = exponential<kRange>(value, b_.exponents) * (weight_ + column);
    V product = d * value;
    if (others_.partial(j)) {
      const auto counted = others_.lanes(j, 0);
      d = counted ? d : V{};
      product = counted ? product : V{};
    }
    return {d, product};
  }

 private:
  static constexpr bool kTracked = kRange == Range::tracked;

  const GradientBlock<T>& b_;
  const V weight_, reference_, log2_;
  const AllButLabel<T> others_;
};

}  // namespace
}  // namespace gapkern::contrastive

// Register-tile GEMM with the softmax statistics and the logit gradient fused behind it; compiled once per instruction
// set. A block of logits lives in a tile of mr x stripe values in the first-level cache and is never written out whole.
#include "contrastive/tile.h"

namespace gapkern::contrastive {
namespace {

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

// t of one row panel, which starts at row i0 of the block, against the stripe.
template <class E>
void logit_tile(const LogitBlock<typename E::T>& block, int64_t i0, typename E::T* tile) {
  constexpr int nr = kWidth<E>;
  const int64_t words = (block.depth + E::group - 1) / E::group;
  const auto* a = static_cast<const typename E::Word*>(block.images) + i0 * words;
  const auto* b = static_cast<const typename E::Word*>(block.texts);
  for (int64_t j = 0; j < block.cols; j += nr, b += nr * words) {
    if constexpr (E::group == 1)
      if (block.distances) {
        distance_tile<E>(a, b, words, tile + j);
        continue;
      }
    tile_product<E, 1, kRows, Result::assign>(a, b, words, tile + j, kStripe, kRows, nr);
  }
}

template <Range kRange, class T, class V>
GAPKERN_INLINE V exponential(V t, const Exponents<T>& e) {
  return exp2_of_product<kRange == Range::shifted>(t, e.k, e.k_low, kRange == Range::shifted ? e.shift : T(0));
}

// The vectors with a lane that does not count for `rows` rows, the first of which has this label.
template <class T>
struct Partial {
  int64_t first, last, end;
  Partial(int64_t cols, int64_t label, int rows)
      : first(label - Vec<T>::size), last(label + rows), end(cols - Vec<T>::size) {}
  bool at(int64_t j) const { return j > end || (j > first && j < last); }
};

// A known number of rows keeps their sums in registers.
template <Range kRange, class T, int kKnown>
GAPKERN_INLINE void sum_exponentials(const ForwardBlock<T>& b, const T* tile, int some, int64_t i0) {
  using V = typename Vec<T>::type;
  const int rows = kKnown ? kKnown : some;
  const int64_t label = b.label + i0;
  const Partial<T> partial(b.cols, label, rows);
  V row_sum[kRows] = {};
  for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
    V column = load(b.column_sum + j);
    if (partial.at(j)) {
      for (int r = 0; r < rows; ++r) {
        const V e = exponential<kRange>(load(tile + r * kStripe + j), b.exponents);
        const V counted = others<T>(j, b.cols, label + r) ? e : V{};
        row_sum[r] += counted;
        column += counted;
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const V e = exponential<kRange>(load(tile + r * kStripe + j), b.exponents);
        row_sum[r] += e;
        column += e;
      }
    }
    store(b.column_sum + j, column);
  }
  for (int r = 0; r < rows; ++r) b.row_sum[i0 + r] = sum<T>(row_sum[r]);
}

// What exponents are taken relative to: the largest logit, or zero where there is none.
template <class V>
GAPKERN_INLINE V finite_reference(V largest, V lowest) {
  return largest == lowest ? V{} : largest;
}

template <class T>
GAPKERN_INLINE void sum_exponentials_tracked(const ForwardBlock<T>& b, T* tile, int rows, int64_t i0) {
  using V = typename Vec<T>::type;
  const V lowest = splat<T>(T(-__builtin_inf()));
  const T sign = b.exponents.k < 0 ? T(-1) : T(1), k = b.exponents.k * sign;
  V row_sum[kRows] = {};
  V row_reference[kRows];
  for (int r = 0; r < rows; ++r) {
    V best = lowest;
    const int64_t label = b.label + i0 + r;
    const Partial<T> partial(b.cols, label, 1);
    for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
      V t = load(tile + r * kStripe + j) * sign;
      if (partial.at(j)) t = others<T>(j, b.cols, label) ? t : lowest;
      store(tile + r * kStripe + j, t);
      best = best < t ? t : best;
    }
    b.row_largest[i0 + r] = largest<T>(best);
    row_reference[r] = finite_reference(splat<T>(b.row_largest[i0 + r]), lowest);
  }
  for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
    const V before = load(b.column_largest + j);
    V best = before;
    for (int r = 0; r < rows; ++r) {
      const V t = load(tile + r * kStripe + j);
      best = best < t ? t : best;
    }
    const V reference = finite_reference(best, lowest);
    V column = load(b.column_sum + j) * exp2((before - reference) * k);
    for (int r = 0; r < rows; ++r) {
      const V t = load(tile + r * kStripe + j);
      column += exp2((t - reference) * k);
      row_sum[r] += exp2((t - row_reference[r]) * k);
    }
    store(b.column_largest + j, best);
    store(b.column_sum + j, column);
  }
  for (int r = 0; r < rows; ++r) b.row_sum[i0 + r] = sum<T>(row_sum[r]);
}

template <Range kRange, class T>
GAPKERN_INLINE void sum_exponentials(const ForwardBlock<T>& b, const T* tile, int rows, int64_t i0) {
  if (rows == kRows)
    sum_exponentials<kRange, T, kRows>(b, tile, rows, i0);
  else
    sum_exponentials<kRange, T, 0>(b, tile, rows, i0);
}

// Copies what nobody reads before the backward pass: past the caches, where there is an instruction for it.
template <class T>
GAPKERN_INLINE void put_away(T* to, const T* from, int64_t count) {
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
void forward(const ForwardBlock<typename E::T>& b) {
  using T = typename E::T;
  alignas(64) T tile[kRows * kStripe];
  for (int64_t j = 0; j < kStripe; ++j) {
    b.column_sum[j] = T(0);
    if (b.exponents.range == Range::tracked) b.column_largest[j] = T(-__builtin_inf());
  }
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    logit_tile<E>(b, i0, tile);
    for (int r = 0; r < rows; ++r) {
      const int64_t label = b.label + i0 + r;
      if (label >= 0 && label < b.cols) b.positive[i0 + r] = tile[r * kStripe + label];
    }
    if (b.keep != nullptr)
      for (int r = 0; r < rows; ++r) put_away(b.keep + (i0 + r) * b.cols, tile + r * kStripe, b.cols);
    if constexpr (E::group > 1)
      if (b.codes != nullptr)
        for (int r = 0; r < rows; ++r) encode(tile + r * kStripe, 1 / b.unit, b.cols, b.codes + (i0 + r) * b.cols);
    if (b.exponents.range == Range::tracked)
      sum_exponentials_tracked(b, tile, rows, i0);
    else if (b.exponents.range == Range::shifted)
      sum_exponentials<Range::shifted>(b, tile, rows, i0);
    else
      sum_exponentials<Range::normal>(b, tile, rows, i0);
  }
#if GAPKERN_VECTOR_BYTES == 64
  _mm_sfence();  // what was written past the caches is there for whoever comes after
#endif
}

// The last vector of a row, of which some lanes are another row's, or nobody's.
template <class T>
GAPKERN_INLINE auto load_some(const T* p, int64_t count) {
  T lanes[Vec<T>::size] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(T));
  return load(lanes);
}

// Of dS t and of dS.
struct GradientSums {
  double of_scale = 0, of_all = 0;
};

// Turns t, which lies in rows of `stride`, into a tile of dS.
template <Range kRange, class T>
GAPKERN_INLINE GradientSums logit_gradient(const GradientBlock<T>& b, const T* logits, int64_t stride, T* tile,
                                           int rows, int64_t i0) {
  using V = typename Vec<T>::type;
  constexpr bool kTracked = kRange == Range::tracked;
  const T k = b.exponents.k;
  GradientSums sums;
  for (int r = 0; r < rows; ++r) {
    const T* t = logits + r * stride;
    T* const out = tile + r * kStripe;
    const int64_t label = b.label + i0 + r;
    const bool labelled = label >= 0 && label < b.cols;
    const V weight = splat<T>(b.row_weight[i0 + r]);
    const V reference = splat<T>(kTracked ? b.row_reference[i0 + r] : T(0));
    const V log2 = splat<T>(kTracked ? b.row_log2[i0 + r] : T(0));
    const Partial<T> partial(b.cols, label, 1);
    V dot{}, row{};
    for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
      const bool edge = j + Vec<T>::size > b.cols;
      const V value = edge ? load_some(t + j, b.cols - j) : load(t + j), column = load(b.column_weight + j);
      V d;
      if (kTracked)
        d = weight * exp2((value - reference) * k - log2) +
            column * exp2((value - load(b.column_reference + j)) * k - load(b.column_log2 + j));
      else
        d = exponential<kRange>(value, b.exponents) * (weight + column);
      V product = d * value;
      if (partial.at(j)) {
        const auto counted = others<T>(j, b.cols, label);
        d = counted ? d : V{};
        product = counted ? product : V{};
      }
      dot += product;
      row += d;
      if (b.column_sum != nullptr) store(b.column_sum + j, load(b.column_sum + j) + d);
      store(out + j, d);
    }
    T row_total = sum<T>(row);
    sums.of_scale += sum<T>(dot);
    sums.of_all += row_total;
    if (labelled) {
      const T d = b.label_gradient[i0 + r];
      out[label] = d;
      row_total += d;
      sums.of_scale += double(d) * b.label_t[i0 + r];
      sums.of_all += d;
      if (b.column_sum != nullptr) b.column_sum[label] += d;
    }
    if (b.row_sum != nullptr) b.row_sum[i0 + r] = row_total;
  }
  return sums;
}

template <class T>
GAPKERN_INLINE void emit(Plain<T>, const GradientOutput& out, const T* tile, int rows, int64_t cols, int64_t i0) {
  for (int r = 0; r < rows; ++r)
    std::memcpy(static_cast<T*>(out.by_rows) + (i0 + r) * row_stride(1), tile + r * kStripe, size_t(cols) * sizeof(T));
}

#if defined(GAPKERN_ISA_avx512bf16)
GAPKERN_INLINE void emit(Pairs, const GradientOutput& out, const float* tile, int rows, int64_t cols, int64_t i0) {
  auto* across = static_cast<uint32_t*>(out.by_rows) + i0 * row_stride(2);
  for (int r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += 32) {
      const float* t = tile + r * kStripe + j;
      _mm512_storeu_si512(across + r * row_stride(2) + j / 2,
                          (__m512i)_mm512_cvtne2ps_pbh((__m512)load(t + 16), (__m512)load(t)));
    }
  static_assert(kRows <= 16, "a panel's step is one vector");
  constexpr __mmask16 panel = (1u << kRows) - 1;
  alignas(64) uint16_t pairs[32];
  for (int i = 0; i < 32; ++i) pairs[i] = uint16_t(i / 2 + i % 2 * 16);
  const __m512i interleave = _mm512_load_si512(pairs);
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
#endif

template <class E>
void gradient(const GradientBlock<typename E::T>& b) {
  using T = typename E::T;
  alignas(64) T tile[kRows * kStripe];
  if (b.column_sum != nullptr)
    for (int64_t j = 0; j < kStripe; ++j) b.column_sum[j] = T(0);
  GradientSums all;
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    if (b.kept == nullptr && b.codes == nullptr) logit_tile<E>(b, i0, tile);
    if constexpr (E::group > 1)
      for (int r = 0; b.codes != nullptr && r < rows; ++r)
        decode(b.codes + (i0 + r) * b.cols, b.unit, b.cols, tile + r * kStripe);
    const T* const t = b.kept == nullptr ? tile : b.kept + i0 * b.cols;
    const int64_t stride = b.kept == nullptr ? kStripe : b.cols;
    const Range range = b.exponents.range;
    const GradientSums sums = range == Range::tracked   ? logit_gradient<Range::tracked>(b, t, stride, tile, rows, i0)
                              : range == Range::shifted ? logit_gradient<Range::shifted>(b, t, stride, tile, rows, i0)
                                                        : logit_gradient<Range::normal>(b, t, stride, tile, rows, i0);
    all.of_scale += sums.of_scale;
    all.of_all += sums.of_all;
    if (b.out.by_rows != nullptr) emit(E{}, b.out, tile, rows, b.cols, i0);
  }
  *b.out.scale_sum = all.of_scale;
  *b.sum = all.of_all;
}

// log(1 + u) for u in [0, 1], to full relative precision: 2 artanh(u / (2 + u)), whose series in z^2 <= 1/9 is short.
template <class T>
GAPKERN_INLINE typename Vec<T>::type log1p(typename Vec<T>::type u) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const auto z = u / (u + T(2)), z2 = z * z;
  auto p = splat<T>(T(1) / T(2 * terms - 1));
#pragma GCC unroll 17
  for (int i = terms - 2; i >= 0; --i) p = p * z2 + T(1) / T(2 * i + 1);
  return p * (z + z);
}

// e^x for x <= 0; zero below the normal range.
template <class T>
GAPKERN_INLINE typename Vec<T>::type exp_of_negative(typename Vec<T>::type x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T log2e = T(1.4426950408889634074), low = T(single ? 1.92596303e-8 : 2.0355273740931033e-17);
  constexpr T least = T(single ? -87.33 : -708.39);
  const auto e = exp2_of_product<false>(at_least(x, splat<T>(least)), log2e, low, T(0));
  return x < least ? decltype(e){} : e;
}

template <class E>
void sigmoid(const SigmoidBlock<typename E::T>& b) {
  using T = typename E::T;
  using V = typename Vec<T>::type;
  alignas(64) T tile[kRows * kStripe];
  double loss = 0, bias_sum = 0, scale_sum = 0;
  for (int64_t i0 = 0; i0 < b.rows; i0 += kRows) {
    const int rows = b.rows - i0 < kRows ? int(b.rows - i0) : kRows;
    logit_tile<E>(b, i0, tile);
    for (int r = 0; r < rows; ++r) {
      T* t = tile + r * kStripe;
      const int64_t label = b.label + i0 + r;
      const bool labelled = label >= 0 && label < b.cols;
      const T label_t = labelled ? t[label] : T(0);
      const Partial<T> partial(b.cols, label, 1);
      V row_loss{}, row{}, dot{};
      for (int64_t j = 0; j < b.cols; j += Vec<T>::size) {
        const V value = load(t + j), l = value * b.scale + b.bias;
        const V u = exp_of_negative<T>(l < V{} ? l : -l);
        V softplus = at_least(l, V{}) + log1p<T>(u);
        V d = (l < V{} ? u : splat<T>(T(1))) / (u + T(1));
        V product = d * value;
        if (partial.at(j)) {
          const auto counted = others<T>(j, b.cols, label);
          softplus = counted ? softplus : V{};
          d = counted ? d : V{};
          product = counted ? product : V{};
        }
        row_loss += softplus;
        row += d;
        dot += product;
        store(t + j, d);
      }
      loss += sum<T>(row_loss);
      bias_sum += sum<T>(row);
      scale_sum += sum<T>(dot);
      if (labelled) {
        const T l = label_t * b.scale + b.bias;
        const V u = exp_of_negative<T>(splat<T>(l < 0 ? l : -l));
        const V minus = (l < 0 ? splat<T>(T(1)) : u) / (u + T(1));  // sigmoid(-l)
        t[label] = -minus[0];
        loss += double(l < 0 ? -l : T(0)) + log1p<T>(u)[0];
        bias_sum -= minus[0];
        scale_sum -= double(minus[0]) * label_t;
      }
    }
    if (b.out.by_rows != nullptr) emit(E{}, b.out, tile, rows, b.cols, i0);
  }
  *b.loss_sum = loss;
  *b.bias_sum = bias_sum;
  *b.out.scale_sum = scale_sum;
}

template <class E>
constexpr Engine<typename E::T> engine() {
  static_assert(kStripe % kWidth<E> == 0, "a stripe holds whole panels");
  return {{kRows, kWidth<E>, E::group, int(sizeof(typename E::Word))},
          &squared_norm<E>,
          &pack_panel<E>,
          &pack_slice<E>,
          &forward<E>,
          &gradient<E>,
          &sigmoid<E>,
          &product<E, true>,
          &product<E, false>};
}

constexpr Engine<float> f32 = engine<Plain<float>>();
constexpr Engine<double> f64 = engine<Plain<double>>();
#if defined(GAPKERN_ISA_avx512bf16)
constexpr Engine<float> bf16 = engine<Pairs>();
constexpr EngineSet set{&f32, &f64, &bf16};
#else
constexpr EngineSet set{&f32, &f64, nullptr};
#endif

}  // namespace

namespace GAPKERN_ISA {
const EngineSet& engines() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

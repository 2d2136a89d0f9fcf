// The products of dS with the embeddings, and how operands are packed; compiled once per instruction set.
#include "contrastive/tile.h"

namespace gapkern::contrastive {
namespace {

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

constexpr auto set = kernel_set<ProductKernels>([](auto arithmetic) {
  using E = decltype(arithmetic);
  static_assert(kStripe % kWidth<E> == 0, "a stripe holds whole panels");
  return ProductKernels<typename E::T>{{kRows, kWidth<E>, E::group, int(sizeof(typename E::Word))},
                                       &squared_norm<E>,
                                       &pack_panel<E>,
                                       &pack_slice<E>,
                                       &product<E, true>,
                                       &product<E, false>};
});

}  // namespace

namespace GAPKERN_ISA {
const KernelSet<ProductKernels>& product_kernels() { return set; }
}  // namespace GAPKERN_ISA

}  // namespace gapkern::contrastive

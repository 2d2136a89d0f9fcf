// A chunk of logits on the host: arguments, tensors for partial sums, and dS allocated, for cuda.cu and classes.cu.
#pragma once
#include "common/cuda_host.h"
#include "contrastive/chunk.cuh"

namespace gapkern::contrastive {

inline int64_t tiles(int64_t count, int64_t per_tile) { return (count + per_tile - 1) / per_tile; }

struct ChunkArguments {
  Tensor products, row_norms, col_norms, scale;
  int64_t rows, columns, across, down;
  bool packed;
  dim3 grid() const { return dim3(unsigned(across), unsigned(down)); }
};

// All in the type of the arithmetic; norms are empty for the dot product.
inline ChunkArguments check_chunk(const Tensor& products, const Tensor& row_norms, const Tensor& col_norms,
                                  const Tensor& scale) {
  STD_TORCH_CHECK(products.dim() == 2 && products.numel() > 0, "products: expected a filled matrix");
  const ScalarType type = products.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "products: expected float32 or float64");
  ChunkArguments a{torch::stable::contiguous(products),
                   as_type(row_norms, type),
                   as_type(col_norms, type),
                   as_type(scale, type),
                   products.size(0),
                   products.size(1),
                   0,
                   0,
                   false};
  expect(products, a.scale, 1, "logit_scale");
  const bool norms = a.row_norms.numel() > 0;
  expect(products, a.row_norms, norms ? a.rows : 0, "row_norms");
  expect(products, a.col_norms, norms ? a.columns : 0, "col_norms");
  a.across = tiles(a.columns, kTileColumns);
  a.down = tiles(a.rows, kTileRows);
  STD_TORCH_CHECK(a.down <= 65535, "products: expected at most ", 65535 * kTileRows, " rows, got ", a.rows);
  a.packed = packs(a.products, a.columns);
  return a;
}

template <class R>
Chunk<R> chunk_of(const ChunkArguments& a) {
  const bool norms = a.row_norms.numel() > 0;
  return {a.products.const_data_ptr<R>(), norms ? a.row_norms.const_data_ptr<R>() : nullptr,
          norms ? a.col_norms.const_data_ptr<R>() : nullptr, a.rows, a.columns};
}

inline Tensor partials(const Tensor& like, int64_t tiles, int64_t count) {
  return torch::stable::new_empty(like, {tiles, count, 2}, ScalarType::Double);
}

// part [classes, tiles, count] of `partials` to log-sum-exps out [classes, count].
void combine(const Tensor& part, int64_t classes, int64_t tiles, int64_t count, Tensor& out);

// dS and the partial sums of its tiles, allocated.
struct ChunkGradient {
  Tensor ds, of_scale, rows, columns;
  template <class R>
  TileSums<R> sums() {
    const bool wanted = rows.numel() > 0;
    return {of_scale.mutable_data_ptr<double>(), wanted ? rows.mutable_data_ptr<R>() : nullptr,
            wanted ? columns.mutable_data_ptr<R>() : nullptr};
  }
};

inline ChunkGradient allocate(const ChunkArguments& a, const Tensor& like) {
  const Tensor& p = a.products;
  const bool norms = a.row_norms.numel() > 0;
  return {torch::stable::new_empty(p, {a.rows, a.columns}, like.scalar_type()),
          torch::stable::new_empty(p, {a.across * a.down}, ScalarType::Double),
          torch::stable::new_empty(p, {norms ? a.across : 0, a.rows}, p.scalar_type()),
          torch::stable::new_empty(p, {norms ? a.down : 0, a.columns}, p.scalar_type())};
}

// Calls f with null pointers to the type of the arithmetic and of the result.
template <class F>
void by_types(const Tensor& products, const Tensor& like, const F& f) {
  if (products.scalar_type() == ScalarType::Double) {
    STD_TORCH_CHECK(like.scalar_type() == ScalarType::Double, "like: expected float64 as products");
    return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  }
  STD_TORCH_CHECK(like.scalar_type() != ScalarType::Double, "like: expected a dtype no wider than products'");
  by_dtype(like, [&](auto* out) {
    using O = std::remove_pointer_t<decltype(out)>;
    if constexpr (!std::is_same_v<O, double>) f(static_cast<float*>(nullptr), out);
  });
}

}  // namespace gapkern::contrastive

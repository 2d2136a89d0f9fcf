// What the CPU operators accept, and the kernels that serve it.
#pragma once
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "common/allocator.h"
#include "common/dispatch.h"
#include "contrastive/contrastive.h"
#include "contrastive/kernels.h"

namespace gapkern::contrastive {

struct Arguments {
  Tensor images, texts;  // [N, D], [M, D]
  Similarity similarity;
  ScalarType type;     // of the arithmetic
  bool bf16_products;  // products of bfloat16, accumulated in float32
  double scale;
  int64_t label_offset;

  int64_t n() const { return images.size(0); }
  int64_t m() const { return texts.size(0); }
  Arguments in_double() const {
    Arguments a = *this;
    a.type = ScalarType::Double;
    a.bf16_products = false;
    return a;
  }
};

inline Arguments check(const Tensor& images, const Tensor& texts, const Tensor& logit_scale,
                       const std::string& similarity, int64_t label_offset, const std::string& precision) {
  STD_TORCH_CHECK(images.dim() == 2 && texts.dim() == 2, "images and texts: expected two dimensions, got ",
                  images.dim(), " and ", texts.dim());
  STD_TORCH_CHECK(images.size(1) == texts.size(1), "texts: expected D = ", images.size(1), " as in images, got ",
                  texts.size(1));
  STD_TORCH_CHECK(images.size(0) > 0 && texts.size(0) > 0 && images.size(1) > 0,
                  "images and texts: expected at least one row and one column");
  STD_TORCH_CHECK(images.scalar_type() == texts.scalar_type(), "texts: expected the dtype of images");
  STD_TORCH_CHECK(logit_scale.numel() == 1, "logit_scale: expected one element, got ", logit_scale.numel());
  Arguments a{.images = images, .texts = texts, .label_offset = label_offset};
  STD_TORCH_CHECK(parse_similarity(similarity, &a.similarity), "similarity: expected 'dot' or 'sqeuclidean', got '",
                  similarity, "'");
  STD_TORCH_CHECK(precision == "highest" || precision == "high" || precision == "medium",
                  "precision: expected 'highest', 'high' or 'medium', got '", precision, "'");
  const ScalarType dtype = images.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "images: expected float32, float64, bfloat16 or float16");
  a.type = arithmetic_type(images);
  const bool low = dtype == ScalarType::BFloat16 || (dtype == ScalarType::Float && precision == "medium");
  // They gain nothing where one side does not fill a register tile, and few rows average little of their rounding.
  const KernelSet<ProductKernels>& products = GAPKERN_FOR_ACTIVE_ISA(product_kernels);
  a.bf16_products =
      low && a.similarity == Similarity::dot && products.has_bf16 && std::min(a.n(), a.m()) >= products.bf16.shape.mr;
  a.scale = *as_type(logit_scale, ScalarType::Double).const_data_ptr<double>();
  return a;
}

template <class T>
Engine<T> engine_for(const Arguments& a) {
  const auto of = [&](const auto& kernels) {
    if constexpr (sizeof(T) == 8)
      return kernels.f64;
    else
      return a.bf16_products ? kernels.bf16 : kernels.f32;
  };
  return {of(GAPKERN_FOR_ACTIVE_ISA(product_kernels)), of(GAPKERN_FOR_ACTIVE_ISA(softmax_kernels)),
          of(GAPKERN_FOR_ACTIVE_ISA(classes_kernels)), of(GAPKERN_FOR_ACTIVE_ISA(sigmoid_kernels)),
          of(GAPKERN_FOR_ACTIVE_ISA(masked_sigmoid_kernels))};
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

inline int64_t item_bytes(ScalarType arithmetic) { return arithmetic == ScalarType::Double ? 8 : 4; }

// [rows, columns], uninitialised, from the caching allocator.
inline Tensor cached(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
  if (rows == 0) return empty(like, {0, columns}, type);
  const int64_t bytes = rows * columns * item_bytes(type);
  void* const memory = allocate(bytes);
  STD_TORCH_CHECK(memory != nullptr, "out of memory: no ", bytes, " bytes for ", rows, " x ", columns, " values");
  const std::array<int64_t, 2> sizes{rows, columns}, strides{columns, 1};
  return torch::stable::from_blob(memory, {sizes.data(), 2}, {strides.data(), 2}, like.device(), type, deallocate);
}

// The gradient of x, uninitialised, or an empty tensor where it is not wanted.
inline Tensor gradient_of(const Tensor& x, bool wanted, ScalarType type) {
  return wanted ? cached(x, x.size(0), x.size(1), type) : empty(x, {0}, type);
}

}  // namespace gapkern::contrastive

// One N x M problem on the CPU: its embeddings in the type of the arithmetic, its kernels, exponents and blocking.
#pragma once
#include <cmath>
#include <vector>

#include "contrastive/arguments.h"
#include "contrastive/blocking.h"
#include "contrastive/range.h"

namespace gapkern::contrastive {

template <class T>
struct Problem {
  explicit Problem(const Arguments& a, int64_t chunk_bytes = kChunkBytes)
      : engine(engine_for<T>(a)),
        images(as_type(a.images, a.type)),
        texts(as_type(a.texts, a.type)),
        x(images.template const_data_ptr<T>()),
        y(texts.template const_data_ptr<T>()),
        n(a.n()),
        m(a.m()),
        d(images.size(1)),
        scale(a.scale),
        label_offset(a.label_offset),
        distances(a.similarity == Similarity::sqeuclidean),
        centre(distances ? mean_of_texts() : std::vector<T>()),
        largest_t(measure()),
        blocking(engine.shape, n, m, d, chunk_bytes),
        range(a.scale, a.similarity, largest_t, bf16_products()) {}

  // Dot products of other factors than x and y, none of them larger.
  void bound_products(double largest) {
    largest_t = largest;
    range = ExponentRange<T>(scale, Similarity::dot, largest, bf16_products());
  }

  bool bf16_products() const { return engine.shape.group > 1; }
  const T* centre_or_null() const { return distances ? centre.data() : nullptr; }

  const Engine<T> engine;
  const Tensor images, texts;
  const T *const x, *const y;  // [n, d], [m, d]
  const int64_t n, m, d;
  const double scale;
  const int64_t label_offset;
  const bool distances;
  const std::vector<T> centre;  // [d]; distances only
  double largest_t;             // no |t| is larger
  const Blocking blocking;
  ExponentRange<T> range;

 private:
  // Distances are bounded, and their gradients 2 s (sum_j dS_ij y_j - x_i sum_j dS_ij) formed, about the texts' mean:
  // what all embeddings share cancels there.
  std::vector<T> mean_of_texts() const {
    std::vector<double> total(d, 0.);
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < d; ++c) total[c] += y[j * d + c];
    std::vector<T> mean(d);
    for (int64_t c = 0; c < d; ++c) mean[c] = T(total[c] / double(m));
    return mean;
  }

  double measure() const {
    const double largest_x = largest_squared_norm(x, n), largest_y = largest_squared_norm(y, m);
    if (!distances) return std::sqrt(largest_x * largest_y);
    const double reach = std::sqrt(largest_x) + std::sqrt(largest_y);
    return reach * reach;
  }

  // NaN where a row holds one.
  double largest_squared_norm(const T* side, int64_t rows) const {
    std::vector<double> largest(divide_up(rows, 64), 0.);
    const auto raise = [](double& to, double value) {
      if (!(value <= to)) to = value;
    };
    parallel(int64_t(largest.size()), [&](int64_t b) {
      for (int64_t i = b * 64; i < std::min(rows, b * 64 + 64); ++i)
        raise(largest[b], engine.squared_norm(side + i * d, centre_or_null(), d));
    });
    double all = 0;
    for (const double value : largest) raise(all, value);
    return all;
  }
};

}  // namespace gapkern::contrastive

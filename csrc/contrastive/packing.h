// Scratch memory, and the operands packed there: panels for the logits, slices for the gradients.
#pragma once
#include <torch/headeronly/macros/Macros.h>

#include <memory>

#include "common/allocator.h"
#include "contrastive/problem.h"

namespace gapkern::contrastive {

// Uninitialised, aligned to a cache line.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(allocate(bytes))) {
    STD_TORCH_CHECK(memory_ != nullptr, "contrastive_lse: out of memory, wanted ", bytes, " bytes of scratch");
  }
  bool empty() const { return memory_ == nullptr; }
  char* at(int64_t bytes = 0) const { return memory_.get() + bytes; }

 private:
  struct Free {
    void operator()(char* p) const { deallocate(p); }
  };
  std::unique_ptr<char, Free> memory_;
};

// The logits' operands: all texts, and the images of one chunk.
template <class T>
class LogitOperands {
 public:
  LogitOperands(const Problem<T>& problem, int64_t chunk)
      : p_(problem),
        row_bytes_(divide_up(p_.d, p_.engine.shape.group) * p_.engine.shape.word),
        images_(round_up(chunk, p_.engine.shape.mr) * row_bytes_) {}

  void pack_texts() {
    const int64_t nr = p_.engine.shape.nr;
    texts_ = Scratch(round_up(p_.m, nr) * row_bytes_);
    pack(p_.y, p_.m, nr, texts_);
  }
  void pack_images(const Chunk& c) { pack(p_.x + c.row0 * p_.d, c.rows, p_.engine.shape.mr, images_); }

  LogitBlock<T> block(const Chunk& c, const BlockIndex& at) const {
    const int64_t i0 = at.block * p_.blocking.block, column0 = at.stripe * p_.blocking.stripe;
    return {.images = images_.at(i0 * row_bytes_),
            .texts = texts_.empty() ? nullptr : texts_.at(column0 * row_bytes_),
            .rows = std::min(p_.blocking.block, c.rows - i0),
            .cols = p_.blocking.stripe_columns(at.stripe),
            .depth = p_.d,
            .distances = p_.distances,
            .label = c.row0 + i0 + p_.label_offset - column0};
  }

 private:
  void pack(const T* side, int64_t rows, int64_t width, const Scratch& out) const {
    parallel(divide_up(rows, width), [&](int64_t panel) {
      const int64_t i = panel * width;
      p_.engine.pack_panel(side + i * p_.d, rows - i, int(width), p_.d, out.at(i * row_bytes_));
    });
  }

  const Problem<T>& p_;
  const int64_t row_bytes_;  // of a packed row
  Scratch images_, texts_;
};

// Slices of rows: right-hand sides of the gradients.
template <class T>
class Slices {
 public:
  explicit Slices(const Problem<T>& problem) : p_(problem) {}
  int64_t count() const { return divide_up(p_.d, p_.engine.shape.nr); }
  int64_t bytes(int64_t rows) const {
    const Shape& s = p_.engine.shape;
    return divide_up(rows, s.group) * s.nr * s.word;
  }
  // Slices [first, first + count) of `rows` rows of a side.
  void pack(const T* side, int64_t rows, int64_t first, int64_t count, char* out) const {
    for (int64_t i = 0; i < count; ++i)
      p_.engine.pack_slice(side, rows, p_.d, first + i, p_.centre_or_null(), out + i * bytes(rows));
  }

 private:
  const Problem<T>& p_;
};

}  // namespace gapkern::contrastive

// How an N x M problem is cut on the CPU: stripes of columns, blocks of rows, chunks of blocks that threads share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "contrastive/kernels.h"

namespace gapkern::contrastive {

inline constexpr int64_t kChunkBytes = int64_t(32) << 20;  // logit gradients of a chunk, at most
inline constexpr int64_t kPackedBytes = int64_t(8) << 20;  // packed rows of a chunk in the forward pass
inline constexpr int64_t kTogether = 4;                    // blocks that meet a stripe while it is in the cache

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

template <class F>
void parallel(int64_t count, const F& body) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Rows between two barriers of the threads.
struct Chunk {
  int64_t row0, rows, blocks;
};

// A block of a chunk and the stripe it meets.
struct BlockIndex {
  int64_t stripe, block;
};

struct Blocking {
  int64_t n, m;
  int64_t stripe, stripes;       // columns of a stripe, and how many there are
  int64_t block;                 // rows
  int64_t chunk, forward_chunk;  // rows at most

  Blocking(const Shape& shape, int64_t n, int64_t m, int64_t d, int64_t chunk_bytes) : n(n), m(m) {
    stripes = divide_up(m, m <= kNarrowUpTo ? kNarrowStripe : kStripe);
    stripe = round_up(divide_up(m, stripes), shape.nr);
    stripes = divide_up(m, stripe);
    block = shape.mr >= 12 ? shape.mr * 8 : shape.mr * 16;
    const int64_t all = round_up(n, shape.mr * 2), row_bytes = divide_up(d, shape.group) * shape.word;
    const int64_t fitting = chunk_bytes / (stripes * (kStripe + 16) * 4) / block;
    chunk = std::min(all, block * std::clamp<int64_t>(fitting, 1, 2 * kTogether));
    forward_chunk = std::max(chunk, std::min(all, kPackedBytes / row_bytes / block * block));
  }

  int64_t stripe_columns(int64_t t) const { return std::min(stripe, m - t * stripe); }

  // Calls f(Chunk) for all rows, at most `most` at a time.
  template <class F>
  void for_each_chunk(int64_t most, const F& f) const {
    for (int64_t row0 = 0; row0 < n; row0 += most) {
      const int64_t rows = std::min(most, n - row0);
      f(Chunk{.row0 = row0, .rows = rows, .blocks = divide_up(rows, block)});
    }
  }

  // All items(chunk) blocks of the chunk against every stripe in rasterisation order: kTogether blocks meet all stripes
  // before the next, so that both stay in the second-level cache.
  std::vector<BlockIndex> blocks(const Chunk& chunk) const {
    std::vector<BlockIndex> found;
    for (int64_t first = 0; first < chunk.blocks; first += kTogether)
      for (int64_t t = 0; t < stripes; ++t)
        for (int64_t b = first; b < std::min(first + kTogether, chunk.blocks); ++b)
          found.push_back({.stripe = t, .block = b});
    return found;
  }
  // Calls f(BlockIndex, item) in parallel for all of them.
  template <class F>
  void for_each_block(const Chunk& chunk, const F& f) const {
    const std::vector<BlockIndex> found = blocks(chunk);
    parallel(int64_t(found.size()), [&](int64_t item) { f(found[item], item); });
  }
  // Of a side with itself those that reach above the diagonal.
  std::vector<BlockIndex> blocks_above(const Chunk& chunk) const {
    std::vector<BlockIndex> found = blocks(chunk);
    std::erase_if(found,
                  [&](const BlockIndex& at) { return end_of_stripe(at.stripe) <= chunk.row0 + at.block * block; });
    return found;
  }
  int64_t end_of_stripe(int64_t t) const { return std::min((t + 1) * stripe, m); }
  int64_t items(const Chunk& chunk) const { return stripes * chunk.blocks; }
};

}  // namespace gapkern::contrastive

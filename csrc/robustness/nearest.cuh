// Nearest gallery rows on a device: squared distances about a centre in float32, in tiles, of which only each query's
// best two are kept. Scores are ||x||^2 - 2 <y, x> until the end, where the query's own norm joins them.
//
// A block has kTile queries and one of the parts the gallery is split into; a thread has eight queries by eight rows of
// each of its tiles. Slabs of kSlab columns are read into one half of shared memory while the other is multiplied.
// Ties go to the lowest row: a thread meets its rows in order, and merging compares rows of equal score. The least is
// the same for any order, so the result does not depend on the number of parts.
#pragma once
#include "common/cuda.cuh"

namespace gapkern::robustness {

inline constexpr int kTile = 128, kSlab = 8, kSide = 8, kAcross = kTile / kSide;
inline constexpr int kNearestThreads = kAcross * kAcross;
inline constexpr int kStride = kTile + 4;  // of a column in shared memory: no two lanes of a warp write one bank
inline constexpr int kNormWarps = 8, kNormBlocks = 256;
inline constexpr float kNever = std::numeric_limits<float>::infinity();
inline constexpr float kRounding = std::numeric_limits<float>::epsilon();
static_assert(2 * kTile == kNearestThreads && kSlab == 2 * 4, "a thread reads four columns of one row");

// The best two of the rows seen.
struct Found {
  float best, second;
  int32_t row;

  __device__ __forceinline__ void offer(float score, int32_t at) {
    second = score < best ? best : score < second ? score : second;
    row = score < best ? at : row;
    best = score < best ? score : best;
  }
  __device__ __forceinline__ void merge(const Found& other) {
    const bool theirs = other.best < best || (other.best == best && other.row < row);
    const float loser = theirs ? best : other.best;
    second = other.second < second ? other.second : second;
    second = loser < second ? loser : second;
    row = theirs ? other.row : row;
    best = theirs ? other.best : best;
  }
};

// norms[i] = ||x_i - centre||^2, a warp per row; largest[block] = the block's largest.
template <class T>
__global__ void __launch_bounds__(kNormWarps* kWarp)
    centred_norms(const T* x, int64_t rows, int64_t columns, const float* centre, float* norms, float* largest) {
  GAPKERN_SHARED(float, part, kNormWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float most = 0;
  for (int64_t r = blockIdx.x * int64_t(kNormWarps) + warp; r < rows; r += int64_t(gridDim.x) * kNormWarps) {
    float sum = 0;
    for (int64_t c = lane; c < columns; c += kWarp) {
      const float y = to_wide(x[r * columns + c]) - centre[c];
      sum += y * y;
    }
    sum = warp_sum(sum);
    if (lane == 0) norms[r] = sum;
    most = sum > most ? sum : most;
  }
  if (lane == 0) part[warp] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kNormWarps; ++w) most = part[w] > most ? part[w] : most;
  largest[blockIdx.x] = most;
}

// A thread's share of a slab on its way to shared memory: four columns of row threadIdx.x / 2.
template <class T, bool packed>
struct Share {
  float value[4];

  __device__ __forceinline__ void fetch(const T* x, int64_t first, int64_t rows, int64_t columns, int64_t slab,
                                        const float* centre) {
    const int64_t row = first + threadIdx.x / 2, column = slab + threadIdx.x % 2 * 4;
    for (int i = 0; i < 4; ++i) value[i] = 0;
    if (row >= rows || column >= columns) return;
    if (packed) {
      const Pack<T, 4> four = *reinterpret_cast<const Pack<T, 4>*>(x + row * columns + column);
      const Pack<float, 4> middle = *reinterpret_cast<const Pack<float, 4>*>(centre + column);
      for (int i = 0; i < 4; ++i) value[i] = to_wide(four.value[i]) - middle.value[i];
    } else {
      for (int i = 0; i < 4; ++i)
        if (column + i < columns) value[i] = to_wide(x[row * columns + column + i]) - centre[column + i];
    }
  }
  __device__ __forceinline__ void put(float* slab) const {
    float* to = slab + threadIdx.x % 2 * 4 * kStride + threadIdx.x / 2;
    for (int i = 0; i < 4; ++i) to[i * kStride] = value[i];
  }
};

// A thread's eight of a column in shared memory: two fours, kTile / 2 apart, so that lanes read neighbouring words.
__device__ __forceinline__ void eight(const float* column, int place, float (&v)[kSide]) {
  const Pack<float, 4> low = *reinterpret_cast<const Pack<float, 4>*>(column + place * 4);
  const Pack<float, 4> high = *reinterpret_cast<const Pack<float, 4>*>(column + kTile / 2 + place * 4);
  for (int i = 0; i < 4; ++i) v[i] = low.value[i], v[i + 4] = high.value[i];
}
__device__ __forceinline__ int place_of(int i, int place) { return (i < 4 ? 0 : kTile / 2 - 4) + place * 4 + i; }

// found [parts, Q], part blockIdx.y of the gallery's tiles; norms [G] are the gallery's.
template <class T, bool packed>
__global__ void __launch_bounds__(kNearestThreads)
    nearest_tiles(const T* queries, int64_t q, const T* gallery, int64_t g, int64_t columns, const float* centre,
                  const float* norms, Found* found) {
  GAPKERN_SHARED(float, ours, 2 * kSlab * kStride);
  GAPKERN_SHARED(float, theirs, 2 * kSlab * kStride);
  const int down = threadIdx.x / kAcross, across = threadIdx.x % kAcross;
  const int64_t first_query = blockIdx.x * int64_t(kTile);
  const int64_t tiles = (g + kTile - 1) / kTile, each = (tiles + gridDim.y - 1) / gridDim.y;
  const int64_t begin = blockIdx.y * each, end = begin + each < tiles ? begin + each : tiles;

  Found kept[kSide];
  for (Found& f : kept) f = {kNever, kNever, int32_t(begin * kTile)};
  float sum[kSide][kSide] = {};
  Share<T, packed> of_queries, of_gallery;
  int64_t tile = begin, slab = 0;
  int half = 0;
  if (tile < end) {
    of_queries.fetch(queries, first_query, q, columns, 0, centre);
    of_gallery.fetch(gallery, tile * kTile, g, columns, 0, centre);
    of_queries.put(ours);
    of_gallery.put(theirs);
  }
  __syncthreads();
  while (tile < end) {
    const bool last = slab + kSlab >= columns;
    const int64_t next_tile = last ? tile + 1 : tile, next_slab = last ? 0 : slab + kSlab;
    if (next_tile < end) {
      of_queries.fetch(queries, first_query, q, columns, next_slab, centre);
      of_gallery.fetch(gallery, next_tile * kTile, g, columns, next_slab, centre);
    }
    for (int k = 0; k < kSlab; ++k) {
      float a[kSide], b[kSide];
      eight(ours + (half * kSlab + k) * kStride, down, a);
      eight(theirs + (half * kSlab + k) * kStride, across, b);
      for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
    if (last) {
      for (int j = 0; j < kSide; ++j) {
        const int64_t row = tile * kTile + place_of(j, across);
        if (row >= g) continue;
        const float norm = norms[row];
        for (int i = 0; i < kSide; ++i) kept[i].offer(fmaf(-2.f, sum[i][j], norm), int32_t(row));
      }
      for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) sum[i][j] = 0;
    }
    half ^= 1;
    if (next_tile < end) {
      of_queries.put(ours + half * kSlab * kStride);
      of_gallery.put(theirs + half * kSlab * kStride);
    }
    __syncthreads();
    tile = next_tile, slab = next_slab;
  }

  // The kAcross threads that share eight queries are neighbouring lanes.
  for (int i = 0; i < kSide; ++i) {
    for (int o = kAcross / 2; o > 0; o /= 2) {
      const Found other{__shfl_xor_sync(kEveryLane, kept[i].best, o), __shfl_xor_sync(kEveryLane, kept[i].second, o),
                        __shfl_xor_sync(kEveryLane, kept[i].row, o)};
      kept[i].merge(other);
    }
    const int64_t query = first_query + place_of(i, down);
    if (across == 0 && query < q) found[blockIdx.y * q + query] = kept[i];
  }
}

// Over the parts of the gallery. margin: what rounding may have moved a difference of distances by, as
// gapkern/_search.py has it; largest [blocks] of the gallery's norms.
__global__ void nearest_combine(const Found* found, int64_t parts, int64_t q, const float* norms, const float* largest,
                                int blocks, int64_t* row, float* best, float* second, float* margin) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= q) return;
  Found all = found[i];
  for (int64_t p = 1; p < parts; ++p) all.merge(found[p * q + i]);
  float most = 0;
  for (int b = 0; b < blocks; ++b) most = largest[b] > most ? largest[b] : most;
  const float reach = sqrtf(norms[i]) + sqrtf(most);
  row[i] = all.row;
  best[i] = norms[i] + all.best;
  second[i] = norms[i] + all.second;
  margin[i] = 8 * kRounding * reach * reach;
}

}  // namespace gapkern::robustness

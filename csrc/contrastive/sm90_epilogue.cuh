// The epilogue of the Hopper products, written for CUTLASS's cooperative kernel in place of a visitor tree: it works on
// the accumulators in their registers, a warp on 16 x 256 of them, and no warp waits for another but to add up columns.
//
// Turns. Two warp groups share a tile and its stages. Were both in their epilogues at once, the tensor cores would
// idle; so the second group enters its own when the first has left: one multiplies, at the full rate, while the other
// is in its epilogue. The stages let the first run ahead by kStages steps of 64 dims, 2048 cycles of the tensor cores.
#pragma once
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/builders/sm90_common.inl>
#include <cutlass/pipeline/pipeline.hpp>

#include "contrastive/epilogue.cuh"
#include "contrastive/sm90_gemm.h"

namespace gapkern::contrastive::sm90 {

inline constexpr int kStages = 4, kDepth = 64;  // of the mainloop
inline constexpr int kGroupThreads = 128, kGroupWarps = 4, kGroups = kTileM / kPartRows;
inline constexpr int kWarpTileRows = 16, kBlocks = kTileN / 8;  // blocks of 8 columns
inline constexpr int kStoreColumns = 64, kStores = kTileN / kStoreColumns, kStoreBlocks = kStoreColumns / 8;
inline constexpr int kBuffers = 2;  // of kWarpTileRows x kStoreColumns, for a warp
inline constexpr unsigned kLanes = 0xffffffffu;

// Where a thread's accumulators lie: element (n, h, c) is in row + 8 h, column + 8 n + c.
struct Place {
  int warp, lane;  // of the eight warps that multiply
  int rows, columns, tile_row, tile_column;
  int row, column;
  CUTLASS_DEVICE Place(int thread, int all_rows, int all_columns, int m, int n)
      : warp(thread / 32),
        lane(thread % 32),
        rows(all_rows),
        columns(all_columns),
        tile_row(m),
        tile_column(n),
        row(m * kTileM + warp * kWarpTileRows + lane / 4),
        column(n * kTileN + lane % 4 * 2) {}
  CUTLASS_DEVICE int group() const { return warp / kGroupWarps; }
  // A vote, for a branch that the compiler knows to be uniform.
  CUTLASS_DEVICE bool inside() const {
    return __any_sync(kLanes, tile_row * kTileM < rows && tile_column * kTileN < columns);
  }
  CUTLASS_DEVICE int64_t padded_rows() const { return int64_t(rows + kTileM - 1) / kTileM * kTileM; }
  CUTLASS_DEVICE int64_t padded_columns() const { return int64_t(columns + kTileN - 1) / kTileN * kTileN; }
};

template <class Accumulators>
CUTLASS_DEVICE float& element(Accumulators& values, int n, int h, int c) {
  return values(4 * n + 2 * h + c);
}

// Some of a thread's elements: bit n of the bits of (h, c) is element (n, h, c). No array: one would lie in local
// memory.
struct Some {
  uint32_t bits00, bits01, bits10, bits11;
  template <class F>
  static CUTLASS_DEVICE Some of(const F& bits) {
    return {bits(0, 0), bits(0, 1), bits(1, 0), bits(1, 1)};
  }
  CUTLASS_DEVICE uint32_t bits(int h, int c) const { return h ? (c ? bits11 : bits10) : (c ? bits01 : bits00); }
  CUTLASS_DEVICE bool has(int n, int h, int c) const { return bits(h, c) & 1u << n; }
  CUTLASS_DEVICE bool any() const { return bits00 | bits01 | bits10 | bits11; }
  CUTLASS_DEVICE Some operator|(const Some& other) const {
    return of([&](int h, int c) { return bits(h, c) | other.bits(h, c); });
  }
};

CUTLASS_DEVICE Some outside_of(const Place& at) {
  return Some::of([&](int h, int c) {
    const int blocks = (max(at.columns - at.column - c, 0) + 7) / 8;
    const uint32_t columns = blocks < kBlocks ? ~0u << blocks : 0;
    return at.row + 8 * h < at.rows ? columns : ~0u;
  });
}

// The labels inside the matrix, if the first row's is in column `label` and each next one's a column further.
CUTLASS_DEVICE Some labels_of(const Place& at, int label, const Some& outside) {
  return Some::of([&](int h, int c) {
    const uint32_t place = uint32_t(at.row) + 8 * h + uint32_t(label) - uint32_t(at.column);
    return place < kTileN && place % 8 == c ? 1u << place / 8 & ~outside.bits(h, c) : 0;
  });
}

template <class Accumulators>
CUTLASS_DEVICE void exclude(Accumulators& values, const Some& which, float excluded_value) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4 * kBlocks; ++i) {
    const int n = i / 4, h = i / 2 % 2, c = i % 2;
    if (which.has(n, h, c)) element(values, n, h, c) = excluded_value;
  }
}

// part [tiles across, padded rows]: sums over a thread's columns, added over the four lanes of its rows.
CUTLASS_DEVICE void write_row_sums(const float (&sums)[2], const Place& at, float* part) {
  CUTLASS_PRAGMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    float sum = sums[h];
    sum += __shfl_xor_sync(kLanes, sum, 1);
    sum += __shfl_xor_sync(kLanes, sum, 2);
    if (at.lane % 4 == 0) part[at.tile_column * at.padded_rows() + at.row + 8 * h] = sum;
  }
}

// Shared memory of a warp group's warps, `pitch` floats apart.
struct Scratch {
  float* first;
  int pitch;
  CUTLASS_DEVICE float* of(int warp) const { return first + warp % kGroupWarps * pitch; }
};

// A step of a butterfly over the lanes of a column: of 2 count sums each lane keeps half and gives the other half away.
template <int count>
CUTLASS_DEVICE void add_over_lanes(float (&sums)[2 * kBlocks], int lane) {
  constexpr int distance = count / 2;
  const bool upper = lane & distance;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < count; ++i) {
    const float given = upper ? sums[i] : sums[i + count], own = upper ? sums[i + count] : sums[i];
    sums[i] = own + __shfl_xor_sync(kLanes, given, distance);
  }
}

// part [groups of 64 rows, padded columns]: sums[2 n + c] over a thread's two rows, added over the lanes of a column
// and the group's warps.
CUTLASS_DEVICE void write_column_sums(float (&sums)[2 * kBlocks], const Place& at, const Scratch& scratch,
                                      float* part) {
  add_over_lanes<kBlocks>(sums, at.lane);
  add_over_lanes<kBlocks / 2>(sums, at.lane);
  add_over_lanes<kBlocks / 4>(sums, at.lane);
  float* of_warp = scratch.of(at.warp);
  CUTLASS_PRAGMA_UNROLL
  for (int n = 0; n < kBlocks / 8; ++n)
    *reinterpret_cast<float2*>(of_warp + (at.lane / 4 * (kBlocks / 8) + n) * 8 + at.lane % 4 * 2) = {sums[2 * n],
                                                                                                     sums[2 * n + 1]};
  cutlass::arch::NamedBarrier::sync(kGroupThreads, at.group());
  const int column = (at.warp % kGroupWarps * 32 + at.lane) * 2;
  float2 total{0, 0};
  CUTLASS_PRAGMA_UNROLL
  for (int w = 0; w < kGroupWarps; ++w) {
    const float2 next = *reinterpret_cast<const float2*>(scratch.of(w) + column);
    total = {total.x + next.x, total.y + next.y};
  }
  const int64_t line = int64_t(at.tile_row) * kGroups + at.group();
  *reinterpret_cast<float2*>(part + line * at.padded_columns() + at.tile_column * kTileN + column) = total;
  cutlass::arch::NamedBarrier::sync(kGroupThreads, at.group());
}

// A warp's 16 rows on their way to memory, 64 columns at a time: registers, shared memory, a bulk store. In one matrix
// they are rounded to T; in several, one behind another, each has what the ones before it left over.
template <class T>
struct Store {
  using Staging = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                               cute::Shape<cute::Int<kWarpTileRows>, cute::Int<kStoreColumns>>{}));
  static auto map_of(T* out, int rows, int columns, int64_t pitch, int terms) {
    const auto layout =
        cute::make_layout(cute::make_shape(rows, columns, terms), cute::make_stride(pitch, cute::_1{}, rows * pitch));
    return cute::make_tma_copy(cute::SM90_TMA_STORE{}, cute::make_tensor(cute::make_gmem_ptr(out), layout), Staging{},
                               cute::Shape<cute::Int<kWarpTileRows>, cute::Int<kStoreColumns>>{}, cute::_1{});
  }
  using Map = decltype(map_of(nullptr, 0, 0, 0, 0));
  struct alignas(1024) Buffers {
    T values[kGroups * kGroupWarps][kBuffers][kWarpTileRows * kStoreColumns];
  };
  static CUTLASS_DEVICE void prefetch(const Map& map) { cute::prefetch_tma_descriptor(map.get_tma_descriptor()); }
  // The buffers are the scratch too, once what was stored from them is read.
  static CUTLASS_DEVICE Scratch scratch(Buffers& buffers, const Place& at) {
    return {reinterpret_cast<float*>(buffers.values[at.group() * kGroupWarps]),
            int(sizeof buffers.values[0] / sizeof(float))};
  }
  // Of the calling thread's stores.
  static CUTLASS_DEVICE void drain() { cute::tma_store_wait<0>(); }

  template <int terms, class Accumulators>
  static CUTLASS_DEVICE void columns(const Map& map, Buffers& buffers, const Place& at, Accumulators& values,
                                     int number) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int term = 0; term < terms; ++term)
      matrix<terms>(map, buffers.values[at.warp][(number * terms + term) % kBuffers], at, values, number, term);
  }

 private:
  // Of the term-th matrix; `values` then have what is left for the next.
  template <int terms, class Accumulators>
  static CUTLASS_DEVICE void matrix(const Map& map, T* buffer, const Place& at, Accumulators& values, int number,
                                    int term) {
    cute::tma_store_wait<kBuffers - 1>();  // only the first lane has any
    __syncwarp();
    // stmatrix: lanes 8 m to 8 m + 7 have the rows' addresses of the m-th matrix, 8 x 8. m % 2 are the rows, m / 2 the
    // block of columns; a row has eight chunks of 16 bytes, at their number xor the row's (128-byte swizzle).
    const int row = at.lane % 16, block = at.lane / 16;
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < kStoreBlocks; n += 2) {
      uint32_t words[4];
      CUTLASS_PRAGMA_UNROLL
      for (int m = 0; m < 4; ++m) {
        const int from = number * kStoreBlocks + n + m / 2;
        cutlass::Array<float, 2> pair{element(values, from, m % 2, 0), element(values, from, m % 2, 1)};
        const auto narrow = cutlass::NumericArrayConverter<T, float, 2>::convert(pair);
        words[m] = reinterpret_cast<const uint32_t&>(narrow);
        if constexpr (terms > 1) {
          CUTLASS_PRAGMA_UNROLL
          for (int c = 0; c < 2; ++c) element(values, from, m % 2, c) -= float(narrow[c]);
        }
      }
      auto* to = reinterpret_cast<cute::uint128_t*>(buffer + row * kStoreColumns) + ((n + block) ^ row % 8);
      cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], *to);
    }
    cute::tma_store_fence();
    __syncwarp();
    if (at.lane == 0) {
      const auto all = map.get_tma_tensor(cute::make_shape(at.rows, at.columns, terms));
      const auto tile = cute::local_tile(
          all(cute::_, cute::_, term), cute::Shape<cute::Int<kWarpTileRows>, cute::Int<kStoreColumns>>{},
          cute::make_coord(at.tile_row * (kTileM / kWarpTileRows) + at.warp, at.tile_column * kStores + number));
      const auto slice = map.get_slice(0);
      const auto from = cute::make_tensor(cute::make_smem_ptr(buffer), Staging{});
      cute::copy(map, slice.partition_S(from), slice.partition_D(tile));
      cute::tma_store_arrive();
    }
  }
};

template <>
struct Store<void> {
  struct Map {};
  struct alignas(1024) Buffers {
    float sums[kGroups * kGroupWarps][kTileN];
  };
  static Map map_of(void*, int, int, int64_t, int) { return {}; }
  static CUTLASS_DEVICE void prefetch(const Map&) {}
  static CUTLASS_DEVICE Scratch scratch(Buffers& buffers, const Place& at) {
    return {buffers.sums[at.group() * kGroupWarps], kTileN};
  }
  static CUTLASS_DEVICE void drain() {}
  template <int, class Accumulators>
  static CUTLASS_DEVICE void columns(const Map&, Buffers&, const Place&, Accumulators&, int) {}
};

// The order of the two groups: an mbarrier that the first's warps arrive at. Takes the place of the pipeline by which
// CUTLASS's kernel would load a source matrix.
struct Turns {
  static constexpr uint32_t Stages = 1;
  enum class ThreadCategory { NonParticipant, Producer, Consumer, ProducerConsumer };
  struct SharedStorage {
    uint64_t first_is_done;
  };
  struct Params {
    ThreadCategory role;
    uint32_t dst_blockid, producer_arv_count, consumer_arv_count, transaction_bytes;
  };
  uint64_t* first_is_done;

  CUTLASS_DEVICE Turns(SharedStorage& storage, const Params&) : first_is_done(&storage.first_is_done) {
    if (threadIdx.x == 0) cutlass::arch::ClusterBarrier::init(first_is_done, kGroupWarps);
    cutlass::arch::fence_barrier_init();
  }
  CUTLASS_DEVICE void begin(const Place& at, uint32_t phase) const {
    if (at.group() == 1) cutlass::arch::ClusterBarrier::wait(first_is_done, phase);
  }
  CUTLASS_DEVICE void end(const Place& at) const {
    __syncwarp();
    if (at.group() == 0 && at.lane == 0) cutlass::arch::ClusterBarrier::arrive(first_is_done);
  }
};

struct NoStores {
  static constexpr uint32_t Stages = 1;
  struct Params {
    bool always_wait;
  };
  CUTLASS_DEVICE explicit NoStores(const Params&) {}
};

// Design: the type of the inputs, Input; what is stored, Out, or void, in kTerms matrices; its Arguments; and
// run(arguments, place, accumulators, scratch, store), which calls store(number) once the number-th 64 columns hold
// what is to be stored.
template <class Design>
class Epilogue {
  using Out = typename Design::Out;
  using Tile = Store<Out>;

 public:
  using TensorStorage = typename Tile::Buffers;
  // The mainloop's stages lie behind, and 128-byte swizzles repeat every 1024 bytes of address.
  static_assert(alignof(TensorStorage) == 1024 && sizeof(TensorStorage) % 1024 == 0);
  struct SharedStorage {
    TensorStorage tensors;
  };
  using ThreadEpilogueOp = void;
  using ElementC = void;
  using ElementD = cute::conditional_t<std::is_void_v<Out>, float, Out>;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  using LoadPipeline = Turns;
  using LoadPipelineState = cutlass::PipelineState<1>;
  using PipelineStorage = Turns::SharedStorage;
  using StorePipeline = NoStores;
  using StorePipelineState = cutlass::PipelineState<1>;
  static constexpr bool RequiresTransactionBytes = false;

  struct Arguments {
    typename Design::Arguments design;
    Out* out;
    int64_t pitch;
  };
  struct Params {
    typename Design::Arguments design;
    typename Tile::Map map;
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& arguments, void*) {
    return {arguments.design,
            Tile::map_of(arguments.out, cute::get<0>(shape), cute::get<1>(shape), arguments.pitch, Design::kTerms)};
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  CUTLASS_HOST_DEVICE static constexpr int get_load_pipe_increment(Shape) {
    return 1;
  }
  template <class Shape>
  CUTLASS_HOST_DEVICE static constexpr int get_store_pipe_increment(Shape) {
    return 1;
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) { Tile::prefetch(params.map); }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }

  CUTLASS_DEVICE Epilogue(const Params& params, TensorStorage&) : params_(params) {}

  template <class... Ignored>
  CUTLASS_DEVICE auto load(Turns, LoadPipelineState state, Ignored&&...) {
    return state;
  }
  CUTLASS_DEVICE auto load_tail(Turns, LoadPipelineState state) { return state; }

  template <class Problem, class TileShape, class Coordinates, class Accumulators, class Mma>
  CUTLASS_DEVICE auto store(const Turns& turns, LoadPipelineState turn, NoStores, StorePipelineState stores,
                            const Problem& problem, TileShape, const Coordinates& tile, Accumulators& values, Mma,
                            int thread, TensorStorage& buffers, int) {
    const Place at(thread, cute::get<0>(problem), cute::get<1>(problem), cute::get<0>(tile), cute::get<1>(tile));
    // A first group two epilogues ahead would alias the barrier's phase; the stages allow it for few dims alone.
    const bool in_turn = cute::get<2>(problem) > kStages / 2 * kDepth;
    if (in_turn) turns.begin(at, turn.phase());
    // Clusters pad the grid of tiles.
    if (at.inside())
      Design::run(params_.design, at, values, Tile::scratch(buffers, at), [&](int number) {
        Tile::template columns<Design::kTerms>(params_.map, buffers, at, values, number);
      });
    if (in_turn) turns.end(at);
    ++turn;
    return cute::make_tuple(turn, stores);
  }
  CUTLASS_DEVICE auto store_tail(Turns, LoadPipelineState turn, NoStores, StorePipelineState stores) {
    Tile::drain();
    return cute::make_tuple(turn, stores);
  }

 private:
  const Params& params_;
};

}  // namespace gapkern::contrastive::sm90

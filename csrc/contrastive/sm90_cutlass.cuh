// A warp-specialised, persistent, cooperative GEMM of CUTLASS 3.x for sm_90a around an epilogue visitor tree.
// 128 x 256 x 64 tiles in clusters of two rows: 4 stages, no spills. Needs NDEBUG: an assertion between two wgmma makes
// ptxas serialise them all (C7510). Every row and column at the edges is checked, since zero-filled ones would add
// 2^-c.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cstring>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "contrastive/epilogue.cuh"
#include "contrastive/sm90_gemm.h"

#ifndef NDEBUG
#error "compile with -DNDEBUG: assertions serialise every wgmma"
#endif

namespace gapkern::contrastive::sm90 {

namespace fusion = cutlass::epilogue::fusion;
using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
inline constexpr auto kRounding = cutlass::FloatRoundStyle::round_to_nearest;

// What the visitors are made of: a scalar, a value for every row or column, sums over the rows or columns of a tile,
// and a function F::of of such values, element by element.
using Scalar = fusion::Sm90ScalarBroadcast<float>;
using PerRow = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<cute::_1, cute::_0, cute::_0>>;
using PerColumn = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;
using RowSums = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRounding,
                                         cute::Stride<cute::_1, cute::_0, cute::_0>, 4, false, false, true>;
using ColumnSums =
    fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRounding,
                             cute::Stride<cute::_0, cute::_1, cute::_0>, 4, false, false, true>;

inline Scalar::Arguments scalar(const float* value) { return {{0.f}, {value}}; }
inline PerRow::Arguments per_row(const float* values) { return {values, 0.f, {}}; }
inline PerColumn::Arguments per_column(const float* values) { return {values, 0.f, {}}; }
inline RowSums::Arguments row_sums(float* part) { return {part, 0.f, {}}; }
inline ColumnSums::Arguments column_sums(float* part) { return {part, 0.f, {}}; }

template <class F>
struct Elementwise {
  template <class Values>
  struct Function {
    template <class... Others>
    CUTLASS_DEVICE Values operator()(const Values& first, const Others&... others) const {
      Values result;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Values::kElements; ++i) result[i] = F::of(first[i], others[i]...);
      return result;
    }
  };
  template <class Out>
  using To = fusion::Sm90Compute<Function, Out, float, kRounding>;
};
template <class Out>
using Rounded = fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Out, float, kRounding>;

// Calls f with a null pointer to the type of the inputs.
template <class F>
cudaError_t by_element(const Problem& p, const F& f) {
  return p.element == Element::bfloat16 ? f(static_cast<cutlass::bfloat16_t*>(nullptr))
                                        : f(static_cast<cutlass::half_t*>(nullptr));
}

// A Design has the type of the inputs, Input, what the epilogue stores, Out (or void), and its tree, Visitor.
template <class Design>
struct Parts {
  using T = typename Design::Input;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, typename Design::Out, RowMajor,
      8, cutlass::epilogue::TmaWarpSpecializedCooperative, typename Design::Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, RowMajor, 8, T, ColumnMajor, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
};

// A class of its own for the sake of its name: a line in a profile, and not the page that CUTLASS's types fill.
template <class Design>
struct Kernel : Parts<Design>::Kernel {
  static_assert(sizeof(typename Parts<Design>::Kernel::SharedStorage) <= 232448);
};

template <class Design>
struct Gemm {
  using T = typename Design::Input;
  using Out = typename Design::Out;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel<Design>>;

  // CUTLASS prints that a descriptor could not be made, and would run with one of zeros.
  static bool is_encoded(const cute::TmaDescriptor* descriptor) {
    static constexpr cute::TmaDescriptor nothing{};
    return std::memcmp(descriptor, &nothing, sizeof nothing) != 0;
  }

  // Not the adapter's can_implement: it takes rows of the output for packed, and refuses those that our pitch aligns.
  static bool can_run(const Problem& p, const typename Device::Arguments& arguments, int64_t pitch) {
    using Mainloop = typename Parts<Design>::Mainloop;
    using Callbacks = typename Parts<Design>::Epilogue::FusionCallbacks;
    const auto shape = cute::make_shape(p.rows, p.columns, p.depth, 1);
    return pitch % 8 == 0 && Mainloop::can_implement(shape, arguments.mainloop) &&
           Callbacks::can_implement(shape, arguments.epilogue.thread) && Device::get_workspace_size(arguments) == 0;
  }

  static cudaError_t run(const Problem& p, const typename Design::Visitor::Arguments& visitor, Out* out, int64_t pitch,
                         cudaStream_t stream) {
    const auto packed = [&](auto stride, int rows) {
      return cutlass::make_cute_packed_stride(stride, {rows, p.depth, 1});
    };
    typename Kernel<Design>::StrideD stride_out{};
    cute::get<0>(stride_out) = pitch;
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {p.rows, p.columns, p.depth, 1},
        {static_cast<const T*>(p.x), packed(typename Kernel<Design>::StrideA{}, p.rows), static_cast<const T*>(p.y),
         packed(typename Kernel<Design>::StrideB{}, p.columns)},
        {visitor, nullptr, {}, out, stride_out},
        {p.device, p.multiprocessors}};
    if (!can_run(p, arguments, pitch)) return cudaErrorNotSupported;
    // Autograd's threads may have no context yet, and descriptors need one.
    const cudaError_t bound = cudaSetDevice(p.device);
    if (bound != cudaSuccess) return bound;
    Device device;
    if (device.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
    const auto& made = device.params();
    bool encoded = is_encoded(made.mainloop.tma_load_a.get_tma_descriptor()) &&
                   is_encoded(made.mainloop.tma_load_b.get_tma_descriptor());
    if constexpr (!std::is_void_v<Out>) encoded = encoded && is_encoded(made.epilogue.tma_store_d.get_tma_descriptor());
    if (!encoded) return cudaErrorDeviceUninitialized;
    return device.run(stream) == cutlass::Status::kSuccess ? cudaSuccess : cudaErrorLaunchFailure;
  }
};

}  // namespace gapkern::contrastive::sm90

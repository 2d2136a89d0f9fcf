// A warp-specialised, persistent, cooperative GEMM of CUTLASS 3.x for sm_90a with our epilogue. Needs NDEBUG: an
// assertion between two wgmma makes ptxas serialise them all (C7510).
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include <cstring>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "contrastive/sm90_epilogue.cuh"
#include "contrastive/sm90_gemm.h"

#ifndef NDEBUG
#error "compile with -DNDEBUG: assertions serialise every wgmma"
#endif

namespace gapkern::contrastive::sm90 {

// Every choice that speed depends on. Clusters of two tiles above each other share the columns' tiles by multicast. The
// rasterisation runs down the rows: those of a call (at most 8192, 13 MB at 768 dims) stay in L2 while each tile of
// columns is read once; across, as CUTLASS would choose for more columns than rows, all columns would stream from
// memory for every row of clusters. No swizzle: of s it pads the grid to multiples of 2 s by s tiles, and the padding
// is computed.
using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kDepth>>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Scheduler = cutlass::gemm::PersistentScheduler;
inline constexpr int kSwizzle = 1;

// Calls f with a null pointer to the type of the inputs.
template <class F>
cudaError_t by_element(const Problem& p, const F& f) {
  return p.element == Element::bfloat16 ? f(static_cast<cutlass::bfloat16_t*>(nullptr))
                                        : f(static_cast<cutlass::half_t*>(nullptr));
}

template <class Design>
struct Parts {
  using T = typename Design::Input;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, RowMajor, 8, T, ColumnMajor, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCount<kStages>, Schedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue<Design>, Scheduler>;
};

// A class of its own for the sake of its name: a line in a profile, and not the page that CUTLASS's types fill.
template <class Design>
struct Kernel : Parts<Design>::Kernel {
  using Base = typename Parts<Design>::Kernel;
  static_assert(sizeof(typename Base::SharedStorage) <= 232448);

  CUTLASS_DEVICE void operator()(const typename Base::Params& params, char* shared) {
    if constexpr (Design::kConditional) {
      const float* condition = params.epilogue.design.condition;
      if (condition && *condition == 0) return;
    }
    Base::operator()(params, shared);
  }
};

template <class Design>
struct Gemm {
  using T = typename Design::Input;
  using Out = typename Design::Out;
  using K = Kernel<Design>;
  using Raster = typename K::TileScheduler::RasterOrderOptions;

  // CUTLASS prints that a descriptor could not be made, and would run with one of zeros.
  static bool is_encoded(const cute::TmaDescriptor* descriptor) {
    static constexpr cute::TmaDescriptor nothing{};
    return std::memcmp(descriptor, &nothing, sizeof nothing) != 0;
  }

  // Not the kernel's can_implement: it takes rows of the output for packed, and refuses those that our pitch aligns.
  static bool can_run(const Problem& p, const typename K::Arguments& arguments, int64_t pitch) {
    using Mainloop = typename Parts<Design>::Mainloop;
    const auto shape = cute::make_shape(p.rows, p.columns, p.depth, 1);
    return pitch % 8 == 0 && Mainloop::can_implement(shape, arguments.mainloop) &&
           K::get_workspace_size(arguments) == 0;
  }

  // What CUTLASS's adapter does, whose header includes every kernel of every architecture.
  static cudaError_t launch(typename K::Params& params, cudaStream_t stream) {
    const void* const entry = reinterpret_cast<const void*>(cutlass::device_kernel<K>);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), cute::size<2>(Cluster{})};
    cudaLaunchConfig_t config{};
    config.gridDim = K::get_grid_shape(params);
    config.blockDim = K::get_block_shape();
    config.dynamicSmemBytes = K::SharedStorageSize;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    void* arguments[] = {&params};
    cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, K::SharedStorageSize);
    if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, entry, arguments);
    if (error != cudaSuccess) cudaGetLastError();  // clears it
    return error;
  }

  static cudaError_t run(const Problem& p, const typename Design::Arguments& design, Out* out, int64_t pitch,
                         cudaStream_t stream) {
    const auto packed = [&](auto stride, int rows) {
      return cutlass::make_cute_packed_stride(stride, {rows, p.depth, 1});
    };
    typename K::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                    {p.rows, p.columns, p.depth, 1},
                                    {static_cast<const T*>(p.x), packed(typename K::StrideA{}, p.rows),
                                     static_cast<const T*>(p.y), packed(typename K::StrideB{}, p.columns)},
                                    {design, out, pitch},
                                    {p.device, p.multiprocessors},
                                    {kSwizzle, Raster::AlongM}};
    if (!can_run(p, arguments, pitch)) return cudaErrorNotSupported;
    // Autograd's threads may have no context yet, and descriptors need one.
    const cudaError_t bound = cudaSetDevice(p.device);
    if (bound != cudaSuccess) return bound;
    typename K::Params params = K::to_underlying_arguments(arguments, nullptr);
    bool encoded = is_encoded(params.mainloop.tma_load_a.get_tma_descriptor()) &&
                   is_encoded(params.mainloop.tma_load_b.get_tma_descriptor());
    if constexpr (!std::is_void_v<Out>) encoded = encoded && is_encoded(params.epilogue.map.get_tma_descriptor());
    return encoded ? launch(params, stream) : cudaErrorDeviceUninitialized;
  }
};

}  // namespace gapkern::contrastive::sm90

# The Hopper kernels join gapkern_cuda where CUTLASS's headers are at hand (the wheel nvidia-cutlass, or a checkout named
# by CUTLASS_PATH; needed to build and not to run) and 9.0a is not excluded by TORCH_CUDA_ARCH_LIST. Without them the
# library is whole: its other kernels serve every device.
set(sm90_reason "")
if(GAPKERN_CUDA_ARCH_LIST AND NOT "${GAPKERN_CUDA_ARCH_LIST}" MATCHES "9\\.0a")
  set(sm90_reason "TORCH_CUDA_ARCH_LIST has no 9.0a")
else()
  set(cutlass_source "$ENV{CUTLASS_PATH}")
  if(NOT cutlass_source)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.util as u, pathlib; s = u.find_spec('cutlass_library'); print(pathlib.Path(s.origin).parent / 'source' if s else '', end='')"
      OUTPUT_VARIABLE cutlass_source ERROR_QUIET)
  endif()
  if(NOT EXISTS "${cutlass_source}/include/cutlass/cutlass.h")
    if(NOT "$ENV{CUTLASS_PATH}" STREQUAL "")
      set(sm90_reason "CUTLASS_PATH names $ENV{CUTLASS_PATH}, which has no include/cutlass/cutlass.h")
    else()
      set(sm90_reason "CUTLASS was not found; run `pip install --no-deps nvidia-cutlass==4.2.0.0` and build with --no-build-isolation")
    endif()
  endif()
endif()
if(sm90_reason)
  message(STATUS "gapkern: building without the Hopper kernels (${sm90_reason})")
  return()
endif()

add_library(gapkern_sm90 OBJECT csrc/contrastive/sm90_forward.cu csrc/contrastive/sm90_gradient.cu
            csrc/contrastive/sm90_sigmoid.cu csrc/contrastive/sm90_masked_forward.cu
            csrc/contrastive/sm90_masked_gradient.cu csrc/contrastive/sm90_masked_sigmoid.cu)
set_target_properties(gapkern_sm90 PROPERTIES CUDA_ARCHITECTURES "90a-real;90a-virtual")
target_include_directories(gapkern_sm90 PRIVATE csrc)
target_include_directories(gapkern_sm90 SYSTEM PRIVATE "${cutlass_source}/include" "${cutlass_source}/tools/util/include")
target_compile_definitions(gapkern_sm90 PRIVATE NDEBUG)
target_compile_options(gapkern_sm90 PRIVATE -O3 --expt-relaxed-constexpr ${GAPKERN_CUDA_COMPRESSION})
# ptxas calls it mere information when it serialises the tensor cores' instructions.
set_target_properties(gapkern_sm90 PROPERTIES CUDA_COMPILER_LAUNCHER
                      "${Python_EXECUTABLE};${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_gate.py")
target_sources(gapkern_cuda PRIVATE csrc/contrastive/sm90.cu csrc/contrastive/sm90_masked.cu
               $<TARGET_OBJECTS:gapkern_sm90>)
message(STATUS "gapkern: building the Hopper kernels for 90a")

# torch_stable: headers and libtorch_cpu of the installed PyTorch, restricted to the stable ABI of 2.11, so that one
# build runs on that release and every later one. find_package(Torch) is avoided on purpose: beside a CUDA build of
# PyTorch it demands a CUDA toolkit even for a CPU-only library.
if(NOT EXISTS "${GAPKERN_TORCH}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "gapkern: no PyTorch headers under GAPKERN_TORCH='${GAPKERN_TORCH}'; "
                      "give the folder of an installed torch >= 2.11")
endif()

# Headers are the same everywhere; for another processor its own libraries are linked.
set(GAPKERN_TORCH_LIB "${GAPKERN_TORCH}/lib" CACHE PATH "The folder of libtorch_cpu and libc10")
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${GAPKERN_TORCH}/include")
target_include_directories(torch_stable INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(torch_stable INTERFACE "${GAPKERN_TORCH_LIB}")
target_link_libraries(torch_stable INTERFACE torch_cpu c10)

# gapkern_simd_source(TARGET FILE [FLAGS...]): compiles FILE once per instruction set, each time with GAPKERN_ISA naming the
# namespace its functions live in. Code chooses at run time (csrc/common/isa.h); nothing is built for the build machine.
set(GAPKERN_ISAS portable)
set(GAPKERN_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND GAPKERN_ISAS avx2 avx512 avx512bf16)
  set(GAPKERN_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(GAPKERN_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  set(GAPKERN_FLAGS_avx512bf16 ${GAPKERN_FLAGS_avx512} -mavx512bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(GAPKERN_ISAS neon neonbf16) # what every such processor has, and bfmmla besides
  set(GAPKERN_FLAGS_neon "")
  set(GAPKERN_FLAGS_neonbf16 -march=armv8.2-a+bf16)
endif()

function(gapkern_simd_source target source)
  get_filename_component(capability "${source}" DIRECTORY)
  get_filename_component(capability "${capability}" NAME)
  get_filename_component(file "${source}" NAME_WE)
  foreach(isa IN LISTS GAPKERN_ISAS)
    set(object "${target}_${capability}_${file}_${isa}")
    add_library(${object} OBJECT "${source}")
    target_compile_options(${object} PRIVATE -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast
                           ${GAPKERN_FLAGS_${isa}} ${ARGN})
    target_compile_definitions(${object} PRIVATE GAPKERN_ISA=${isa} GAPKERN_ISA_${isa})
    target_include_directories(${object} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()

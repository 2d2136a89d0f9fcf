# build_facts: what every library carries about its own making, compared at import with the Python files beside it.
file(STRINGS "${CMAKE_CURRENT_SOURCE_DIR}/gapkern/_version.py" GAPKERN_VERSION REGEX "__version__")
string(REGEX REPLACE ".*\"([^\"]+)\".*" "\\1" GAPKERN_VERSION "${GAPKERN_VERSION}")
file(STRINGS "${GAPKERN_TORCH}/version.py" GAPKERN_TORCH_VERSION REGEX "^__version__")
string(REGEX REPLACE ".*'([^']+)'.*" "\\1" GAPKERN_TORCH_VERSION "${GAPKERN_TORCH_VERSION}")

# A digest of the native sources: `gapkern` compares it with csrc/ in a checkout and says when a rebuild is due.
add_custom_target(build_facts_header
  COMMAND ${CMAKE_COMMAND}
    -DROOT=${CMAKE_CURRENT_SOURCE_DIR}
    -DOUTPUT=${CMAKE_CURRENT_BINARY_DIR}/facts/build_facts.h
    -DVERSION=${GAPKERN_VERSION}
    -DTORCH_VERSION=${GAPKERN_TORCH_VERSION}
    "-DCOMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/WriteBuildFacts.cmake
  BYPRODUCTS ${CMAKE_CURRENT_BINARY_DIR}/facts/build_facts.h
  VERBATIM)
add_library(build_facts INTERFACE)
add_dependencies(build_facts build_facts_header)
target_include_directories(build_facts INTERFACE "${CMAKE_CURRENT_BINARY_DIR}/facts")

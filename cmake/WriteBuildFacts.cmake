# Digest: SHA-256 over the sorted lines "<sha256 of the file> <path below the root>" of csrc/.
# gapkern/_load.py computes the same in Python.
file(GLOB_RECURSE sources RELATIVE "${ROOT}" "${ROOT}/csrc/*.h" "${ROOT}/csrc/*.cpp" "${ROOT}/csrc/*.cu"
     "${ROOT}/csrc/*.cuh")
list(SORT sources)
set(listing "")
foreach(source IN LISTS sources)
  file(SHA256 "${ROOT}/${source}" hash)
  string(APPEND listing "${hash} ${source}\n")
endforeach()
string(SHA256 digest "${listing}")
set(text "#pragma once
#define GAPKERN_VERSION \"${VERSION}\"
#define GAPKERN_TORCH_VERSION \"${TORCH_VERSION}\"
#define GAPKERN_COMPILER \"${COMPILER}\"
#define GAPKERN_SOURCES \"${digest}\"
")
file(WRITE "${OUTPUT}.new" "${text}")
file(COPY_FILE "${OUTPUT}.new" "${OUTPUT}" ONLY_IF_DIFFERENT)

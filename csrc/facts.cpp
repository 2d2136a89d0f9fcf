// What the CPU library says of its own making, in C: Python reads it by ctypes, so that nothing here is bound to one
// version of Python.
#include "build_facts.h"
#include "common/isa.h"

extern "C" {

// JSON: version, torch, compiler, and the digest of csrc/ that the library was built from.
__attribute__((visibility("default"))) const char* gapkern_build_facts() {
  return "{\"version\": \"" GAPKERN_VERSION "\", \"torch\": \"" GAPKERN_TORCH_VERSION
         "\", \"compiler\": \"" GAPKERN_COMPILER "\", \"sources\": \"" GAPKERN_SOURCES "\"}";
}

// The instruction set the CPU kernels use.
__attribute__((visibility("default"))) const char* gapkern_active_isa() {
  return gapkern::isa_name(gapkern::active_isa());
}

}  // extern "C"

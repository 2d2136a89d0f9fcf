// _core: build facts and numerics that need no framework. Separate from the operator libraries, since pybind11 and
// the stable ABI headers do not share a translation unit on every supported PyTorch.
#include <pybind11/pybind11.h>

#include "build_facts.h"
#include "common/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build facts and framework-free numerics of gapkern.";
  m.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["version"] = GAPKERN_VERSION;
        facts["torch"] = GAPKERN_TORCH_VERSION;
        facts["compiler"] = GAPKERN_COMPILER;
        facts["sources"] = GAPKERN_SOURCES;
        return facts;
      },
      "Version, PyTorch, compiler and source digest this build was made with.");
  m.def(
      "active_isa", [] { return gapkern::isa_name(gapkern::active_isa()); },
      "The instruction set the CPU kernels use.");
}

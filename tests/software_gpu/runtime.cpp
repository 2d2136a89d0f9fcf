// What the objects import of the CUDA runtime, and the driver's encoder of tensor maps. Every rule whose breach a
// device reports, or does not, is checked here.
#include "runtime.h"

#include <algorithm>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace software_gpu {

std::vector<std::unique_ptr<Module>>& modules() {
  static std::vector<std::unique_ptr<Module>> all;
  return all;
}
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
std::vector<Plant> plants;

void install() {
  static const bool done = [] {
    scalar_handlers();
    approximation_handlers();
    comparison_handlers();
    conversion_handlers();
    memory_handlers();
    atomic_handlers();
    warp_handlers();
    barrier_handlers();
    copy_handlers();
    matrix_handlers();
    product_handlers();
    return true;
  }();
  (void)done;
}

int64_t planted(const std::string& kernel, const char* what, int64_t value) {
  for (Plant& p : plants)
    if (p.what == what && kernel.find(p.kernel) != std::string::npos) {
      p.used = true;
      return p.value;
    }
  return value;
}

void record(const Fault& f) {
  device.last_fault = f.kind + "|" + f.kernel + "|" + std::to_string(f.line) + "|" + f.instruction + "|" + f.what();
}

namespace {

constexpr uint64_t kMostShared = 232448;
int last_error = kSuccess;

int fail(int code, const Fault& f) {
  record(f);
  return last_error = code;
}

void check_shape(const Function& f, const Kernel& k, const Shape& s) {
  const auto bad = [](const char* format, auto... values) { fault("bad launch", format, values...); };
  const uint32_t most_grid[] = {2147483647u, 65535, 65535}, most_block[] = {1024, 1024, 64};
  for (size_t i = 0; i < 3; ++i) {
    if (s.grid[i] == 0 || s.grid[i] > most_grid[i]) bad("grid dimension %zu is %u", i, s.grid[i]);
    if (s.block[i] == 0 || s.block[i] > most_block[i]) bad("block dimension %zu is %u", i, s.block[i]);
    if (s.cluster[i] == 0 || s.grid[i] % s.cluster[i])
      bad("grid dimension %zu is %u, no multiple of the cluster's %u", i, s.grid[i], s.cluster[i]);
  }
  const uint64_t threads = uint64_t(s.block[0]) * s.block[1] * s.block[2];
  if (threads > k.most_threads)
    bad("%llu threads in a block of a kernel for %u", (unsigned long long)threads, k.most_threads);
  const uint64_t ctas = uint64_t(s.cluster[0]) * s.cluster[1] * s.cluster[2];
  if (ctas > f.most_cluster) bad("a cluster of %llu", (unsigned long long)ctas);
  if (s.shared_bytes > f.most_dynamic_shared)
    bad("%llu bytes of dynamic shared memory, the function allows %u", (unsigned long long)s.shared_bytes,
        f.most_dynamic_shared);
  if (s.shared_bytes + k.shared_bytes > kMostShared)
    bad("%llu bytes of shared memory", (unsigned long long)(s.shared_bytes + k.shared_bytes));
}

}  // namespace

int launch(Function& f, const Shape& asked, void** arguments, const uint8_t* packed, size_t packed_bytes) {
  Shape shape = asked;
#if defined(__x86_64__)
  const unsigned modes = _mm_getcsr();
  _mm_setcsr(modes & ~0x8040u);  // subnormals are numbers, whatever the process has set
#endif
  int code = kSuccess;
  try {
    if (!device.pending_fault.empty()) {
      const std::string what = device.pending_fault;
      device.pending_fault.clear();
      const size_t bar = what.find('|');
      throw Fault(what.substr(0, bar), what.substr(bar + 1));
    }
    code = kInvalidConfiguration;
    Kernel& kernel = decoded(*f.module, f.name);
    const char* axes[] = {"x", "y", "z"};
    for (size_t i = 0; i < 3; ++i) {
      shape.grid[i] = uint32_t(planted(f.name, (std::string("grid.") + axes[i]).c_str(), shape.grid[i]));
      shape.block[i] = uint32_t(planted(f.name, (std::string("block.") + axes[i]).c_str(), shape.block[i]));
      shape.cluster[i] = uint32_t(planted(f.name, (std::string("cluster.") + axes[i]).c_str(), shape.cluster[i]));
    }
    shape.shared_bytes = uint64_t(planted(f.name, "shared", int64_t(shape.shared_bytes)));
    check_shape(f, kernel, shape);
    code = kLaunchFailure;
    Launch l;
    l.kernel = &kernel;
    l.grid = shape.grid;
    l.block = shape.block;
    l.cluster = shape.cluster;
    l.shared_bytes = uint32_t(shape.shared_bytes);
    if (packed) {
      if (packed_bytes != kernel.parameter_bytes)
        fault("bad launch", "%zu bytes of parameters, the kernel has %u", packed_bytes, kernel.parameter_bytes);
      l.parameters.assign(packed, packed + packed_bytes);
    } else {
      l.parameters.resize(kernel.parameter_bytes);
      std::vector<void*> from(arguments, arguments + kernel.parameters.size());
      const int64_t swap = planted(f.name, "arguments.swap", -1);  // 16 i + j
      if (swap >= 0) std::swap(from[size_t(swap / 16)], from[size_t(swap % 16)]);
      for (size_t i = 0; i < from.size(); ++i)
        memcpy(&l.parameters[kernel.parameters[i].offset], from[i], kernel.parameters[i].size);
      const int64_t host = planted(f.name, "arguments.host", -1);  // a pointer of the host at this byte
      if (host >= 0) memcpy(&l.parameters[size_t(host)], &arguments, 8);
      const int64_t moved = planted(f.name, "arguments.move", -1);  // the 64 bits there plus their amount
      if (moved >= 0) {
        uint64_t value;
        memcpy(&value, &l.parameters[size_t(moved / 65536)], 8);
        value += uint64_t(moved % 65536);
        memcpy(&l.parameters[size_t(moved / 65536)], &value, 8);
      }
    }
    ++f.launches;
    run(l);
    code = kSuccess;
  } catch (Fault& fault_) {
    if (fault_.kernel.empty()) fault_.kernel = f.name;
    fail(code == kSuccess ? kLaunchFailure : code, fault_);
  }
#if defined(__x86_64__)
  _mm_setcsr(modes);
#endif
  return code == kSuccess ? kSuccess : last_error;
}

}  // namespace software_gpu

using namespace software_gpu;
struct Dim3 {
  unsigned x, y, z;
  std::array<uint32_t, 3> array() const { return {x, y, z}; }
};
struct LaunchAttribute {
  int id;
  char unused[4];
  union {
    char room[64];
    Dim3 cluster;
  };
};
struct LaunchConfig {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};
struct Wrapper {
  int magic, version;
  const void* data;
  void* file;
};
namespace {
Dim3 pushed_grid, pushed_block;
size_t pushed_shared;
void* pushed_stream;

int run_for(const void* host, const Shape& shape, void** arguments) {
  const auto found = functions().find(host);
  if (found == functions().end()) return fail(kNoKernel, Fault("bad launch", "a function that was never registered"));
  return launch(found->second, shape, arguments);
}
int unknown(const char* call, long long value) {
  Fault f("unknown runtime call", printed("%s with %lld", call, value));
  device.pending_fault = f.kind + "|" + f.what();
  return fail(kNotSupported, f);
}
}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  install();
  modules().push_back(index_module(ptx_of(static_cast<Wrapper*>(wrapper)->data)));
  return reinterpret_cast<void**>(modules().back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  Function& f = functions()[host];
  f.module = reinterpret_cast<Module*>(module);
  f.name = name;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void* stream) {
  pushed_grid = grid;
  pushed_block = block;
  pushed_shared = shared_bytes;
  pushed_stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed_grid;
  *block = pushed_block;
  *shared_bytes = pushed_shared;
  *static_cast<void**>(stream) = pushed_stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes, void*) {
  return run_for(kernel, {grid.array(), block.array(), {1, 1, 1}, shared_bytes}, arguments);
}
int cudaLaunchKernelExC(const LaunchConfig* config, const void* host, void** arguments) {
  Shape shape{config->grid.array(), config->block.array(), {1, 1, 1}, config->shared_bytes};
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const LaunchAttribute& a = config->attributes[i];
    if (a.id == 4)
      shape.cluster = a.cluster.array();
    else if (a.id != 6)  // 6: may overlap the kernel before, which is over here
      return unknown("cudaLaunchKernelExC: attribute", a.id);
  }
  return run_for(host, shape, arguments);
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
const char* cudaGetErrorString(int code) {
  static std::string text;
  if (code != kSuccess) device.pending_fault.clear();  // the host has noticed
  text = code == kSuccess ? "no error" : "software GPU: " + device.last_fault;
  return text.c_str();
}
int cudaGetDevice(int* device_index) {
  *device_index = 0;
  return 0;
}
int cudaSetDevice(int device_index) { return device_index == 0 ? kSuccess : kInvalidDevice; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:
      *value = device.multiprocessors;
      return 0;
    case 75:
      *value = 9;
      return 0;
    case 76:
      *value = 0;
      return 0;
    case 97:
      *value = int(kMostShared);
      return 0;
  }
  return unknown("cudaDeviceGetAttribute", attribute);
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  const auto found = functions().find(host);
  if (found == functions().end()) return kNoKernel;
  if (attribute == 14) {  // clusters of more than 8
    found->second.most_cluster = value ? 16 : 8;
    return 0;
  }
  if (attribute != 8) return unknown("cudaFuncSetAttribute", attribute);
  if (value < 0 || uint64_t(value) > kMostShared) return kInvalidValue;
  found->second.most_dynamic_shared = uint32_t(value);
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* status) {
  if (std::string(name) != "cuTensorMapEncodeTiled") return unknown(name, 0);
  *function = reinterpret_cast<void*>(&encode_tiled);
  if (status) *status = 0;
  return 0;
}
}

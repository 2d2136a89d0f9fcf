// The CUDA runtime's side: modules, launches and what a test asks of them.
#pragma once
#include "machine.h"

namespace software_gpu {

std::string ptx_of(const void* fat_binary);
void install();  // every room's instructions, once

struct Function {
  Module* module = nullptr;
  std::string name;
  uint32_t most_dynamic_shared = 49152, most_cluster = 8;
  uint64_t launches = 0;
};
std::vector<std::unique_ptr<Module>>& modules();
std::map<const void*, Function>& functions();

struct Shape {
  std::array<uint32_t, 3> grid, block, cluster;
  uint64_t shared_bytes;
};
// Checks and runs; 0, or the runtime's error code with device.last_fault set.
int launch(Function& f, const Shape& shape, void** arguments, const uint8_t* packed = nullptr, size_t packed_bytes = 0);
int encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                 const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int l2, int fill);
void record(const Fault& f);

// A planted mistake of the host: `what` such as grid.x, arguments.swap or map.stride, and its new value.
struct Plant {
  std::string kernel, what;
  int64_t value;
  bool used;
};
extern std::vector<Plant> plants;
int64_t planted(const std::string& kernel, const char* what, int64_t value);  // `value` where nothing is planted

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kNoKernel = 98,
  kInvalidDevice = 101,
  kLaunchFailure = 719,
  kNotSupported = 801
};

}  // namespace software_gpu

// Tensors on the device: whatever the library asks PyTorch's stable ABI for a pointer is mapped, and gets an address
// that only the device understands. Tensors live in host memory; the library is told that they are CUDA's.
#include <dlfcn.h>

#include <cstdlib>

#include "runtime.h"

using namespace software_gpu;
using Handle = void*;

namespace {

template <class F>
F* real(const char* name) {
  static void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  void* found = library ? dlsym(library, name) : dlsym(RTLD_DEFAULT, name);
  if (!found) {
    fprintf(stderr, "software GPU: no %s in libtorch_cpu.so\n", name);
    abort();
  }
  return reinterpret_cast<F*>(found);
}

struct Extent {
  void* storage;
  int64_t storage_bytes, offset, bytes;
};

bool extent_of(Handle t, Extent& e) {
  static auto* const data = real<int(Handle, void**)>("aoti_torch_get_data_ptr");
  static auto* const storage_bytes = real<int(Handle, int64_t*)>("aoti_torch_get_storage_size");
  static auto* const storage_offset = real<int(Handle, int64_t*)>("aoti_torch_get_storage_offset");
  static auto* const dims = real<int(Handle, int64_t*)>("aoti_torch_get_dim");
  static auto* const size = real<int(Handle, int64_t, int64_t*)>("aoti_torch_get_size");
  static auto* const stride = real<int(Handle, int64_t, int64_t*)>("aoti_torch_get_stride");
  static auto* const dtype = real<int(Handle, int32_t*)>("aoti_torch_get_dtype");
  static auto* const element = real<size_t(int32_t)>("aoti_torch_dtype_element_size");
  void* at = nullptr;
  int64_t rank = 0, offset = 0;
  int32_t type = 0;
  data(t, &at);
  if (!at) return false;
  storage_bytes(t, &e.storage_bytes);
  storage_offset(t, &offset);
  dims(t, &rank);
  dtype(t, &type);
  const int64_t each = int64_t(element(type));
  int64_t last = 1;
  for (int64_t i = 0; i < rank; ++i) {
    int64_t n = 0, step = 0;
    size(t, i, &n);
    stride(t, i, &step);
    if (n == 0) return false;
    last += (n - 1) * step;
  }
  e.offset = offset * each;
  e.bytes = last * each;
  e.storage = static_cast<char*>(at) - e.offset;
  return true;
}

void* device_address(Handle t) {
  Extent e{};
  if (!extent_of(t, e)) return nullptr;
  return reinterpret_cast<void*>(
      map_memory(e.storage, uint64_t(e.storage_bytes), uint64_t(e.offset), uint64_t(e.bytes), true));
}

}  // namespace

extern "C" {
int aoti_torch_get_data_ptr(Handle t, void** out) {
  *out = device_address(t);
  return 0;
}
int torch_get_mutable_data_ptr(Handle t, void** out) {
  *out = device_address(t);
  return 0;
}
int torch_get_const_data_ptr(Handle t, const void** out) {
  *out = device_address(t);
  return 0;
}
int aoti_torch_get_device_type(Handle, int32_t* type) {
  *type = 1;  // CUDA
  return 0;
}
int aoti_torch_get_device_index(Handle, int32_t* index) {
  *index = 0;
  return 0;
}
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int aoti_torch_create_device_guard(int32_t, void** guard) {
  static char one;
  *guard = &one;
  return 0;
}
int aoti_torch_delete_device_guard(void*) {
  unmap_all();  // the operator is over, and its tensors may be freed
  return 0;
}
int torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version) {
  static auto* const call = real<int(const char*, const char*, uint64_t*, uint64_t)>("torch_call_dispatcher");
  const int code = call(name, overload, stack, version);
  const std::string op = name;
  Extent e{};
  if (code || !extent_of(reinterpret_cast<Handle>(stack[0]), e)) return code;
  if (op == "aten::new_empty" || op == "aten::empty_like" || op == "aten::empty") {
    forget_memory(e.storage);
    map_memory(e.storage, uint64_t(e.storage_bytes), 0, 0, false);
  } else {
    define_memory(e.storage);
  }
  return code;
}
int torch_c10_cuda_check_msg(int code, const char*, const char*, unsigned, bool, char** message) {
  *message = code == kSuccess ? nullptr : strdup(("software GPU: " + device.last_fault).c_str());
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
}

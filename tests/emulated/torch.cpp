// The part of PyTorch's stable C ABI that the CPU library asks for, so that its operators run where there is no
// PyTorch: contiguous tensors in host memory, one thread. Built as libtorch_cpu.so; `operator_named` is for run.cpp.
#include "torch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

#if defined(__aarch64__)
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif

constexpr int kOk = 0, kFailed = 1;

std::map<std::string, Kernel>& operators() {
  static std::map<std::string, Kernel> all;
  return all;
}

int64_t count(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

Tensor* like(const Tensor* t) { return new_tensor(t->dtype, t->sizes); }

float widened(const Tensor* t, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(t->data) + 2 * i, 2);
  if (t->dtype == kHalf) {
    Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

double value(const Tensor* t, int64_t i) {
  switch (t->dtype) {
    case kFloat:
      return static_cast<const float*>(t->data)[i];
    case kDouble:
      return static_cast<const double*>(t->data)[i];
    case kLong:
      return double(static_cast<const int64_t*>(t->data)[i]);
    default:
      return widened(t, i);
  }
}

// To nearest even, as PyTorch.
uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

Tensor* converted(const Tensor* from, int32_t dtype) {
  Tensor* to = new_tensor(dtype, from->sizes);
  for (int64_t i = 0; i < count(from->sizes); ++i) {
    const double x = value(from, i);
    if (dtype == kDouble) static_cast<double*>(to->data)[i] = x;
    if (dtype == kFloat) static_cast<float*>(to->data)[i] = float(x);
    if (dtype == kLong) static_cast<int64_t*>(to->data)[i] = int64_t(x);
    if (dtype == kBFloat16) static_cast<uint16_t*>(to->data)[i] = bfloat16(float(x));
    if (dtype == kHalf) static_cast<Float16*>(to->data)[i] = Float16(float(x));
  }
  return to;
}

// An argument that may be absent: null, or a pointer to the value, which is the callee's to delete.
bool given(uint64_t argument, uint64_t* out) {
  auto* const pointer = reinterpret_cast<uint64_t*>(argument);
  if (pointer == nullptr) return false;
  *out = *pointer;
  delete pointer;
  return true;
}

}  // namespace

int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case kFloat:
      return 4;
    case kDouble:
    case kLong:
      return 8;
    case kShort:
    case kHalf:
    case kBFloat16:
      return 2;
    case kInt:
      return 4;
    default:
      return 1;
  }
}

Tensor* new_tensor(int32_t dtype, std::vector<int64_t> sizes) {
  const int64_t bytes = std::max<int64_t>(1, count(sizes) * element_size(dtype));
  // What is not written is NaN.
  void* const data = std::memset(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64), 0xff, size_t(bytes));
  auto* const t = new Tensor{data, dtype, std::move(sizes), [](void* p, void*) { std::free(p); }, nullptr, 1};
  return t;
}

Kernel operator_named(const std::string& name) {
  const auto found = operators().find(name);
  return found == operators().end() ? nullptr : found->second;
}

extern "C" {

#define DTYPE(name, number) \
  int32_t aoti_torch_dtype_##name() { return number; }
DTYPE(uint8, 0)
DTYPE(int8, 1)
DTYPE(int16, 2)
DTYPE(int32, kInt)
DTYPE(int64, kLong)
DTYPE(float16, kHalf)
DTYPE(float32, kFloat)
DTYPE(float64, kDouble)
DTYPE(complex32, 8)
DTYPE(complex64, 9)
DTYPE(complex128, 10)
DTYPE(bool, 11)
DTYPE(bfloat16, kBFloat16)
DTYPE(float8_e5m2, 23)
DTYPE(float8_e4m3fn, 24)
DTYPE(float8_e5m2fnuz, 25)
DTYPE(float8_e4m3fnuz, 26)
DTYPE(uint16, 27)
DTYPE(uint32, 28)
DTYPE(uint64, 29)
int32_t torch_dtype_float8_e8m0fnu() { return 44; }
int32_t torch_dtype_float4_e2m1fn_x2() { return 45; }
size_t aoti_torch_dtype_element_size(int32_t dtype) { return size_t(element_size(dtype)); }

#define NUMBER(name, number) \
  int32_t aoti_torch_##name() { return number; }
NUMBER(device_type_cpu, 0)
NUMBER(device_type_cuda, 1)
NUMBER(device_type_meta, 14)
NUMBER(device_type_mps, 13)
NUMBER(device_type_privateuse1, 20)
NUMBER(device_type_xpu, 12)
NUMBER(layout_strided, 0)
NUMBER(layout_sparse_coo, 1)
NUMBER(layout_sparse_csr, 2)
NUMBER(layout__mkldnn, 3)
NUMBER(layout_sparse_csc, 4)
NUMBER(layout_sparse_bsr, 5)
NUMBER(layout_sparse_bsc, 6)
NUMBER(layout_jagged, 7)
NUMBER(memory_format_contiguous_format, 0)
NUMBER(memory_format_preserve_format, 1)
NUMBER(memory_format_channels_last, 2)
NUMBER(memory_format_channels_last_3d, 3)
uint64_t aoti_torch_abi_version() { return 0; }

int aoti_torch_delete_tensor_object(Tensor* t) {
  if (--t->references > 0) return kOk;
  if (t->deleter) t->deleter(t->data, t->context);
  delete t;
  return kOk;
}
int aoti_torch_new_uninitialized_tensor(Tensor** out) {
  *out = new Tensor{nullptr, kFloat, {0}, nullptr, nullptr, 1};
  return kOk;
}
int aoti_torch_new_tensor_handle(Tensor* t, Tensor** out) {
  ++t->references;
  *out = t;
  return kOk;
}
int aoti_torch_get_data_ptr(Tensor* t, void** out) { return *out = t->data, kOk; }
int torch_get_mutable_data_ptr(Tensor* t, void** out) { return *out = t->data, kOk; }
int torch_get_const_data_ptr(Tensor* t, const void** out) { return *out = t->data, kOk; }
int aoti_torch_get_dim(Tensor* t, int64_t* out) { return *out = int64_t(t->sizes.size()), kOk; }
int aoti_torch_get_dtype(Tensor* t, int32_t* out) { return *out = t->dtype, kOk; }
int aoti_torch_get_numel(Tensor* t, int64_t* out) { return *out = count(t->sizes), kOk; }
int aoti_torch_get_size(Tensor* t, int64_t d, int64_t* out) {
  return *out = t->sizes.at(size_t(d < 0 ? d + int64_t(t->sizes.size()) : d)), kOk;
}
int aoti_torch_get_device_type(Tensor*, int32_t* out) { return *out = 0, kOk; }
int aoti_torch_get_device_index(Tensor*, int32_t* out) { return *out = -1, kOk; }
int torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t*, int64_t offset, int32_t dtype,
                    int32_t, int32_t, Tensor** out, int32_t, const uint8_t*, int64_t, void (*deleter)(void*, void*),
                    void* context) {
  if (offset != 0) return kFailed;
  *out = new Tensor{data, dtype, {sizes, sizes + ndim}, deleter, context, 1};
  return kOk;
}

int torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  // In two parts, as two threads would.
  const int64_t middle = begin + (end - begin) / 2;
  if (begin < middle) f(begin, middle, context);
  if (middle < end) f(middle, end, context);
  return kOk;
}

using List = std::vector<uint64_t>;
int torch_new_list_reserve_size(size_t size, List** out) {
  *out = new List;
  (*out)->reserve(size);
  return kOk;
}
int torch_list_size(List* list, size_t* out) { return *out = list->size(), kOk; }
int torch_list_get_item(List* list, size_t i, uint64_t* out) { return *out = list->at(i), kOk; }
int torch_list_push_back(List* list, uint64_t item) { return list->push_back(item), kOk; }
int torch_delete_list(List* list) { return delete list, kOk; }
int torch_delete_string(std::string* s) { return delete s, kOk; }
int torch_string_length(std::string* s, size_t* out) { return *out = s->size(), kOk; }
int torch_string_c_str(std::string* s, const char** out) { return *out = s->c_str(), kOk; }

// A library is its dispatch key; definitions need no more than to exist.
int aoti_torch_library_init_def(const char*, const char*, uint32_t, std::string** out) {
  return *out = new std::string, kOk;
}
int aoti_torch_library_init_impl(const char*, const char* key, const char*, uint32_t, std::string** out) {
  return *out = new std::string(key), kOk;
}
int aoti_torch_delete_library_object(std::string* library) { return delete library, kOk; }
int aoti_torch_library_def(std::string*, const char*) { return kOk; }
int torch_library_impl(std::string* library, const char* name, Kernel kernel, uint64_t) {
  if (*library == "CPU") operators()[name] = kernel;
  return kOk;
}

int torch_call_dispatcher(const char* name, const char*, uint64_t* stack, uint64_t) {
  const std::string op = name;
  auto* const self = reinterpret_cast<Tensor*>(stack[0]);
  Tensor* result = nullptr;
  uint64_t dtype = uint64_t(self->dtype), unused = 0;
  if (op == "aten::contiguous") {
    return kOk;
  } else if (op == "aten::to") {
    given(stack[1], &dtype);
    for (int i : {2, 3, 4, 7}) given(stack[i], &unused);
    if (int32_t(dtype) == self->dtype) return kOk;
    result = converted(self, int32_t(dtype));
  } else if (op == "aten::empty_like") {
    for (int i = 1; i < 6; ++i) given(stack[i], &unused);
    result = like(self);
  } else if (op == "aten::new_empty" || op == "aten::new_zeros") {
    auto* const sizes = reinterpret_cast<List*>(stack[1]);
    given(stack[2], &dtype);
    for (int i = 3; i < 6; ++i) given(stack[i], &unused);
    result = new_tensor(int32_t(dtype), {sizes->begin(), sizes->end()});
    delete sizes;
    if (op == "aten::new_zeros")
      std::memset(result->data, 0, size_t(count(result->sizes) * element_size(int32_t(dtype))));
  } else {
    std::fprintf(stderr, "torch.cpp has no %s\n", name);
    return kFailed;
  }
  aoti_torch_delete_tensor_object(self);
  stack[0] = reinterpret_cast<uint64_t>(result);
  return kOk;
}

}  // extern "C"

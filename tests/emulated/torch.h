// What run.cpp and torch.cpp share: tensors and boxed kernels.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

// PyTorch's numbers.
inline constexpr int32_t kShort = 2, kInt = 3, kLong = 4, kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15;

struct Tensor {
  void* data;
  int32_t dtype;
  std::vector<int64_t> sizes;
  void (*deleter)(void*, void*);
  void* context;
  int references;
};

using Kernel = void (*)(uint64_t* stack, uint64_t inputs, uint64_t outputs);

int64_t element_size(int32_t dtype);
// Contiguous, every byte 0xff.
Tensor* new_tensor(int32_t dtype, std::vector<int64_t> sizes);
// The CPU's kernel of gapkern::NAME, or null.
Kernel operator_named(const std::string& name);
extern "C" int aoti_torch_delete_tensor_object(Tensor* t);

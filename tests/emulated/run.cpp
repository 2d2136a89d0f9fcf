// run LIBRARY REQUEST ANSWER: calls operators of the CPU library as PyTorch's dispatcher would. Files are written and
// read by emulated/__init__.py; all numbers are little-endian, 64 bits.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "torch.h"

namespace {

[[noreturn]] void fail(const char* what, const char* which) {
  std::fprintf(stderr, "run: %s: %s\n", what, which);
  std::exit(2);
}

void read(void* to, int64_t bytes) {
  if (std::fread(to, 1, size_t(bytes), stdin) != size_t(bytes)) fail("ends early", "the request");
}
void write(const void* from, int64_t bytes) {
  if (std::fwrite(from, 1, size_t(bytes), stdout) != size_t(bytes)) fail("cannot write", "the answer");
}
int64_t read_number() {
  int64_t n = 0;
  read(&n, 8);
  return n;
}
void write_number(int64_t n) { write(&n, 8); }
std::string read_text() {
  const auto length = size_t(read_number());
  std::string s(length, '\0');
  read(s.data(), int64_t(s.size()));
  return s;
}
void write_text(const std::string& s) {
  write_number(int64_t(s.size()));
  write(s.data(), int64_t(s.size()));
}

int64_t bytes_of(const Tensor& t) {
  int64_t n = element_size(t.dtype);
  for (const int64_t size : t.sizes) n *= size;
  return n;
}

Tensor* read_tensor() {
  const auto dtype = int32_t(read_number());
  const auto dim = size_t(read_number());
  std::vector<int64_t> sizes(dim);
  for (int64_t& size : sizes) size = read_number();
  Tensor* const t = new_tensor(dtype, sizes);
  read(t->data, bytes_of(*t));
  return t;
}

void write_tensor(const Tensor& t) {
  write_number(t.dtype);
  write_number(int64_t(t.sizes.size()));
  for (const int64_t size : t.sizes) write_number(size);
  write(t.data, bytes_of(t));
}

uint64_t read_argument() {
  switch (read_number()) {
    case 0:
      return reinterpret_cast<uint64_t>(read_tensor());
    case 1:  // an int, a bool, or a float's bits
      return uint64_t(read_number());
    case 2:
      return reinterpret_cast<uint64_t>(new std::string(read_text()));
    default: {
      const auto length = size_t(read_number());
      auto* const list = new std::vector<uint64_t>(length);
      for (uint64_t& item : *list) item = uint64_t(read_number());
      return reinterpret_cast<uint64_t>(list);
    }
  }
}

void serve_one() {
  const std::string name = read_text();
  const auto outputs = uint64_t(read_number()), inputs = uint64_t(read_number());
  std::vector<uint64_t> stack(std::max(inputs, outputs));
  for (uint64_t i = 0; i < inputs; ++i) stack[i] = read_argument();
  const Kernel kernel = operator_named(name);
  std::string error = kernel == nullptr ? "no operator of the CPU: " + name : "";
  try {
    if (kernel != nullptr) kernel(stack.data(), inputs, outputs);
  } catch (const std::exception& e) {
    error = e.what();
  }
  write_text(error);
  for (uint64_t i = 0; error.empty() && i < outputs; ++i) {
    auto* const t = reinterpret_cast<Tensor*>(stack[i]);
    write_tensor(*t);
    aoti_torch_delete_tensor_object(t);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) fail("usage", "run LIBRARY");
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) fail("cannot load", dlerror());
  const auto isa = reinterpret_cast<const char* (*)()>(dlsym(library, "gapkern_active_isa"));
  if (isa == nullptr) fail("not gapkern's", arguments[1]);
  write_text(isa());
  std::fflush(stdout);
  for (int next = std::getchar(); next != EOF; next = std::getchar()) {
    std::ungetc(next, stdin);
    serve_one();
  }
}

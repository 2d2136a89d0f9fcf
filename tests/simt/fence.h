// Memory that ends where its allocation does: a kernel that reads or writes beyond an array, or in one that has been
// freed, stops the program. Nothing is used twice.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace fence {

inline constexpr size_t kPage = 4096, kReserved = size_t(1) << 40;
inline char* next = nullptr;

inline void* allocate(size_t bytes) {
  if (!next) {
    void* reserved = mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::bad_alloc();
    next = static_cast<char*>(reserved);
  }
  const size_t held = (bytes + kPage - 1) / kPage * kPage;
  char* first = next;
  next += held + kPage;
  if (mprotect(first, held, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  return first + held - bytes;
}

inline void release(void* memory, size_t bytes) {
  const size_t held = (bytes + kPage - 1) / kPage * kPage;
  char* first = static_cast<char*>(memory) + bytes - held;
  madvise(first, held, MADV_DONTNEED);
  mprotect(first, held, PROT_NONE);
}

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(fence::allocate(count * sizeof(T))); }
  void deallocate(T* memory, size_t count) { release(memory, count * sizeof(T)); }
  friend bool operator==(const Allocator&, const Allocator&) { return true; }
  friend bool operator!=(const Allocator&, const Allocator&) { return false; }
};

}  // namespace fence

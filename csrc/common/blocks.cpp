#include "common/blocks.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>

#include "common/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gapkern {
namespace {

constexpr int64_t kPage = int64_t(2) << 20;
constexpr int64_t kHeader = 64;  // before what is handed out: the block's size

struct Block {
  char* memory;
  int64_t bytes;  // with the header
};

class Pool {
 public:
  // From the held blocks the smallest that fits without wasting half of it.
  void* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = held_.end();
    for (auto it = held_.begin(); it != held_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes && (best == held_.end() || it->bytes < best->bytes)) best = it;
    Block block;
    if (best != held_.end()) {
      block = *best;
      held_bytes_ -= block.bytes;
      held_.erase(best);
    } else {
      block = map(bytes);
      if (block.memory == nullptr) return nullptr;
    }
    used_bytes_ += block.bytes;
    most_bytes_ = std::max(most_bytes_, used_bytes_);
    shrink();
    *reinterpret_cast<int64_t*>(block.memory) = block.bytes;
    return block.memory + kHeader;
  }

  void give(char* memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ -= bytes;
    if (!mark_free(memory, bytes)) return unmap({memory, bytes});
    held_.push_back({memory, bytes});
    held_bytes_ += bytes;
    shrink();
  }

 private:
  void shrink() {
    while (!held_.empty() && held_bytes_ + used_bytes_ > most_bytes_ + most_bytes_ / 2) {
      held_bytes_ -= held_.front().bytes;
      unmap(held_.front());
      held_.pop_front();
    }
  }

#if defined(__linux__)
  static Block map(int64_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    void* p = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return {nullptr, 0};
    want_huge_pages(p, bytes);
    return {static_cast<char*>(p), bytes};
  }
  static bool mark_free(char* memory, int64_t bytes) { return madvise(memory, size_t(bytes), MADV_FREE) == 0; }
  static void unmap(const Block& block) { munmap(block.memory, size_t(block.bytes)); }
#else
  static Block map(int64_t bytes) {
    bytes = (bytes + kHeader - 1) / kHeader * kHeader;
    return {static_cast<char*>(std::aligned_alloc(kHeader, size_t(bytes))), bytes};
  }
  static bool mark_free(char*, int64_t) { return false; }
  static void unmap(const Block& block) { std::free(block.memory); }
#endif

  std::mutex mutex_;
  std::list<Block> held_;  // oldest first
  int64_t used_bytes_ = 0, held_bytes_ = 0, most_bytes_ = 0;
};

// Never destroyed: tensors that hold a block may outlive the library's static objects.
Pool& pool() {
  static Pool* const all = new Pool;
  return *all;
}

// Below this malloc does as well, and keeps what is given back by itself.
constexpr int64_t kLeast = int64_t(1) << 20;

}  // namespace

void* take_block(int64_t bytes) {
  bytes = std::max<int64_t>(bytes, 1) + kHeader;
  if (bytes >= kLeast) return pool().take(bytes);
  bytes = (bytes + kHeader - 1) / kHeader * kHeader;
  char* memory = static_cast<char*>(std::aligned_alloc(kHeader, size_t(bytes)));
  if (memory == nullptr) return nullptr;
  *reinterpret_cast<int64_t*>(memory) = bytes;
  return memory + kHeader;
}

void give_block(void* block) {
  if (block == nullptr) return;
  char* memory = static_cast<char*>(block) - kHeader;
  const int64_t bytes = *reinterpret_cast<const int64_t*>(memory);
  if (bytes >= kLeast)
    pool().give(memory, bytes);
  else
    std::free(memory);
}

}  // namespace gapkern

#include "common/allocator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

#include "common/pages.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace gapkern {
namespace {

// A block ahead of what is handed out of it. Nodes are made with the blocks and move between the lists: giving back
// allocates nothing.
struct Block {
  char* memory;
  int64_t bytes;  // with the header
};
using Blocks = std::list<Block>;

// Before what is handed out.
struct alignas(64) Header {
  int64_t bytes;
  bool pooled;  // else malloc's
  Blocks::iterator node;
};
constexpr int64_t kHeader = sizeof(Header);

// Below this malloc does as well, and keeps what is given back by itself.
constexpr int64_t kLeast = int64_t(1) << 20;

#if defined(__linux__)
constexpr int64_t kPage = int64_t(2) << 20;

char* map(int64_t bytes) {
  void* p = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  want_huge_pages(p, bytes);
  return static_cast<char*>(p);
}
bool mark_free(const Block& block) { return madvise(block.memory, size_t(block.bytes), MADV_FREE) == 0; }
void unmap(const Block& block) { munmap(block.memory, size_t(block.bytes)); }
#else
constexpr int64_t kPage = kHeader;

char* map(int64_t bytes) { return static_cast<char*>(std::aligned_alloc(size_t(kHeader), size_t(bytes))); }
bool mark_free(const Block&) { return false; }
void unmap(const Block& block) { std::free(block.memory); }
#endif

void unmap_all(const Blocks& blocks) {
  for (const Block& block : blocks) unmap(block);
}

// The most that was in use at a time, over the last kPeriod to 2 kPeriod blocks taken.
class Peak {
 public:
  void see(int64_t used) {
    if (++seen_ > kPeriod) {
      before_ = now_;
      now_ = 0;
      seen_ = 1;
    }
    now_ = std::max(now_, used);
  }
  int64_t bytes() const { return std::max(now_, before_); }
  void reset() { *this = Peak(); }

 private:
  static constexpr int kPeriod = 64;
  int64_t now_ = 0, before_ = 0;
  int seen_ = 0;
};

// System calls are made without the lock.
class Pool {
 public:
  Pool() {
#if defined(__linux__)
    // A child must not inherit a lock that a thread of its parent's held.
    pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); }, [] { pool().mutex_.unlock(); });
#endif
  }

  // Never destroyed: tensors that hold a block may outlive the library's static objects.
  static Pool& pool() {
    static Pool* const all = new Pool;
    return *all;
  }

  // From the held blocks the smallest that fits without wasting half of it.
  Header* take(int64_t bytes) {
    Blocks taken, dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = held_.end();
      for (auto it = held_.begin(); it != held_.end(); ++it)
        if (it->bytes >= bytes && it->bytes <= 2 * bytes && (best == held_.end() || it->bytes < best->bytes)) best = it;
      if (best != held_.end()) {
        held_bytes_ -= best->bytes;
        taken.splice(taken.end(), held_, best);
      }
    }
    if (taken.empty()) {
      try {
        taken.push_back({nullptr, (bytes + kPage - 1) / kPage * kPage});
      } catch (const std::bad_alloc&) {
        return nullptr;
      }
      Block& block = taken.back();
      block.memory = map(block.bytes);
      if (block.memory == nullptr && empty_cache() > 0) block.memory = map(block.bytes);
      if (block.memory == nullptr) return nullptr;
    }
    const Blocks::iterator node = taken.begin();
    auto* const header = new (node->memory) Header{node->bytes, true, node};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_.splice(used_.end(), taken);
      used_bytes_ += node->bytes;
      peak_.see(used_bytes_);
      shrink(dropped);
    }
    unmap_all(dropped);
    return header;
  }

  void give(Blocks::iterator node) noexcept {
    const bool keep = mark_free(*node);  // the header is gone with it
    Blocks dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_bytes_ -= node->bytes;
      if (keep) {
        held_bytes_ += node->bytes;
        held_.splice(held_.end(), used_, node);
        shrink(dropped);
      } else {
        dropped.splice(dropped.end(), used_, node);
      }
    }
    unmap_all(dropped);
  }

  int64_t empty_cache() {
    Blocks dropped;
    int64_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      dropped.swap(held_);
      std::swap(bytes, held_bytes_);
      peak_.reset();
    }
    unmap_all(dropped);
    return bytes;
  }

 private:
  // The oldest go first.
  void shrink(Blocks& dropped) {
    while (!held_.empty() && held_bytes_ + used_bytes_ > peak_.bytes() + peak_.bytes() / 2) {
      held_bytes_ -= held_.front().bytes;
      dropped.splice(dropped.end(), held_, held_.begin());
    }
  }

  std::mutex mutex_;
  Blocks used_, held_;  // held_: oldest first
  int64_t used_bytes_ = 0, held_bytes_ = 0;
  Peak peak_;
};

std::atomic<bool> filling{false};

}  // namespace

void* allocate(int64_t bytes) {
  bytes = std::max<int64_t>(bytes, 1) + kHeader;
  Header* header = nullptr;
  if (bytes >= kLeast) {
    header = Pool::pool().take(bytes);
  } else {
    const int64_t whole = (bytes + kHeader - 1) / kHeader * kHeader;
    if (void* const memory = std::aligned_alloc(size_t(kHeader), size_t(whole)))
      header = new (memory) Header{whole, false, {}};
  }
  if (header == nullptr) return nullptr;
  void* const block = header + 1;
  if (filling.load(std::memory_order_relaxed)) std::memset(block, 0xff, size_t(header->bytes - kHeader));
  return block;
}

void deallocate(void* block) noexcept {
  if (block == nullptr) return;
  Header* const header = static_cast<Header*>(block) - 1;
  if (header->pooled)
    Pool::pool().give(header->node);
  else
    std::free(header);
}

int64_t empty_cache() { return Pool::pool().empty_cache(); }

void fill_allocations(bool wanted) { filling.store(wanted, std::memory_order_relaxed); }

}  // namespace gapkern

// Loops over PyTorch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

// ThreadSanitizer sees neither OpenMP's fork nor its join.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace gapkern {

// f(begin, end) over parts of [begin, end). What f throws is thrown here: nothing may pass the C functions in between.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr thrown;
  std::mutex mutex;
  char fork, join;
  __tsan_release(&fork);
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    __tsan_acquire(&fork);
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
    __tsan_release(&join);
  });
  __tsan_acquire(&join);
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace gapkern

// Loops over PyTorch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

namespace gapkern {

// ThreadSanitizer sees neither OpenMP's fork nor its join. Globals, since what a closure holds is read after the fork.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
inline char forks, joins;
inline void on_release(char& point) { __tsan_release(&point); }
inline void on_acquire(char& point) { __tsan_acquire(&point); }
#else
struct Unordered {
} inline forks, joins;
inline void on_release(Unordered) {}
inline void on_acquire(Unordered) {}
#endif

// f(begin, end) over parts of [begin, end). What f throws is thrown here: nothing may pass the C functions in between.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr thrown;
  std::mutex mutex;
  const auto part = [&](int64_t first, int64_t last) {
    on_acquire(forks);
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
    on_release(joins);
  };
  on_release(forks);
  torch::stable::parallel_for(begin, end, grain, part);
  on_acquire(joins);
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace gapkern

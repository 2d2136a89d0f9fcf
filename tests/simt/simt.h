// CUDA's threads on the CPU: one fiber per thread, the blocks of a grid in turn. The same .cuh is compiled by nvcc and,
// with this header on the include path, by any C++ compiler.
//
// Found: barriers that not all threads reach, shuffles with lanes missing or masks that differ, reads of shared memory
// nobody has written (it holds NaN), writes just outside it, and, by running the threads of a block in both orders,
// results that depend on their order. `skipped` leaves out one barrier: a kernel's test must then fail, or the barrier
// is not needed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace simt {

enum class State { ready, at_barrier, at_shuffle, done };

// Where in the kernels' sources.
struct Site {
  const char* file = "";
  int line = 0;
  int order(const Site& other) const { return file == other.file ? 0 : std::strcmp(file, other.file); }
  bool operator==(const Site& other) const { return line == other.line && order(other) == 0; }
  bool operator!=(const Site& other) const { return !(*this == other); }
  bool operator<(const Site& other) const { return line < other.line || (line == other.line && order(other) < 0); }
  std::string text() const {
    return std::string(file).substr(std::string(file).rfind('/') + 1) + ":" + std::to_string(line);
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  unsigned mask;
  uint64_t slot;
  Site site;
  static constexpr size_t kStack = 256 << 10;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current = 0;
inline std::function<void()> body;
inline dim3 grid, block, block_index;
inline std::map<Site, std::vector<char>> shared_arrays;
inline bool reversed = false;
inline Site skipped;             // the barrier to leave out
inline std::set<Site> barriers;  // those that were reached

inline constexpr size_t kMargin = 4096;  // bytes on either side of a shared array that nobody may write

template <class T>
T* shared(size_t count, Site site) {
  std::vector<char>& bytes = shared_arrays[site];
  if (bytes.empty()) bytes.assign(count * sizeof(T) + 2 * kMargin, char(0xff));  // NaN
  return reinterpret_cast<T*>(bytes.data() + kMargin);
}

inline void check_margins() {
  for (const auto& [site, bytes] : shared_arrays)
    for (size_t i = 0; i < kMargin; ++i)
      if (bytes[i] != char(0xff) || bytes[bytes.size() - 1 - i] != char(0xff))
        throw std::runtime_error("a write beside the shared array at " + site.text());
}

// Between stacks by jumps: swapcontext asks the kernel for the signal mask every time.
inline void leave(Fiber& f) {
  if (!_setjmp(f.place)) _longjmp(scheduler, 1);
}
inline void resume(Fiber& f) {
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  setcontext(&f.start);
}

// One block's thread after the other.
inline void enter() {
  for (;;) {
    body();
    fibers[current].state = State::done;
    leave(fibers[current]);
  }
}

inline void park(State state, unsigned mask, Site site) {
  Fiber& me = fibers[current];
  me.state = state;
  me.mask = mask;
  me.site = site;
  leave(me);
}

inline void barrier(Site site) {
  barriers.insert(site);
  if (site != skipped) park(State::at_barrier, 0, site);
}

// Lets a warp go on whose named lanes have all arrived at one shuffle.
inline bool release_warp(int first, int lane) {
  const Fiber& asking = fibers[first + lane];
  for (int other = 0; other < 32; ++other) {
    if (!(asking.mask >> other & 1)) continue;
    if (first + other >= int(fibers.size()) || fibers[first + other].state == State::done)
      throw std::runtime_error("a shuffle at " + asking.site.text() + " names a lane that has left");
    const Fiber& f = fibers[first + other];
    if (f.state != State::at_shuffle) return false;
    if (f.mask != asking.mask || f.site != asking.site)
      throw std::runtime_error("lanes of a warp at different shuffles, " + asking.site.text());
  }
  for (int other = 0; other < 32; ++other)
    if (asking.mask >> other & 1) fibers[first + other].state = State::ready;
  return true;
}

inline bool release_block() {
  int waiting = 0, done = 0;
  for (const Fiber& f : fibers) waiting += f.state == State::at_barrier, done += f.state == State::done;
  if (waiting == 0 || waiting + done < int(fibers.size())) return false;
  if (done) throw std::runtime_error("__syncthreads after some threads have left");
  for (const Fiber& f : fibers)
    if (f.site != fibers[0].site) throw std::runtime_error("threads of a block at different barriers");
  for (Fiber& f : fibers) f.state = State::ready;
  return true;
}

// Lets a warp's threads run to where they wait for each other; whether any of them moved.
inline bool run_warp(int first, int threads) {
  const int last = std::min(first + 32, threads);
  bool moved = false;
  for (int i = first; i < last; ++i) {
    current = reversed ? last - 1 - (i - first) : i;
    if (fibers[current].state != State::ready) continue;
    resume(fibers[current]);
    moved = true;
  }
  for (int i = first; i < last; ++i)
    if (fibers[i].state == State::at_shuffle) moved = release_warp(first, i - first) || moved;
  return moved;
}

// A warp runs as far as it can before the next one starts: between barriers nothing else holds them together.
inline void run_block(int threads) {
  const int warps = (threads + 31) / 32;
  shared_arrays.clear();
  fibers.resize(threads);
  for (Fiber& f : fibers) {
    if (!f.started || f.state != State::done) {  // of a block that came to its end they go on
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = Fiber::kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, enter, 0);
      f.started = false;
    }
    f.state = State::ready;
  }
  for (;;) {
    bool moved = false;
    for (int w = 0; w < warps; ++w)
      while (run_warp(32 * (reversed ? warps - 1 - w : w), threads)) moved = true;
    bool all_done = true;
    for (const Fiber& f : fibers) all_done = all_done && f.state == State::done;
    if (all_done) return check_margins();
    moved = release_block() || moved;
    if (!moved) throw std::runtime_error("threads wait for each other");
  }
}

template <class Kernel, class... Arguments>
void launch(dim3 blocks, dim3 threads, Kernel kernel, Arguments... arguments) {
  grid = blocks;
  block = threads;
  body = [=] { kernel(arguments...); };
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(int(block.x * block.y * block.z));
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return unsigned(current) % block.x; }
  } x;
  struct {
    operator unsigned() const { return unsigned(current) / block.x % block.y; }
  } y;
};

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8);
  const int me = current;
  memcpy(&fibers[me].slot, &value, sizeof(T));
  park(State::at_shuffle, mask, site);
  const uint64_t got = fibers[me / 32 * 32 + (source & 31)].slot;
  park(State::at_shuffle, mask, site);  // nobody overwrites a slot before all have read
  memcpy(&value, &got, sizeof(T));
  return value;
}

// One bit for each lane; those that `mask` does not name are zero.
inline unsigned ballot(unsigned mask, bool value, Site site) {
  const int me = current;
  fibers[me].slot = value;
  park(State::at_shuffle, mask, site);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) bits |= unsigned(fibers[me / 32 * 32 + lane].slot) << lane;
  park(State::at_shuffle, mask, site);
  return bits;
}

}  // namespace simt

inline simt::ThreadIndex threadIdx;
#define blockIdx simt::block_index
#define blockDim simt::block
#define gridDim simt::grid
#define GAPKERN_SITE (simt::Site{__FILE__, __LINE__})
#define __syncthreads() simt::barrier(GAPKERN_SITE)
#define __shfl_xor_sync(mask, value, lanes) simt::shuffle(mask, value, (simt::current & 31) ^ (lanes), GAPKERN_SITE)
#define __shfl_sync(mask, value, lane) simt::shuffle(mask, value, lane, GAPKERN_SITE)
#define __ballot_sync(mask, value) simt::ballot(mask, value, GAPKERN_SITE)
#define __popc __builtin_popcount

// A caching allocator for large scratch and results. A fresh page costs a fault, in a virtual machine often a second
// one in the host, and together they can cost more than all that is computed there. Freed blocks stay mapped, marked
// MADV_FREE so that the system may reclaim their pages, and with those in use never exceed 1.5 times the recent peak.
#pragma once
#include <cstdint>

namespace gapkern {

// Uninitialised, aligned to a cache line; null where there is no memory. For deallocate alone to free.
void* allocate(int64_t bytes);
void deallocate(void* block) noexcept;

// Unmaps what is held and not in use; returns how many bytes that were.
int64_t empty_cache();

// From now on every allocation is filled with NaN (as integers: -1), so that what is never written is found.
void fill_allocations(bool wanted);

}  // namespace gapkern

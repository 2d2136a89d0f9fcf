// Large work space that the next call finds again. A fresh page costs a fault, in a virtual machine often a second one
// in the host, and together they can cost more than all that is computed there. What is given back stays mapped, marked
// as free for the system to take whenever it wants memory, and in all never more than half as much again as was once in
// use at a time.
#pragma once
#include <cstdint>

namespace gapkern {

// Uninitialised, aligned to a cache line; null where there is no memory. For give_block alone to free.
void* take_block(int64_t bytes);
void give_block(void* block);

}  // namespace gapkern

// A hint to the processor.
#pragma once

#include <cstdint>

#include "vec.h"

namespace {

// `ahead`: bytes; it may lead out of the tensor, for which the address is no pointer until then. kLocality as
// __builtin_prefetch has it: 3 for the first-level cache too, 2 for the second.
template <int kLocality = 3>
[[maybe_unused]] ALWAYS_INLINE void prefetch(const void* p, int64_t ahead = 0) {
#ifdef __GNUC__
    const uintptr_t address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead);
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, kLocality);
#else
    (void)p;
    (void)ahead;
#endif
}

}  // namespace

#pragma once

#include "../kth_largest.h"
#include "kernels.h"

// At most `threads` threads. False: out of memory.
DECLARE_CPU_KERNEL(kth_largest, bool(const KthLargestArgs& args, int threads))

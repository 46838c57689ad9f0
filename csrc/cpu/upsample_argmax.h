#pragma once

#include "../upsample_argmax.h"
#include "kernels.h"

// At most `threads` threads. False: out of memory.
DECLARE_CPU_KERNEL(upsample_argmax, bool(const UpsampleArgmaxArgs& args, int threads))

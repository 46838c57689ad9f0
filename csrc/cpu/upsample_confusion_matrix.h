#pragma once

#include "../upsample_confusion_matrix.h"
#include "kernels.h"

// At most `threads` threads. False: out of memory.
DECLARE_CPU_KERNEL(upsample_confusion_matrix, bool(const UpsampleConfusionArgs& args, int threads))

#pragma once

#include "../confusion_matrix.h"
#include "kernels.h"

// Adds to args.counts and args.out_of_range with at most `threads` threads. False: out of memory.
DECLARE_CPU_KERNEL(confusion_matrix, bool(const ConfusionArgs& args, int threads))

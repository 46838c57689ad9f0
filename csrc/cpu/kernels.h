// The CPU kernels, declared once for every instruction set that they are compiled for.
#pragma once

#include "../confusion_matrix.h"

// Adds to args.counts and args.out_of_range with at most `threads` threads. False: out of memory.
using ConfusionMatrixKernel = bool(const ConfusionArgs& args, int threads);

#define DECLARE_CPU_KERNELS(isa)                   \
    namespace isa {                                \
    extern ConfusionMatrixKernel confusion_matrix; \
    }

DECLARE_CPU_KERNELS(portable)
DECLARE_CPU_KERNELS(avx2)
DECLARE_CPU_KERNELS(avx512)
#undef DECLARE_CPU_KERNELS

#pragma once

#include <cstdint>

#include "../types.h"
#include "input_norm.h"
#include "kernels.h"

struct DepthwiseArgs {
    const void* x;       // (N, H, W, C)
    void* y;             // (N, ceil(H / stride), ceil(W / stride), C)
    const void* weight;  // (C, kernel, kernel)
    const float* scale;  // (C,), or null: 1
    const float* shift;  // (C,), or null: 0
    DType type;          // of x, y and weight
    int64_t batch, height, width, channels;
    int64_t kernel, stride, dilation;  // the padding is dilation * (kernel / 2)
    Activation activation;
    float* mean;  // (C,) of the rounded y over N, H, W, the variance biased; or null
    float* variance;
    InputNorm norm;  // of x, whose padding is zero behind it; only where mean and variance are asked for
};

// False: out of memory.
DECLARE_CPU_KERNEL(depthwise_conv, bool(const DepthwiseArgs& args, int threads))

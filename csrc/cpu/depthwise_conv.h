#pragma once

#include <cstdint>

#include "../types.h"
#include "kernels.h"

// One of the convolutions of the same x; its padding is dilation * (kernel / 2).
struct DepthwiseRate {
    void* y;             // (N, ceil(H / stride), ceil(W / stride), C)
    const void* weight;  // (C, kernel, kernel)
    const float* scale;  // (C,), or null: 1
    const float* shift;  // (C,), or null: 0
    int64_t dilation;
};

struct DepthwiseArgs {
    const void* x;  // (N, H, W, C)
    DType type;     // of x, every y and every weight
    int64_t batch, height, width, channels;
    int64_t kernel, stride;
    Activation activation;
    const DepthwiseRate* rate;  // (rates,)
    int rates;
    // (C,) of the rounded y over N, H, W, the variance biased; or null, and always null for several rates
    float* mean;
    float* variance;
};

// False: out of memory.
DECLARE_CPU_KERNEL(depthwise_conv, bool(const DepthwiseArgs& args, int threads))

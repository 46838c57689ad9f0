#pragma once

#include <cstdint>

#include "../types.h"
#include "kernels.h"

struct SeparableConvArgs {
    DType type;                    // of x, depthwise, pointwise and y
    const void* x;                 // (N, H, W, C)
    const void* depthwise;         // (C, 3, 3)
    const void* pointwise;         // (M, C)
    const float* depthwise_scale;  // (C), or null: 1
    const float* depthwise_shift;  // (C), or null: 0
    Activation depthwise_activation;
    const float* scale;  // (M), or null: 1
    const float* shift;  // (M), or null: 0
    Activation activation;
    void* y;          // (N, out_height, out_width, M)
    int64_t y_pixel;  // elements from a pixel of y to the next
    int64_t images, channels, height, width;
    int64_t out_channels, out_height, out_width;
    int64_t stride, dilation;  // the zero padding is the dilation
};

// At most `threads` threads. False: out of memory.
DECLARE_CPU_KERNEL(separable_conv, bool(const SeparableConvArgs& args, int threads))

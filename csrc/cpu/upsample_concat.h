#pragma once

#include <cstdint>

#include "../types.h"
#include "kernels.h"

// All tensors are packed channels-last: (images, height, width, channels) in memory, of one dtype.
struct UpsampleConcatShape {
    DType dtype;
    int64_t images;
    int64_t channels;      // C, of x
    int64_t low_channels;  // C', of low_level; may be 0
    int64_t height;        // h, w: of x
    int64_t width;
    int64_t out_height;  // H, W: of low_level and of the result
    int64_t out_width;
    bool align_corners;
};

struct UpsampleConcatArgs {
    UpsampleConcatShape shape;
    const void* x;
    const void* low_level;
    void* out;
};

struct UpsampleConcatBackwardArgs {
    UpsampleConcatShape shape;
    const void* grad;  // of the result
    void* grad_x;      // null: not wanted
    void* grad_low;    // null: not wanted
};

// With at most `threads` threads. False: out of memory.
DECLARE_CPU_KERNEL(upsample_concat, bool(const UpsampleConcatArgs& args, int threads))
DECLARE_CPU_KERNEL(upsample_concat_backward, bool(const UpsampleConcatBackwardArgs& args, int threads))

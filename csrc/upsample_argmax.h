// What the CPU and the CUDA kernel of upsample_argmax are given.
#pragma once

#include <cstdint>

#include "types.h"

// Low-resolution logits (batch, classes, height, width). Steps are in elements. The CPU kernels want that of
// the classes or that of the columns to be 1.
struct LogitsMap {
    const void* data;
    DType type;
    int64_t batch, classes, height, width;
    int64_t image_step, class_step, row_step, column_step;
};

struct UpsampleArgmaxArgs {
    LogitsMap logits;
    int64_t height, width;  // of the result
    bool align_corners;
    uint8_t* labels;  // (batch, height, width)
};

#pragma once

#include <cstdint>

#include "../types.h"
#include "kernels.h"

struct NormalizeArgs {
    const uint8_t* images;  // (batch, height, width, 3), the last two packed
    int64_t image_stride, row_stride;
    int64_t batch, height, width;
    const float* colour;       // (batch, 3): brightness, contrast, saturation; or null
    const float* taps;         // (batch, 2 radius + 1): of the blur, all zero where there is none; or null
    int64_t radius;            // of taps
    float grey[3];             // weights of the luma
    float factor[3], bias[3];  // out = pixel * factor + bias
    void* out;                 // (batch, height, width, 3), packed
    DType out_type;
};

// False: out of memory.
DECLARE_CPU_KERNEL(normalize_image, bool(const NormalizeArgs& args, int threads))

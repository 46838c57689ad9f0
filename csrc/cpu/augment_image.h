#pragma once

#include <cstdint>

#include "kernels.h"

// A rectangle of a source resized to scaled_height x scaled_width, in the coordinates of the resized image;
// what lies outside of that is padding.
struct CropArgs {
    const uint8_t* source;  // (height, width, channels), packed but for the rows
    int64_t row_stride;     // bytes
    int64_t height, width;
    int64_t scaled_height, scaled_width;
    int64_t top, bottom, left, right;
    bool flip;       // left becomes right
    uint8_t pad[3];  // of the image; a mask takes the first
    uint8_t* out;    // (bottom - top, right - left, channels), packed
};

// 3 channels, bilinear, antialiased where it shrinks. False: out of memory.
DECLARE_CPU_KERNEL(augment_image, bool(const CropArgs& args, int threads))
// 1 channel, nearest. False: out of memory.
DECLARE_CPU_KERNEL(augment_image_mask, bool(const CropArgs& args, int threads))

// Crop, scale and flip of a uint8 image or of its mask: what the CPU and the CUDA kernels share.
#pragma once

#include <cstdint>

#include "host_device.h"

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

// Static throughout: see confusion_matrix.h.

HOST_DEVICE static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Span {
    int64_t begin, end;
};

// Which part of an axis of the output lies in the scaled image; empty at 0 where none does.
HOST_DEVICE static inline Span inside(int64_t begin, int64_t end, int64_t scaled) {
    const Span span = {larger(0, -begin), smaller(end, scaled) - begin};
    return span.begin < span.end ? span : Span{0, 0};
}

// The same where the output runs backwards.
HOST_DEVICE static inline Span reversed(Span span, int64_t length) {
    return {length - span.end, length - span.begin};
}

// The source pixel that the centre of the scaled pixel `at` falls on.
HOST_DEVICE static inline int64_t nearest(int64_t at, int64_t source, int64_t scaled) {
    return (2 * at + 1) * source / (2 * scaled);
}

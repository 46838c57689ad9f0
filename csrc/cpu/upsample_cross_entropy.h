#pragma once

#include <cstdint>

#include "../types.h"
#include "kernels.h"

// N images, K classes, h x w logits, H x W labels.
struct CrossEntropyArgs {
    const void* logits;      // (N, h, w, K)
    DType dtype;             // of logits
    const void* target;      // (N, H, W) int64 or uint8
    bool wide_target;        // int64
    const float* weight;     // (K), or null for ones
    const float* grad_loss;  // (N, H, W), or null for ones
    int64_t batch, classes, height, width, out_height, out_width;
    int64_t ignore_index;
    float label_smoothing;
    bool align_corners;
    float* losses;          // (N, H, W), or null
    float* grad;            // (N, h, w, K) gradient of the sum of grad_loss * losses, or null
    float* loss;            // scalar: the sum of the losses
    float* weight_sum;      // scalar
    int64_t* out_of_range;  // scalar
};

// With at most `threads` threads; the result does not depend on their number. False: out of memory.
DECLARE_CPU_KERNEL(upsample_cross_entropy, bool(const CrossEntropyArgs& args, int threads))

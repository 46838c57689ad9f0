#pragma once

#include <cstdint>

#include "../types.h"
#include "input_norm.h"
#include "kernels.h"

// Gradients of y = depthwise_conv(x, weight) with padding = dilation * (kernel / 2). Activations are packed
// channels-last.
struct DepthwiseBackwardArgs {
    const void* grad_y;  // (N, out_height, out_width, C)
    const void* x;       // (N, height, width, C)
    const void* weight;  // (C, kernel, kernel)
    void* grad_x;        // as x; null: not needed
    void* grad_weight;   // as weight; null: not needed
    DType dtype;         // of grad_y, x and grad_x
    DType weight_dtype;  // of weight and grad_weight
    int64_t batch;
    int64_t channels;
    int64_t height;
    int64_t width;
    int64_t out_height;
    int64_t out_width;
    int64_t kernel;  // odd
    int64_t stride;
    int64_t dilation;
    // With a norm of x, grad_x is the gradient of the norm's result where the activation let it pass; both
    // gradients are needed then, and (C,) the sums of grad_x and of its product with the normalised x.
    InputNorm norm;
    float* sum_grad;
    float* sum_grad_xhat;
};

// With at most `threads` threads; the result does not depend on their number. False: out of memory.
DECLARE_CPU_KERNEL(depthwise_conv_backward, bool(const DepthwiseBackwardArgs& args, int threads))

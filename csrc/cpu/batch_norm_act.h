#pragma once

#include <cstdint>

#include "../types.h"
#include "kernels.h"

// One set of fields for the four kernels; what a kernel does not name is null. Tensors are (pixels,
// channels), packed, of `dtype`; everything per channel is fp32.
struct BatchNormActArgs {
    DType dtype;
    Activation activation;
    int64_t pixels, channels;
    const void *x, *y, *grad, *residual;      // y: the mask of the activation comes from it where it is given
    const float *mean, *var, *weight, *bias;  // mean null: weight and bias are a finished scale and shift
    float eps;
    const float *sum_grad, *sum_grad_xhat;
    int64_t count;  // pixels behind the sums, of all processes
    void *result, *masked;
    float *first, *second;  // mean and var, or sum_grad and sum_grad_xhat
};

// All return false where they are out of memory.
// first, second = mean and biased variance of x
DECLARE_CPU_KERNEL(batch_norm_act_statistics, bool(const BatchNormActArgs& args, int threads))
// result = act((x - mean) * rsqrt(var + eps) * weight + bias + residual)
DECLARE_CPU_KERNEL(batch_norm_act_forward, bool(const BatchNormActArgs& args, int threads))
// first, second = sums of the masked gradient, and of its product with the normalised x
DECLARE_CPU_KERNEL(batch_norm_act_reduce, bool(const BatchNormActArgs& args, int threads))
// result = gradient of x, masked (where not null) = gradient of the residual. Without mean: of the frozen
// form.
DECLARE_CPU_KERNEL(batch_norm_act_apply, bool(const BatchNormActArgs& args, int threads))

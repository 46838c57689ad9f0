// The batch norm and the activation that a kernel applies to its input as it loads it.
#pragma once

#include <math.h>

#include "../types.h"

struct InputNorm {
    const float *mean, *var, *weight, *bias;  // (C,); mean null: the input is taken as it is
    float eps;
    Activation activation;
};

namespace {

// z = x * scale + shift, activated: between `low` and `high`. In fp32, and the same in both directions.
inline float norm_rstd(const InputNorm& norm, int64_t c) { return 1.0f / sqrtf(norm.var[c] + norm.eps); }
inline float norm_scale(const InputNorm& norm, int64_t c) { return norm.weight[c] * norm_rstd(norm, c); }
inline float norm_shift(const InputNorm& norm, int64_t c) {
    return norm.bias[c] - norm.mean[c] * norm_scale(norm, c);
}
inline float lower_bound(Activation activation) {
    return activation == Activation::none ? -1.0f / 0.0f : 0.0f;
}
inline float upper_bound(Activation activation) {
    return activation == Activation::relu6 ? 6.0f : 1.0f / 0.0f;
}

}  // namespace

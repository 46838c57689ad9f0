// What the batch norm kernels do with a tensor's type, its activation and its per-channel values.
#pragma once

#include <math.h>

#include <cstdlib>

#include "batch_norm_rows.h"

namespace {

// --- per channel values, repeated over a wide row ---

struct Tables {
    float *mean, *scale, *shift;  // z = (x - mean) * scale + shift
    float *slope, *offset;        // grad_x = scale * grad + slope * (x - mean) + offset
};

bool make_tables(const BatchNormActArgs& args, int64_t width, Tables* tables) {
    float* memory = static_cast<float*>(std::malloc(static_cast<size_t>(width) * 5 * sizeof(float)));
    if (memory == nullptr) return false;
    *tables = {memory, memory + width, memory + 2 * width, memory + 3 * width, memory + 4 * width};
    const float over = args.count > 0 ? 1.0f / static_cast<float>(args.count) : 0.0f;
    for (int64_t i = 0; i < width; ++i) {
        if (i >= args.channels) {
            for (int table = 0; table < 5; ++table)
                memory[table * width + i] = memory[table * width + i - args.channels];
            continue;
        }
        const int64_t c = i;
        const float rstd = args.mean ? 1.0f / sqrtf(args.var[c] + args.eps) : 1.0f;
        tables->mean[i] = args.mean ? args.mean[c] : 0.0f;
        tables->scale[i] = args.weight[c] * rstd;
        tables->shift[i] = args.bias ? args.bias[c] : 0.0f;
        const float scale = tables->scale[i];
        tables->slope[i] = args.sum_grad ? -scale * rstd * (args.sum_grad_xhat[c] * over) : 0.0f;
        tables->offset[i] = args.sum_grad ? -scale * (args.sum_grad[c] * over) : 0.0f;
    }
    return true;
}

// --- from run-time types to the functions above ---

template <class Use>
void for_types(const BatchNormActArgs& args, Use use) {
    const auto for_activation = [&](auto type) {
        if (args.activation == Activation::relu) return use(type, Count<1>{});
        if (args.activation == Activation::relu6) return use(type, Count<2>{});
        return use(type, Count<0>{});
    };
    if (args.dtype == DType::bf16) return for_activation(bf16{});
    return for_activation(float{});
}

}  // namespace

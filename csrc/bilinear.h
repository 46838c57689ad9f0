// Where a pixel of a bilinearly resized axis comes from: index arithmetic that the CPU and the CUDA kernels
// share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BILINEAR_HOST_DEVICE __host__ __device__
#else
#define BILINEAR_HOST_DEVICE
#endif

// Static throughout: see confusion_matrix.h.

// One output position reads (1 - weight) * source[low] + weight * source[high].
struct BilinearTap {
    int64_t low;
    int64_t high;  // low + 1, or low at the end of the axis
    float weight;
};

// The step in the source for one step in the output, in fp32 as torch.nn.functional.interpolate with a size
// has it.
BILINEAR_HOST_DEVICE static inline float bilinear_scale(int64_t source, int64_t output, bool align_corners) {
    if (align_corners)
        return output > 1 ? static_cast<float>(source - 1) / static_cast<float>(output - 1) : 0.0f;
    return static_cast<float>(source) / static_cast<float>(output);
}

BILINEAR_HOST_DEVICE static inline BilinearTap bilinear_tap(int64_t position, int64_t source, int64_t output,
                                                            float scale, bool align_corners) {
    if (source == output) return {position, position, 0.0f};
    float at = align_corners ? scale * static_cast<float>(position)
                             : scale * (static_cast<float>(position) + 0.5f) - 0.5f;
    if (at < 0.0f) at = 0.0f;
    int64_t low = static_cast<int64_t>(at);
    if (low > source - 1) low = source - 1;
    float weight = at - static_cast<float>(low);
    if (weight > 1.0f) weight = 1.0f;
    return {low, low < source - 1 ? low + 1 : low, weight};
}

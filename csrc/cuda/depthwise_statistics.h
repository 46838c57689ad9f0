// Mean and variance of each channel of a depthwise convolution's result: parts, then all of them.
//
// A part is a count, and means and sums of squared deviations of C channels; 8 bytes a channel beside the
// tile's results. Parts are merged by Chan's formula in a fixed order, so that two runs agree.
#pragma once

#include "depthwise_plan.h"
#include "lanes.h"

namespace {

constexpr int kMergeChannels = 32;  // of a block: 128 bytes of a row of means
constexpr int kMergeThreads = 1024;

struct Moments {
    float count, mean, square;  // square: the sum of squared deviations

    __device__ void add(const Moments& other) {
        if (other.count == 0.0f) return;
        const float total = count + other.count;
        const float apart = other.mean - mean;
        const float share = other.count / total;
        mean += apart * share;
        square += other.square + apart * apart * count * share;
        count = total;
    }
};

// Of the values that one thread has seen, kLanes channels at once.
template <int kLanes>
struct Welford {
    float count;
    float mean[kLanes], square[kLanes];

    __device__ void add(const float (&x)[kLanes]) {
        count += 1.0f;
        const float share = __fdividef(1.0f, count);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            const float apart = x[i] - mean[i];
            mean[i] += apart * share;
            square[i] = __fmaf_rn(apart, x[i] - mean[i], square[i]);
        }
    }
};

// Merges the columns of a tile into part `part`, by all threads. shared: 2 * kDepthwiseThreads * kLanes
// floats
template <int kLanes>
__device__ void save_statistics(const DepthwisePlan& plan, const Welford<kLanes>& of_thread, int columns,
                                int64_t part, uint32_t first_channel, void* shared) {
    float* means = static_cast<float*>(shared);
    float* squares = means + kDepthwiseThreads * kLanes;
    float* counts = squares + kDepthwiseThreads * kLanes;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
        means[threadIdx.x * kLanes + i] = of_thread.mean[i];
        squares[threadIdx.x * kLanes + i] = of_thread.square[i];
    }
    if (threadIdx.x == 0) *counts = of_thread.count;
    __syncthreads();
    const int channels = plan.vectors * kLanes;
    const int mine = static_cast<int>(threadIdx.x);
    const int64_t c = int64_t{first_channel} + mine;
    if (mine >= channels || c >= plan.args.channels) return;
    Moments moments{0.0f, 0.0f, 0.0f};
    for (int i = 0; i < columns; ++i)
        moments.add({*counts, means[i * channels + mine], squares[i * channels + mine]});
    plan.args.means[part * plan.args.channels + c] = moments.mean;
    plan.args.squares[part * plan.args.channels + c] = moments.square;
    if (c == 0) plan.args.counts[part] = moments.count;
}

// The moments of a channel that the block's threads share, merged by the first of them.
__device__ Moments merge_threads(Moments mine, float* shared) {
    const int threads = static_cast<int>(blockDim.x);
    const int at = static_cast<int>(threadIdx.x);
    shared[at] = mine.count;
    shared[threads + at] = mine.mean;
    shared[2 * threads + at] = mine.square;
    __syncthreads();
    if (at < kMergeChannels)
        for (int i = at + kMergeChannels; i < threads; i += kMergeChannels)
            mine.add({shared[i], shared[threads + i], shared[2 * threads + i]});
    return mine;
}

// Parts of a result that has been written, kStatisticsRows pixels each: where its kernel does not take them.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    take_statistics(const DepthwiseCudaArgs args, int64_t pixels) {
    extern __shared__ uint4 shared[];
    const int64_t groups = (args.channels + kMergeChannels - 1) / kMergeChannels;
    const int64_t part = blockIdx.x / groups;
    const int64_t c = (blockIdx.x - part * groups) * kMergeChannels + threadIdx.x % kMergeChannels;
    const int64_t past = (part + 1) * kStatisticsRows;
    const T* y = static_cast<const T*>(args.rate[0].y);
    Welford<1> seen{};
    if (c < args.channels)
        for (int64_t i = part * kStatisticsRows + threadIdx.x / kMergeChannels; i < past && i < pixels;
             i += kDepthwiseThreads / kMergeChannels)
            seen.add({to_float(y[i * args.channels + c])});
    const Moments moments =
        merge_threads({seen.count, seen.mean[0], seen.square[0]}, reinterpret_cast<float*>(shared));
    if (threadIdx.x >= kMergeChannels || c >= args.channels) return;
    args.means[part * args.channels + c] = moments.mean;
    args.squares[part * args.channels + c] = moments.square;
    if (c == 0) args.counts[part] = moments.count;
}

template <class T>
void launch_statistics_of_result(const DepthwisePlan& plan, cudaStream_t stream) {
    const DepthwiseCudaArgs& args = plan.args;
    const int64_t pixels = result_pixels(args);
    const int64_t groups = (args.channels + kMergeChannels - 1) / kMergeChannels;
    const unsigned blocks = static_cast<unsigned>(statistics_parts(plan) * groups);
    const int shared = 3 * kDepthwiseThreads * static_cast<int>(sizeof(float));
    take_statistics<T><<<blocks, kDepthwiseThreads, shared, stream>>>(args, pixels);
}

// All parts of kMergeChannels channels: mean and biased variance.
__global__ void __launch_bounds__(kMergeThreads) merge_parts(const DepthwiseCudaArgs args, int64_t parts) {
    extern __shared__ uint4 shared[];
    const int64_t c = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
    Moments moments{0.0f, 0.0f, 0.0f};
    if (c < args.channels)
        for (int64_t i = threadIdx.x / kMergeChannels; i < parts; i += kMergeThreads / kMergeChannels)
            moments.add(
                {args.counts[i], args.means[i * args.channels + c], args.squares[i * args.channels + c]});
    moments = merge_threads(moments, reinterpret_cast<float*>(shared));
    if (threadIdx.x >= kMergeChannels || c >= args.channels) return;
    args.mean[c] = moments.mean;
    args.variance[c] = moments.square / moments.count;
}

void launch_merge(const DepthwisePlan& plan, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>((plan.args.channels + kMergeChannels - 1) / kMergeChannels);
    const int shared = 3 * kMergeThreads * static_cast<int>(sizeof(float));
    merge_parts<<<blocks, kMergeThreads, shared, stream>>>(plan.args, statistics_parts(plan));
}

}  // namespace

// Counting bins of a confusion matrix: int32 histograms in shared memory, int64 sums in global memory.
//
// Every sum is of integers, so the order of the atomics does not show. A block sees fewer than 2^31 pixels: a
// GPU holds no more.
#pragma once

#include "../confusion_matrix.h"

namespace {

constexpr int kComfortableShared = 24 << 10;  // bytes a block may take without keeping other blocks out

__device__ void add(int64_t* to, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// Where a thread counts: its warp's copy of the histogram, or global memory where a matrix is too large.
struct Histogram {
    int32_t* copy;  // (K*K + 1), in shared memory; null: none
    uint32_t out;   // K*K, the bin of labels out of range; the bin after it, of ignored pixels, is no bin
    int64_t* counts;
    int64_t* out_of_range;

    __device__ void operator()(uint32_t bin, int count) const {
        if (bin > out || count == 0) return;
        if (copy != nullptr)
            atomicAdd(copy + bin, count);
        else
            add(bin == out ? out_of_range : counts + bin, count);
    }
};

// Merges equal neighbours before a histogram is touched.
struct Run {
    uint32_t bin;
    int length;

    __device__ void push(const Histogram& histogram, uint32_t next, int pixels) {
        if (next != bin) {
            histogram(bin, length);
            bin = next;
            length = 0;
        }
        length += pixels;
    }
};

// histograms: (copies, bins), by all of the block's threads, which meet before they are used
__device__ void clear_histograms(int32_t* histograms, int bins, int copies) {
    for (int i = threadIdx.x; i < bins * copies; i += blockDim.x) histograms[i] = 0;
}

// By all of the block's threads, once they have met after the last count.
[[maybe_unused]] __device__ void add_histograms(const int32_t* histograms, int bins, int copies,
                                                int64_t* counts, int64_t* out_of_range) {
    for (int bin = threadIdx.x; bin < bins && copies > 0; bin += blockDim.x) {
        int64_t sum = 0;
        for (int copy = 0; copy < copies; ++copy) sum += histograms[copy * bins + bin];
        if (sum > 0) add(bin == bins - 1 ? out_of_range : counts + bin, sum);
    }
}

// Copies of a histogram of `bytes`: as many as are comfortable, one a warp at most, and one where it fits.
// None: count in global memory.
[[maybe_unused]] int histogram_copies(int64_t bytes, int warps, int64_t limit) {
    const int64_t copies = kComfortableShared / bytes;
    return bytes > limit ? 0 : copies < 1 ? 1 : copies > warps ? warps : static_cast<int>(copies);
}

}  // namespace

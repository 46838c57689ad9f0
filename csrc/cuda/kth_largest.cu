// The k-th largest of some floats: one reading of them for each digit, histograms in shared memory.
//
// No kernel only chooses a digit: every block of the next one adds up the 2048 counts for itself, which costs
// less than a launch. Equal neighbours are merged before a histogram is touched: losses of ignored pixels are
// all 0. The values are floats only in name, so that no sum depends on an order.
//
// Bytes: 4 a value three times. 8 x 512 x 1024 losses, 17 MB, stay in the second-level cache of a large chip;
// launches and the adding up should weigh as much as the reading there.

#include "../kth_largest.h"
#include "device.h"
#include "histogram.h"
#include "kernels.h"

namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kCopies = 4;  // of a histogram in a block, so that warps meet less often
constexpr int kShared = kCopies * kBins * static_cast<int>(sizeof(int32_t));
constexpr int kEach = kBins / kThreads;
constexpr int kVector = 4;  // values loaded at once

// Adds to `place` the digit that follows from counts (kBins); by all of the block's threads.
// sums: (kThreads + 2), in shared memory
__device__ void descend(const int64_t* counts, int digit, int64_t* sums, Place* place) {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t* const mine = counts + thread * kEach;
    int64_t sum = 0;
    for (int i = 0; i < kEach; ++i) sum += mine[i];
    sums[thread] = sum;
    for (int step = 1; step < kThreads; step *= 2) {  // to the sums of these and all higher bins
        __syncthreads();
        const int64_t more = thread + step < kThreads ? sums[thread + step] : 0;
        __syncthreads();
        sums[thread] += more;
    }
    __syncthreads();
    const int64_t rank = digit == 0 && counts[kBins - 1] > 0 ? 1 : place->rank;  // 1: the NaN
    const int64_t above = thread + 1 < kThreads ? sums[thread + 1] : 0;
    if (above < rank && rank <= sums[thread]) {
        int bin = kEach - 1;
        int64_t left = rank - above;
        while (mine[bin] < left) left -= mine[bin--];
        sums[kThreads] = thread * kEach + bin;
        sums[kThreads + 1] = left;
    }
    __syncthreads();
    place->prefix |= static_cast<uint32_t>(sums[kThreads]) << shift_of(digit);
    place->rank = sums[kThreads + 1];
    __syncthreads();
}

__device__ Place descend_to(const KthLargestArgs& args, const int64_t* counts, int digit, uint4* shared) {
    Place place{0, args.k};
    for (int i = 0; i < digit; ++i)
        descend(counts + i * kBins, i, reinterpret_cast<int64_t*>(shared), &place);
    return place;
}

struct Counter {
    int32_t* histogram;
    int shift;
    uint32_t before, prefix;
    uint32_t bin;  // of the run that is being counted
    int length;

    __device__ void push(uint32_t bits) {
        const uint32_t next = digit_bin(ordered(bits), shift, before, prefix);
        if (next != bin) {
            finish();
            bin = next;
            length = 0;
        }
        ++length;
    }
    __device__ void finish() const {
        if (bin < kBins && length > 0) atomicAdd(histogram + bin, length);
    }
};

// counts: (kDigits, kBins), of which those of `digit` are added to. vectors: of kVector values, from x on.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_digit(KthLargestArgs args, int64_t* counts, int digit, int64_t vectors) {
    extern __shared__ uint4 shared[];
    const Place place = descend_to(args, counts, digit, shared);
    int32_t* const histograms = reinterpret_cast<int32_t*>(shared);
    clear_histograms(histograms, kBins, kCopies);
    __syncthreads();

    Counter counter{histograms + static_cast<int>(threadIdx.x) / 32 % kCopies * kBins,
                    shift_of(digit),
                    bits_before(digit),
                    place.prefix,
                    0,
                    0};
    const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t i = first; i < vectors; i += step) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(args.x) + i);
        counter.push(v.x);
        counter.push(v.y);
        counter.push(v.z);
        counter.push(v.w);
    }
    for (int64_t i = vectors * kVector + first; i < args.size; i += step)
        counter.push(__float_as_uint(__ldg(args.x + i)));
    counter.finish();
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        int64_t sum = 0;
        for (int copy = 0; copy < kCopies; ++copy) sum += histograms[copy * kBins + bin];
        if (sum > 0) add(counts + digit * kBins + bin, sum);
    }
}

__global__ void __launch_bounds__(kThreads) write_value(KthLargestArgs args, const int64_t* counts) {
    extern __shared__ uint4 shared[];
    const Place place = descend_to(args, counts, kDigits, shared);
    if (threadIdx.x == 0) *args.value = __uint_as_float(float_bits(place.prefix));
}

}  // namespace

namespace cuda {

void kth_largest(const KthLargestArgs& args, int64_t* counts, int device, CudaStream cuda_stream) {
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    const bool aligned = reinterpret_cast<uintptr_t>(args.x) % sizeof(uint4) == 0;
    const int64_t vectors = aligned ? args.size / kVector : 0;
    const int64_t useful = (args.size + kVector * kThreads - 1) / (kVector * kThreads);
    const unsigned blocks = resident_blocks(useful, kBlocksPerMultiprocessor, device);
    for (int digit = 0; digit < kDigits; ++digit)
        count_digit<<<blocks, kThreads, kShared, stream>>>(args, counts, digit, vectors);
    write_value<<<1, kThreads, kShared, stream>>>(args, counts);
    check_cuda(cudaGetLastError(), "kth_largest");
}

}  // namespace cuda

// Confusion matrix of two label maps: one reading of both, int32 histograms in shared memory.
//
// A block counts a stretch of neighbouring pixels, so that a thread's next sixteen lie a few image rows below
// its last and mostly continue its run. The ends of runs are found four pixels at a time in bytes; int64 maps
// are narrowed to bytes on their way through shared memory, because a thread that read its own sixteen would
// touch a cache line of its own. As many copies of the histogram as fit (one per warp at most) keep warps
// apart; a matrix too large for shared memory is counted in global memory.
//
// Bytes: both maps once, 2 to 16 a pixel. Memory is meant to bind on label-like maps; of uint8 maps without
// runs the counting does.

#include "device.h"
#include "histogram.h"
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 16;  // of one thread at a time: one 16-byte load of uint8
constexpr int kWarpPixels = 32 * kPixels;
constexpr int kStep = kThreads * kPixels;  // pixels of a block at a time
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kManyRuns = 6;  // in kPixels: from there on single pixels are faster
// A narrowed map has room for K classes, one label to ignore and one out of range.
constexpr int kByteClasses = 254;
constexpr int kIgnoredByte = 254;
constexpr int kOutByte = 255;

struct Bytes {
    uint32_t word[kPixels / 4];

    // One byte, by an index that is known at run time only: registers have no addresses.
    __device__ int pick(int i) const {
        const uint32_t low = i < 4 ? word[0] : word[1];
        const uint32_t high = i < 12 ? word[2] : word[3];
        return static_cast<int>((i < 8 ? low : high) >> (i % 4 * 8) & 0xff);
    }
};

__device__ Bytes bytes(const uint4& v) { return {{v.x, v.y, v.z, v.w}}; }

// Bit i of the result, i < 4: whether byte i of x is not 0.
__device__ uint32_t nonzero_bytes(uint32_t x) {
    const uint32_t top = (x | ((x & 0x7f7f7f7fu) + 0x7f7f7f7fu)) & 0x80808080u;
    return (top >> 7) * 0x10204080u >> 28;
}

// Bit i: whether pixel i + 1 differs from pixel i in either map, i < 15.
__device__ uint32_t run_ends(const Bytes& p, const Bytes& t) {
    uint32_t ends = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t next_p = __funnelshift_r(p.word[i], i < 3 ? p.word[(i + 1) % 4] : p.word[3] >> 24, 8);
        const uint32_t next_t = __funnelshift_r(t.word[i], i < 3 ? t.word[(i + 1) % 4] : t.word[3] >> 24, 8);
        ends |= nonzero_bytes((p.word[i] ^ next_p) | (t.word[i] ^ next_t)) << (4 * i);
    }
    return ends;
}

// A map of T, of which a warp loads kWarpPixels neighbours and each lane keeps kPixels of them.
template <class T>
struct ByteMap;

template <>
struct ByteMap<uint8_t> {
    const uint8_t* data;  // aligned to 16 bytes

    __device__ Bytes load(const ConfusionArgs&, int64_t warp_pixel, int lane, uint8_t*) const {
        return bytes(__ldg(reinterpret_cast<const uint4*>(data + warp_pixel) + lane));
    }
    static __device__ int ignored(const ConfusionArgs& args) { return static_cast<int>(args.ignore_index); }
    static __host__ bool has_ignore(const ConfusionArgs& args) {
        return args.has_ignore && holds<uint8_t>(args.ignore_index);
    }
};

template <>
struct ByteMap<int64_t> {
    const int64_t* data;  // aligned to 16 bytes
    bool ignores;         // whether this map's label decides what is ignored

    __device__ uint32_t code(const ConfusionArgs& args, int64_t label) const {
        if (ignores && args.has_ignore && label == args.ignore_index) return kIgnoredByte;
        return static_cast<uint64_t>(label) < static_cast<uint64_t>(args.num_classes)
                   ? static_cast<uint32_t>(label)
                   : kOutByte;
    }
    // staged: (kWarpPixels) of this warp
    __device__ Bytes load(const ConfusionArgs& args, int64_t warp_pixel, int lane, uint8_t* staged) const {
        const longlong2* from = reinterpret_cast<const longlong2*>(data + warp_pixel) + lane;
        __syncwarp();  // what was staged before has been read
                       // Four loads in flight: all eight of both maps would not fit in the registers.
#pragma unroll 1
        for (int begin = 0; begin < kWarpPixels / 64; begin += 4) {
            longlong2 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = __ldg(from + 32 * (begin + i));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                reinterpret_cast<uint16_t*>(staged)[32 * (begin + i) + lane] =
                    static_cast<uint16_t>(code(args, pairs[i].x) | code(args, pairs[i].y) << 8);
        }
        __syncwarp();
        return bytes(reinterpret_cast<const uint4*>(staged)[lane]);
    }
    static __device__ int ignored(const ConfusionArgs&) { return kIgnoredByte; }
    static __host__ bool has_ignore(const ConfusionArgs& args) { return args.has_ignore; }
};

struct Bins {
    uint32_t classes;
    bool has_ignore;
    int ignore;

    __device__ uint32_t operator()(int p, int t) const {
        return confusion_bin<int32_t, int32_t>(p, t, classes, has_ignore, ignore);
    }
};

__device__ void count_bytes(const Bytes& p, const Bytes& t, const Bins& bins, const Histogram& histogram,
                            Run* run) {
    uint32_t ends = run_ends(p, t);
    if (__popc(ends) > kManyRuns) {
#pragma unroll
        for (int i = 0; i < kPixels / 4; ++i)
#pragma unroll 1
            for (int shift = 0; shift < 32; shift += 8)
                run->push(histogram, bins(p.word[i] >> shift & 0xff, t.word[i] >> shift & 0xff), 1);
        return;
    }
    ends |= 1u << (kPixels - 1);
    for (int begin = 0; begin < kPixels;) {
        const int last = __ffs(static_cast<int>(ends)) - 1;
        run->push(histogram, bins(p.pick(last), t.pick(last)), last + 1 - begin);
        ends &= ends - 1;
        begin = last + 1;
    }
}

__device__ int64_t label_at(const LabelMap& map, int64_t pixel) {
    switch (map.type) {
        case LabelType::u8:
            return static_cast<const uint8_t*>(map.data)[pixel];
        case LabelType::i8:
            return static_cast<const int8_t*>(map.data)[pixel];
        case LabelType::i16:
            return static_cast<const int16_t*>(map.data)[pixel];
        case LabelType::i32:
            return static_cast<const int32_t*>(map.data)[pixel];
        case LabelType::i64:
            break;
    }
    return static_cast<const int64_t*>(map.data)[pixel];
}

// Any types and alignment, one pixel after another.
__device__ void count_scalars(const ConfusionArgs& args, int64_t begin, int64_t end,
                              const Histogram& histogram, Run* run) {
    const uint32_t classes = static_cast<uint32_t>(args.num_classes);
    for (int64_t i = begin; i < end && i < args.pixels; ++i)
        run->push(histogram,
                  confusion_bin<int64_t, int64_t>(label_at(args.prediction, i), label_at(args.target, i),
                                                  classes, args.has_ignore, args.ignore_index),
                  1);
}

// The block's steps of kStep pixels: a stretch of the map.
struct Stretch {
    int64_t begin, end;
    __device__ explicit Stretch(int64_t pixels) {
        const int64_t steps = (pixels + kStep - 1) / kStep;
        begin = steps * blockIdx.x / gridDim.x * kStep;
        end = steps * (blockIdx.x + 1) / gridDim.x * kStep;
    }
};

__device__ Histogram block_histogram(const ConfusionArgs& args, int32_t* shared, int copies, int warp) {
    const uint32_t out = static_cast<uint32_t>(args.num_classes) * static_cast<uint32_t>(args.num_classes);
    int32_t* copy = copies > 0 ? shared + int64_t{warp % copies} * (int64_t{out} + 1) : nullptr;
    return {copy, out, args.counts, args.out_of_range};
}

// Counts kAhead steps at a time while they are whole for this warp, so that their loads are in flight
// together. pixel: the warp's first; where it stopped.
template <int kAhead, class P, class T>
__device__ int64_t count_steps(const ConfusionArgs& args, const ByteMap<P>& prediction,
                               const ByteMap<T>& target, int64_t pixel, int64_t end, uint8_t* staged,
                               const Bins& bins, const Histogram& histogram, Run* run) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    constexpr int64_t kMore = (kAhead - 1) * int64_t{kStep};
    for (; pixel + kMore < end && pixel + kMore + kWarpPixels <= args.pixels; pixel += kMore + kStep) {
        Bytes p[kAhead];
        Bytes t[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            p[i] = prediction.load(args, pixel + i * kStep, lane, staged);
            t[i] = target.load(args, pixel + i * kStep, lane, staged);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) count_bytes(p[i], t[i], bins, histogram, run);
    }
    return pixel;
}

template <class P, class T>
constexpr int kStaged = sizeof(P) + sizeof(T) > 2 ? kStep : 0;  // bytes

// Shared memory: kStaged bytes, then (copies, K*K + 1) int32.
template <class P, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_vectors(ConfusionArgs args, ByteMap<P> prediction, ByteMap<T> target, bool has_ignore, int copies) {
    extern __shared__ uint4 shared[];
    int32_t* const histograms = reinterpret_cast<int32_t*>(shared) + kStaged<P, T> / 4;
    const int bins = args.num_classes * args.num_classes + 1;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    clear_histograms(histograms, bins, copies);
    __syncthreads();

    const Histogram histogram = block_histogram(args, histograms, copies, warp);
    const Bins bin{static_cast<uint32_t>(args.num_classes), has_ignore, ByteMap<T>::ignored(args)};
    const Stretch stretch(args.pixels);
    uint8_t* const staged = reinterpret_cast<uint8_t*>(shared) + (kStaged<P, T> > 0 ? warp * kWarpPixels : 0);
    constexpr int kAhead = kStaged<P, T> > 0 ? 1 : 2;  // int64 has loads enough in flight
    Run run{0, 0};
    int64_t pixel = stretch.begin + warp * kWarpPixels;
    pixel = count_steps<kAhead>(args, prediction, target, pixel, stretch.end, staged, bin, histogram, &run);
    pixel = count_steps<1>(args, prediction, target, pixel, stretch.end, staged, bin, histogram, &run);
    for (; pixel < stretch.end; pixel += kStep) {
        const int64_t begin = pixel + static_cast<int>(threadIdx.x) % 32 * kPixels;
        count_scalars(args, begin, begin + kPixels, histogram, &run);
    }
    histogram(run.bin, run.length);
    __syncthreads();
    add_histograms(histograms, bins, copies, args.counts, args.out_of_range);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_any(ConfusionArgs args, int copies) {
    extern __shared__ uint4 shared[];
    int32_t* const histograms = reinterpret_cast<int32_t*>(shared);
    const int bins = args.num_classes * args.num_classes + 1;
    clear_histograms(histograms, bins, copies);
    __syncthreads();
    const Histogram histogram = block_histogram(args, histograms, copies, static_cast<int>(threadIdx.x) / 32);
    const Stretch stretch(args.pixels);
    Run run{0, 0};
    for (int64_t pixel = stretch.begin + threadIdx.x * kPixels; pixel < stretch.end; pixel += kStep)
        count_scalars(args, pixel, pixel + kPixels, histogram, &run);
    histogram(run.bin, run.length);
    __syncthreads();
    add_histograms(histograms, bins, copies, args.counts, args.out_of_range);
}

struct Shape {
    unsigned blocks;
    int copies;
    int shared;
};

// staged: bytes beside the histograms
Shape shape(const ConfusionArgs& args, int staged, int device) {
    const int64_t bytes = (int64_t{args.num_classes} * args.num_classes + 1) * sizeof(int32_t);
    const int copies = histogram_copies(bytes, kWarps, shared_limit(device) - staged);
    const int64_t steps = (args.pixels + kStep - 1) / kStep;
    return {resident_blocks(steps, kBlocksPerMultiprocessor, device), copies,
            static_cast<int>(copies * bytes) + staged};
}

template <class P, class T>
void launch(const ConfusionArgs& args, ByteMap<P> prediction, ByteMap<T> target, int device,
            cudaStream_t stream) {
    const Shape launched = shape(args, kStaged<P, T>, device);
    allow_shared<count_vectors<P, T>>(launched.shared, device);
    count_vectors<P, T><<<launched.blocks, kThreads, launched.shared, stream>>>(
        args, prediction, target, ByteMap<T>::has_ignore(args), launched.copies);
}

void launch_any(const ConfusionArgs& args, int device, cudaStream_t stream) {
    const Shape launched = shape(args, 0, device);
    allow_shared<count_any>(launched.shared, device);
    count_any<<<launched.blocks, kThreads, launched.shared, stream>>>(args, launched.copies);
}

bool aligned(const LabelMap& map) { return reinterpret_cast<uintptr_t>(map.data) % sizeof(uint4) == 0; }

}  // namespace

namespace cuda {

void confusion_matrix(const ConfusionArgs& args, int device, CudaStream cuda_stream) {
    if (args.pixels == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    const LabelMap& p = args.prediction;
    const LabelMap& t = args.target;
    const bool wide = aligned(p) && aligned(t);
    const ByteMap<uint8_t> p8{static_cast<const uint8_t*>(p.data)};
    const ByteMap<uint8_t> t8{static_cast<const uint8_t*>(t.data)};
    const ByteMap<int64_t> p64{static_cast<const int64_t*>(p.data), false};
    const ByteMap<int64_t> t64{static_cast<const int64_t*>(t.data), true};
    const bool narrows = wide && args.num_classes <= kByteClasses;
    // The pairs that training and evaluation meet: argmax gives int64, masks are uint8, other people's are
    // int64.
    if (wide && p.type == LabelType::u8 && t.type == LabelType::u8)
        launch(args, p8, t8, device, stream);
    else if (narrows && p.type == LabelType::i64 && t.type == LabelType::u8)
        launch(args, p64, t8, device, stream);
    else if (narrows && p.type == LabelType::i64 && t.type == LabelType::i64)
        launch(args, p64, t64, device, stream);
    else
        launch_any(args, device, stream);
    check_cuda(cudaGetLastError(), "confusion_matrix");
}

}  // namespace cuda

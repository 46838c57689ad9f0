// Confusion matrix of two label maps: one reading of both, int32 histograms in shared memory.
//
// A thread reads kPixels neighbours and merges equal ones before it touches a histogram. As many copies of
// the histogram as fit (one per warp at most) keep warps apart; a matrix too large for shared memory is
// counted in global memory. Every sum is of integers, so the order of the atomics does not show.

#include "../checks.h"
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 16;  // of one thread: one 16-byte load of uint8, eight of int64
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kComfortableShared = 24 << 10;  // bytes a block may take without keeping other blocks out

// 16-byte loads; the launcher has checked the alignment.
template <class T>
struct Vector {
    const T* data;

    __device__ void load(int64_t pixel, T (&label)[kPixels]) const {
        constexpr int kLoads = kPixels * sizeof(T) / sizeof(uint4);
        const uint4* from = reinterpret_cast<const uint4*>(data + pixel);
        uint4* to = reinterpret_cast<uint4*>(label);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) to[i] = __ldg(from + i);
    }
    __device__ T at(int64_t pixel) const { return data[pixel]; }
    using Label = T;
};

// Any type and alignment, widened to int64.
struct Scalar {
    LabelMap map;

    __device__ int64_t at(int64_t pixel) const {
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
    __device__ void load(int64_t pixel, int64_t (&label)[kPixels]) const {
        for (int i = 0; i < kPixels; ++i) label[i] = at(pixel + i);
    }
    using Label = int64_t;
};

__device__ void add(int64_t* to, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// Where bins are counted. The last bin, of ignored pixels, is dropped at the door.
struct SharedCounts {
    int32_t* copy;  // (K*K + 1) of this warp

    __device__ void operator()(const ConfusionArgs&, uint32_t bin, int count) const {
        atomicAdd(copy + bin, count);
    }
};

struct GlobalCounts {
    __device__ void operator()(const ConfusionArgs& args, uint32_t bin, int count) const {
        const uint32_t out = static_cast<uint32_t>(args.num_classes) * args.num_classes;
        add(bin == out ? args.out_of_range : args.counts + bin, count);
    }
};

template <class Counts>
struct Run {
    uint32_t bin;
    int length;

    __device__ void flush(const ConfusionArgs& args, const Counts& counts) const {
        const uint32_t out = static_cast<uint32_t>(args.num_classes) * args.num_classes;
        if (length > 0 && bin <= out) counts(args, bin, length);
    }
    __device__ void push(const ConfusionArgs& args, const Counts& counts, uint32_t next) {
        if (next != bin) {
            flush(args, counts);
            bin = next;
            length = 0;
        }
        ++length;
    }
};

template <class Prediction, class Target, class Counts>
__device__ void count(const ConfusionArgs& args, Prediction prediction, Target target, const Counts& counts) {
    using P = typename Prediction::Label;
    using T = typename Target::Label;
    const uint32_t classes = static_cast<uint32_t>(args.num_classes);
    const bool has_ignore = args.has_ignore && holds<T>(args.ignore_index);
    const T ignore = static_cast<T>(args.ignore_index);
    const int64_t stride = int64_t{gridDim.x} * kThreads * kPixels;
    int64_t pixel = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPixels;
    Run<Counts> run{0, 0};
    for (; pixel < args.pixels; pixel += stride) {
        if (pixel + kPixels <= args.pixels) {
            alignas(16) P p[kPixels];
            alignas(16) T t[kPixels];
            prediction.load(pixel, p);
            target.load(pixel, t);
#pragma unroll
            for (int i = 0; i < kPixels; ++i)
                run.push(args, counts, confusion_bin(p[i], t[i], classes, has_ignore, ignore));
        } else {
            for (int64_t i = pixel; i < args.pixels; ++i)
                run.push(args, counts,
                         confusion_bin(prediction.at(i), target.at(i), classes, has_ignore, ignore));
        }
    }
    run.flush(args, counts);
}

// Shared memory: (copies, K*K + 1) int32. A block sees fewer than 2^31 pixels: a GPU holds no more.
template <class Prediction, class Target>
__global__ void __launch_bounds__(kThreads)
    count_shared(ConfusionArgs args, Prediction prediction, Target target, int copies) {
    extern __shared__ int32_t histogram[];
    const int bins = args.num_classes * args.num_classes + 1;
    for (int i = threadIdx.x; i < bins * copies; i += kThreads) histogram[i] = 0;
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    count(args, prediction, target, SharedCounts{histogram + warp % copies * bins});
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += kThreads) {
        int64_t sum = 0;
        for (int copy = 0; copy < copies; ++copy) sum += histogram[copy * bins + bin];
        if (sum > 0) add(bin == bins - 1 ? args.out_of_range : args.counts + bin, sum);
    }
}

template <class Prediction, class Target>
__global__ void __launch_bounds__(kThreads)
    count_global(ConfusionArgs args, Prediction prediction, Target target) {
    count(args, prediction, target, GlobalCounts{});
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

template <class Prediction, class Target>
void launch(const ConfusionArgs& args, Prediction prediction, Target target, int device,
            cudaStream_t stream) {
    const int64_t useful = (args.pixels + kThreads * kPixels - 1) / (kThreads * kPixels);
    const int64_t resident =
        int64_t{kBlocksPerMultiprocessor} * attribute(cudaDevAttrMultiProcessorCount, device);
    const unsigned blocks = static_cast<unsigned>(useful < resident ? useful : resident);
    const int64_t bytes = (int64_t{args.num_classes} * args.num_classes + 1) * sizeof(int32_t);
    if (bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
        count_global<<<blocks, kThreads, 0, stream>>>(args, prediction, target);
    } else {
        int64_t copies = kComfortableShared / bytes;
        copies = copies < 1 ? 1 : copies > kWarps ? kWarps : copies;
        const int shared = static_cast<int>(bytes * copies);
        const auto kernel = count_shared<Prediction, Target>;
        // Above 48 KB dynamic shared memory has to be asked for; 150 classes take 90.
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                   "cudaFuncSetAttribute");
        kernel<<<blocks, kThreads, shared, stream>>>(args, prediction, target, static_cast<int>(copies));
    }
    check_cuda(cudaGetLastError(), "confusion_matrix");
}

template <class T>
Vector<T> vector(const LabelMap& map) {
    return {static_cast<const T*>(map.data)};
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
    // The pairs that training and evaluation meet: argmax gives int64, masks are uint8, other people's are
    // int64.
    if (wide && p.type == LabelType::u8 && t.type == LabelType::u8)
        launch(args, vector<uint8_t>(p), vector<uint8_t>(t), device, stream);
    else if (wide && p.type == LabelType::i64 && t.type == LabelType::u8)
        launch(args, vector<int64_t>(p), vector<uint8_t>(t), device, stream);
    else if (wide && p.type == LabelType::i64 && t.type == LabelType::i64)
        launch(args, vector<int64_t>(p), vector<int64_t>(t), device, stream);
    else
        launch(args, Scalar{p}, Scalar{t}, device, stream);
}

}  // namespace cuda

// Depthwise convolution with its affine and activation, up to three dilations of one x, or with statistics.
//
// Bytes: x once and each result once, 2 T for one dilation of T bytes. R dilations of one x are blocks of one
// launch: those of an image's group of channels follow one another, dilation by dilation, while L2 has their
// x: (1 + R) T. What binds is in depthwise_tiles.h. Statistics are each thread's (Welford), merged by Chan's
// formula in a fixed order. Whatever has no tiles (other kernels, channels that are no multiple of 16 bytes)
// takes a result a thread.

#include "depthwise_tiles.h"
#include "device.h"
#include "kernels.h"

namespace {

// One result of one channel: any kernel, stride, dilation, alignment.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads) convolve_each(const DepthwiseCudaArgs args, int index) {
    const DepthwiseRate& rate = args.rate[index];
    const int64_t height = (args.height + args.stride - 1) / args.stride;
    const int64_t width = (args.width + args.stride - 1) / args.stride;
    const int64_t results = args.batch * height * width * args.channels;
    const T* x = static_cast<const T*>(args.x);
    const T* weight = static_cast<const T*>(rate.weight);
    const int64_t all = int64_t{gridDim.x} * kDepthwiseThreads;
    for (int64_t i = int64_t{blockIdx.x} * kDepthwiseThreads + threadIdx.x; i < results; i += all) {
        const int64_t pixel = i / args.channels;
        const int64_t c = i - pixel * args.channels;
        const int64_t line = pixel / width;
        const int64_t image = line / height;
        const int64_t row = (line - image * height) * args.stride - args.kernel / 2 * rate.dilation;
        const int64_t column = (pixel - line * width) * args.stride - args.kernel / 2 * rate.dilation;
        float sum = 0.0f;
        for (int64_t a = 0; a < args.kernel; ++a) {
            const int64_t h = row + a * rate.dilation;
            if (h < 0 || h >= args.height) continue;
            const T* from = x + (image * args.height + h) * args.width * args.channels + c;
            const T* w = weight + (c * args.kernel + a) * args.kernel;
            for (int64_t b = 0; b < args.kernel; ++b) {
                const int64_t at = column + b * rate.dilation;
                if (at < 0 || at >= args.width) continue;
                sum = __fmaf_rn(to_float(from[at * args.channels]), to_float(w[b]), sum);
            }
        }
        if (rate.scale != nullptr) sum *= rate.scale[c];
        if (rate.shift != nullptr) sum += rate.shift[c];
        float y[Lanes<T>::kCount] = {sum};
        const Bounds<T> bounds(args.activation);
        const uint4 packed = Lanes<T>::pack(y, bounds.low, bounds.high);
        memcpy(static_cast<T*>(rate.y) + i, &packed.x, sizeof(T));  // its lowest lane
    }
}

int64_t depthwise_places(const DepthwiseCudaArgs& args, int device) {
    return int64_t{args.type == DType::f32 ? kPlaces<float> : kPlaces<Bf16>} *
           attribute<cudaDevAttrMultiProcessorCount>(device);
}

template <class T, int kRatio>
void launch_tiles(const DepthwisePlan& plan, cudaStream_t stream) {
    const int ring = kStages<kRatio> * stage_vectors(plan, kRatio) * static_cast<int>(sizeof(uint4));
    const int affine = 2 * Lanes<T>::kCount * plan.vectors * static_cast<int>(sizeof(float));
    int steps = 0;
    for (int i = 0; i < plan.args.rates; ++i) {
        const int most = kRatio * (plan.tiling[i].tile_rows - 1) + 3;
        steps = most > steps ? most : steps;
    }
    const int shared = ring + affine + steps * static_cast<int>(sizeof(DepthwiseStep));
    constexpr int kMost = kStages<kRatio> * (kRatio * kDepthwiseThreads + (3 - kRatio) * kMostVectors + 1) +
                          Lanes<T>::kCount / 2 * kMostVectors + kRatio * (kMostRows - 1) + 3;
    static_assert(kMost * sizeof(uint4) <= kSharedUnasked && sizeof(DepthwiseStep) == sizeof(uint4));
    if (plan.args.mean != nullptr)
        convolve_tiles<T, kRatio, true><<<plan.blocks, kDepthwiseThreads, shared, stream>>>(plan);
    else
        convolve_tiles<T, kRatio, false><<<plan.blocks, kDepthwiseThreads, shared, stream>>>(plan);
}

template <class T>
void launch_each(const DepthwisePlan& plan, int device, cudaStream_t stream) {
    const DepthwiseCudaArgs& args = plan.args;
    const int64_t results = result_pixels(args) * args.channels;
    const unsigned blocks =
        resident_blocks((results + kDepthwiseThreads - 1) / kDepthwiseThreads, 64, device);
    for (int i = 0; i < args.rates; ++i) convolve_each<T><<<blocks, kDepthwiseThreads, 0, stream>>>(args, i);
    if (args.mean != nullptr) launch_statistics_of_result<T>(plan, stream);
}

template <class T>
void launch(const DepthwisePlan& plan, int device, cudaStream_t stream) {
    if (!plan.tiled)
        launch_each<T>(plan, device, stream);
    else if (plan.tiling[0].columns.ratio == 1)
        launch_tiles<T, 1>(plan, stream);
    else
        launch_tiles<T, 2>(plan, stream);
    if (plan.args.mean != nullptr) launch_merge(plan, stream);
}

}  // namespace

namespace cuda {

int64_t depthwise_conv_parts(const DepthwiseCudaArgs& args, int device) {
    return statistics_parts(depthwise_plan(args, depthwise_places(args, device)));
}

void depthwise_conv(const DepthwiseCudaArgs& args, int device, CudaStream cuda_stream) {
    if (args.batch == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    const DepthwisePlan plan = depthwise_plan(args, depthwise_places(args, device));
    if (args.type == DType::f32)
        launch<float>(plan, device, stream);
    else if (args.type == DType::bf16)
        launch<Bf16>(plan, device, stream);
    else
        launch<Fp16>(plan, device, stream);
    check_cuda(cudaGetLastError(), "depthwise_conv");
}

}  // namespace cuda

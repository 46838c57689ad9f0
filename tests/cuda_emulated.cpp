// One kernel of csrc/cuda over cuda_emulator.h, to be called through ctypes. KERNEL is the rewritten file, ENTRY the
// one of the functions below that calls it. Each returns null, or what went wrong.

#include "cuda_emulator.h"
#include KERNEL

namespace {

thread_local char message[512];

template <class Run>
const char* reporting(Run run) {
    try {
        emulator::launches = emulator::questions = 0;
        run();
        return nullptr;
    } catch (const std::exception& error) {
        std::snprintf(message, sizeof(message), "%s", error.what());
        return message;
    }
}

int device = 0;  // that `configure` described last

}  // namespace

extern "C" {

void configure(int shared_limit, int multiprocessors, int descending) {
    emulator::settings = {shared_limit, multiprocessors, descending != 0, 0};
    device = emulator::device_like(emulator::settings);
}

// Leaves out the blocks before this one, until the next `configure`.
void begin_at(unsigned block) { emulator::settings.first_block = block; }

// launches, blocks, threads, bytes of shared memory, stream, device at the launch, device afterwards, the device that
// was asked for, questions to the driver
void last_launch(int64_t* out) {
    const emulator::Launch& l = emulator::last;
    const int64_t values[] = {emulator::launches, l.blocks, l.threads, static_cast<int64_t>(l.shared),
                              reinterpret_cast<int64_t>(l.stream), l.device, emulator::current_device, device, emulator::questions};
    std::memcpy(out, values, sizeof(values));
}

#if ENTRY == 1
const char* confusion_matrix(const void* prediction, int prediction_type, const void* target, int target_type,
                             int64_t pixels, int classes, int has_ignore, int64_t ignore, int64_t* counts,
                             int64_t* out_of_range, void* stream) {
    const ConfusionArgs args = {{prediction, static_cast<LabelType>(prediction_type)},
                                {target, static_cast<LabelType>(target_type)},
                                pixels,
                                classes,
                                has_ignore != 0,
                                ignore,
                                counts,
                                out_of_range};
    return reporting([&] { cuda::confusion_matrix(args, device, stream); });
}
#elif ENTRY == 4
const char* kth_largest(const float* x, int64_t size, int64_t k, float* value, int64_t* counts, void* stream) {
    return reporting([&] { cuda::kth_largest({x, size, k, value}, counts, device, stream); });
}
#elif ENTRY == 5
namespace {
// geometry: batch, height, width, channels, kernel, stride. tensors: weight, scale, shift and y of each rate.
// statistics: mean, variance, counts, means, squares, or null
DepthwiseCudaArgs depthwise_args(const void* x, int type, const int64_t* g, int activation, int rates,
                                 void* const* tensors, const int64_t* dilations, float* const* statistics) {
    DepthwiseCudaArgs args{};
    args = {x, static_cast<DType>(type), g[0], g[1], g[2], g[3], g[4], g[5], static_cast<Activation>(activation), rates,
            {}, nullptr, nullptr, nullptr, nullptr, nullptr};
    for (int i = 0; i < rates; ++i, tensors += 4)
        args.rate[i] = {tensors[0], static_cast<float*>(tensors[1]), static_cast<float*>(tensors[2]), tensors[3],
                        dilations[i]};
    if (statistics != nullptr) {
        args.mean = statistics[0];
        args.variance = statistics[1];
        args.counts = statistics[2];
        args.means = statistics[3];
        args.squares = statistics[4];
    }
    return args;
}
}  // namespace

const char* depthwise_conv(const void* x, int type, const int64_t* geometry, int activation, int rates,
                           void* const* tensors, const int64_t* dilations, float* const* statistics, void* stream) {
    const DepthwiseCudaArgs args =
        depthwise_args(x, type, geometry, activation, rates, tensors, dilations, statistics);
    return reporting([&] { cuda::depthwise_conv(args, device, stream); });
}
// Parts of statistics; whether there are tiles, and then blocks, vectors, columns and rows of one.
void planned(const void* x, int type, const int64_t* geometry, int rates, void* const* tensors,
             const int64_t* dilations, int64_t* out) {
    const DepthwiseCudaArgs args = depthwise_args(x, type, geometry, 0, rates, tensors, dilations, nullptr);
    const DepthwisePlan plan = depthwise_plan(args, depthwise_places(args, device));
    const int64_t values[] = {cuda::depthwise_conv_parts(args, device), plan.tiled,   plan.blocks,
                              plan.vectors, plan.columns, plan.tiling[0].tile_rows};
    std::memcpy(out, values, sizeof(values));
}
#elif ENTRY == 6
namespace {
CropArgs crop_args(const uint8_t* source, int64_t row_stride, const int64_t* size, const int64_t* scaled,
                   const int64_t* window, int flip, const uint8_t* pad, uint8_t* out) {
    return {source,    row_stride, size[0],   size[1],   scaled[0], scaled[1],                window[0],
            window[1], window[2],  window[3], flip != 0, {pad[0], pad[1], pad[2]}, out};
}
}  // namespace

const char* augment_image(const uint8_t* source, int64_t row_stride, const int64_t* size, const int64_t* scaled,
                          const int64_t* window, int flip, const uint8_t* pad, uint8_t* out, void* stream) {
    const CropArgs args = crop_args(source, row_stride, size, scaled, window, flip, pad, out);
    return reporting([&] { cuda::augment_image(args, device, stream); });
}
const char* augment_image_mask(const uint8_t* source, int64_t row_stride, const int64_t* size, const int64_t* scaled,
                               const int64_t* window, int flip, const uint8_t* pad, uint8_t* out, void* stream) {
    const CropArgs args = crop_args(source, row_stride, size, scaled, window, flip, pad, out);
    return reporting([&] { cuda::augment_image_mask(args, device, stream); });
}
#else
namespace {
// geometry: batch, classes, height, width; four steps; height and width of the result
UpsampleArgmaxArgs upsample_args(const void* logits, int type, const int64_t* g, int align_corners, uint8_t* labels) {
    return {{logits, static_cast<DType>(type), g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]},
            g[8],
            g[9],
            align_corners != 0,
            labels};
}
}  // namespace

#if ENTRY == 2
const char* upsample_argmax(const void* logits, int type, const int64_t* geometry, int align_corners, uint8_t* labels,
                            void* stream) {
    const UpsampleArgmaxArgs args = upsample_args(logits, type, geometry, align_corners, labels);
    return reporting([&] { cuda::upsample_argmax(args, device, stream); });
}
// Source pixels that a group spans along an axis; 0: the kernel reads global memory. Then classes at a time.
void planned(const int64_t* geometry, int align_corners, int64_t* out) {
    const LabelPlan plan = label_plan(upsample_args(nullptr, 0, geometry, align_corners, nullptr), kTileClasses);
    out[0] = plan.taps;
    out[1] = plan.chunk;
}
#else
const char* upsample_confusion_matrix(const void* logits, int type, const int64_t* geometry, int align_corners,
                                      const void* target, int target_type, int has_ignore, int64_t ignore,
                                      int64_t* counts, int64_t* out_of_range, void* stream) {
    const UpsampleConfusionArgs args = {upsample_args(logits, type, geometry, align_corners, nullptr),
                                        {target, static_cast<LabelType>(target_type)},
                                        has_ignore != 0,
                                        ignore,
                                        counts,
                                        out_of_range};
    return reporting([&] { cuda::upsample_confusion_matrix(args, device, stream); });
}
#endif
#endif

}  // extern "C"

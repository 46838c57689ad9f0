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
    emulator::settings = {shared_limit, multiprocessors, descending != 0};
    device = emulator::device_like(emulator::settings);
}

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

// Confusion matrix of bilinearly upsampled logits: upsample_labels.h with each group counted from registers.
//
// A group's 16 neighbours are merged into runs before a histogram in shared memory is touched; a matrix too
// large for shared memory is counted in global memory.
//
// Bytes: 8 x 19 x 128 x 256 to 512 x 1024 reads 20 MB of fp32 logits and 4 of uint8 targets. What binds is
// what binds upsample_argmax.cu.

#include "device.h"
#include "histogram.h"
#include "kernels.h"
#include "upsample_labels.h"

namespace {

// A target is kept in 16 bits, two in a register; these two are above every class.
constexpr uint32_t kIgnored = 0xfffe;
constexpr uint32_t kOutOfRange = 0xffff;

struct TargetMap {
    LabelMap map;
    bool has_ignore;
    int64_t ignore_index;

    template <class T>
    __device__ uint32_t at(int64_t pixel) const {
        const T label = __ldg(static_cast<const T*>(map.data) + pixel);
        if (has_ignore && int64_t{label} == ignore_index) return kIgnored;
        const uint32_t code = narrow(int64_t{label});
        return code < kIgnored ? code : kOutOfRange;
    }
};

// Counts a group of labels against the target.
struct CountedLabels {
    Histogram histogram;
    TargetMap target;
    uint32_t classes;
    int64_t height, width;

    template <class T>
    __device__ void load(const TilePlace& place, int y, int x, uint32_t (&codes)[kSide][kSide / 2]) const {
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
            const int row = place.y + y + i;
#pragma unroll
            for (int j = 0; j < kSide; ++j) {
                const int column = place.x + x + j;
                const bool there = row >= 0 && row < height && column >= 0 && column < width;
                const uint32_t code =
                    there ? target.at<T>((place.image * height + row) * width + column) : kIgnored;
                codes[i][j / 2] |= code << 16 * (j % 2);
            }
        }
    }

    __device__ void operator()(const TilePlace& place, int y, int x, const uint32_t (&labels)[kSide]) const {
        uint32_t codes[kSide][kSide / 2] = {};
        switch (target.map.type) {
            case LabelType::u8:
                load<uint8_t>(place, y, x, codes);
                break;
            case LabelType::i8:
                load<int8_t>(place, y, x, codes);
                break;
            case LabelType::i16:
                load<int16_t>(place, y, x, codes);
                break;
            case LabelType::i32:
                load<int32_t>(place, y, x, codes);
                break;
            case LabelType::i64:
                load<int64_t>(place, y, x, codes);
                break;
        }
        Run run{0, 0};
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
            for (int j = 0; j < kSide; ++j) {
                const uint32_t code = codes[i][j / 2] >> 16 * (j % 2) & 0xffff;
                const uint32_t bin = code < classes     ? code * classes + (labels[i] >> 8 * j & 0xff)
                                     : code == kIgnored ? histogram.out + 1
                                                        : histogram.out;
                run.push(histogram, bin, 1);
            }
        histogram(run.bin, run.length);
    }
};

struct Counting {
    TargetMap target;
    int64_t* counts;
    int64_t* out_of_range;
    int copies;
};

// Shared memory: the LabelTile, then (copies, K*K + 1) int32.
template <int kTapsOfGroup>
__global__ void __launch_bounds__(kThreads, kTapsOfGroup == 3 ? 1 : 2)
    count_labels(LabelPlan plan, Counting counting) {
    extern __shared__ uint4 shared[];
    const LabelTile tile(plan, shared);
    const uint32_t classes = static_cast<uint32_t>(plan.logits.classes);
    const int bins = static_cast<int>(classes * classes) + 1;
    const int copies = counting.copies;
    int32_t* const histograms = reinterpret_cast<int32_t*>(shared) + plan.shared / 4;
    int32_t* const mine =
        copies > 0 ? histograms + static_cast<int>(threadIdx.x) / 32 % copies * bins : nullptr;
    clear_histograms(histograms, bins, copies);
    __syncthreads();
    const Histogram histogram{mine, classes * classes, counting.counts, counting.out_of_range};
    CountedLabels sink{histogram, counting.target, classes, plan.rows.output, plan.columns.output};
    for (uint32_t index = blockIdx.x; index < plan.tiles; index += gridDim.x)
        label_any_tile<kTapsOfGroup>(plan, index, tile, sink);
    __syncthreads();
    add_histograms(histograms, bins, copies, counting.counts, counting.out_of_range);
}

template <int kTapsOfGroup>
void launch(const LabelPlan& plan, const Counting& counting, int device, cudaStream_t stream) {
    const int64_t classes = plan.logits.classes;
    const int histograms = static_cast<int>(counting.copies * (classes * classes + 1) * sizeof(int32_t));
    const int shared = plan.shared + histograms;
    allow_shared<count_labels<kTapsOfGroup>>(shared, device);
    const int fitting = fitting_blocks<count_labels<kTapsOfGroup>>(kThreads, shared, device);
    const unsigned blocks = resident_blocks(plan.tiles, fitting, device);
    count_labels<kTapsOfGroup><<<blocks, kThreads, shared, stream>>>(plan, counting);
}

}  // namespace

namespace cuda {

void upsample_confusion_matrix(const UpsampleConfusionArgs& args, int device, CudaStream cuda_stream) {
    const LogitsMap& logits = args.upsample.logits;
    if (logits.batch == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    const int64_t bytes = (logits.classes * logits.classes + 1) * static_cast<int64_t>(sizeof(int32_t));
    const int64_t room = shared_limit(device) - kFixedBytes;
    const int copies = histogram_copies(bytes, kWarps, room - kLeastTile);
    const LabelPlan plan = label_plan(args.upsample, static_cast<int>(room - copies * bytes));
    const Counting counting{
        {args.target, args.has_ignore, args.ignore_index}, args.counts, args.out_of_range, copies};
    if (plan.taps == 2)
        launch<2>(plan, counting, device, stream);
    else if (plan.taps == 3)
        launch<3>(plan, counting, device, stream);
    else
        launch<0>(plan, counting, device, stream);
    check_cuda(cudaGetLastError(), "upsample_confusion_matrix");
}

}  // namespace cuda

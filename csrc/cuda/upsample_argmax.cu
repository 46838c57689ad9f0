// Label map of bilinearly upsampled logits: reads the low-resolution logits once, writes one byte a pixel.
//
// Bytes: 8 x 19 x 128 x 256 to 512 x 1024 reads 20 MB in fp32 and writes 4; the 80 million values that are
// compared bind where nothing can be skipped. A tile's labels are put together in shared memory, because the
// groups of a row begin at any byte, and written four at a time.

#include "device.h"
#include "kernels.h"
#include "upsample_labels.h"

namespace {

// The tile's labels in shared memory: (kSide * groups_y, pitch), the first column at a multiple of 4 pixels.
struct StagedLabels {
    uint8_t* staged;
    int pitch;

    __device__ void operator()(const TilePlace& place, int y, int x, const uint32_t (&labels)[kSide]) const {
        uint8_t* to = staged + y * pitch + x + (place.x & 3);
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
            for (int j = 0; j < kSide; ++j) to[i * pitch + j] = static_cast<uint8_t>(labels[i] >> 8 * j);
    }
};

// At least a word of labels, whose first may lie left of the tile.
__host__ __device__ int staged_pitch(const LabelPlan& plan) { return kSide * (plan.groups_x + 1); }

// Word is what is written at once where it lies within the tile and the image.
template <class Word>
__device__ void write_tile(const LabelPlan& plan, const TilePlace& place, const StagedLabels& sink,
                           uint8_t* labels) {
    constexpr int kBytes = sizeof(Word);
    const int words = sink.pitch / kBytes;
    const int64_t height = plan.rows.output;
    const int64_t width = plan.columns.output;
    const int64_t first = place.x - (place.x & 3);
    const int64_t begin = place.x > 0 ? place.x : 0;
    const int64_t past = place.x + kSide * plan.groups_x;
    const int64_t end = past < width ? past : width;
    for (int i = threadIdx.x; i < kSide * plan.groups_y * words; i += kThreads) {
        const int row = i / words;
        const int64_t y = place.y + row;
        const int64_t x = first + i % words * kBytes;
        if (y < 0 || y >= height) continue;
        const uint8_t* from = sink.staged + i * kBytes;
        uint8_t* to = labels + (place.image * height + y) * width + x;
        if (x >= begin && x + kBytes <= end) {
            *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
        } else {
            for (int j = 0; j < kBytes; ++j)
                if (x + j >= begin && x + j < end) to[j] = from[j];
        }
    }
}

// One tile. Shared memory: the LabelTile, then the staged labels.
// The three taps of a ratio that is not whole need more registers on sm_100 and 120 than two blocks leave.
template <int kTapsOfGroup>
__global__ void __launch_bounds__(kThreads, kTapsOfGroup == 3 ? 1 : 2)
    write_labels(LabelPlan plan, uint8_t* labels) {
    extern __shared__ uint4 shared[];
    const LabelTile tile(plan, shared);
    StagedLabels sink{reinterpret_cast<uint8_t*>(shared) + plan.shared, staged_pitch(plan)};
    label_any_tile<kTapsOfGroup>(plan, blockIdx.x, tile, sink);
    const TilePlace place(plan, blockIdx.x);
    if (plan.columns.output % 4 == 0)
        write_tile<uint32_t>(plan, place, sink, labels);
    else
        write_tile<uint8_t>(plan, place, sink, labels);
}

template <int kTapsOfGroup>
void launch(const LabelPlan& plan, uint8_t* labels, int device, cudaStream_t stream) {
    const int shared = plan.shared + staged_pitch(plan) * kSide * plan.groups_y;
    allow_shared<write_labels<kTapsOfGroup>>(shared, device);
    write_labels<kTapsOfGroup><<<plan.tiles, kThreads, shared, stream>>>(plan, labels);
}

}  // namespace

namespace cuda {

void upsample_argmax(const UpsampleArgmaxArgs& args, int device, CudaStream cuda_stream) {
    if (args.logits.batch == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    const LabelPlan plan = label_plan(args, kTileClasses);
    if (plan.taps == 2)
        launch<2>(plan, args.labels, device, stream);
    else if (plan.taps == 3)
        launch<3>(plan, args.labels, device, stream);
    else
        launch<0>(plan, args.labels, device, stream);
    check_cuda(cudaGetLastError(), "upsample_argmax");
}

}  // namespace cuda

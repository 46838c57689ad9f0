// A rectangle of a resized uint8 image, padding and flip included, and of its mask: one launch each.
//
// A block owns a tile of the output. Each source row that the tile needs is resampled across once, into
// shared memory, and the tile's rows are weighted sums of those. Shared memory holds kHeld of them at a time,
// however many a wide filter needs: the sums stay in registers from one such part to the next.
//
// A tap weighs reach - |distance|, both counted in 1 / (2 scaled) of a source pixel, so that weights are
// whole numbers and their sum is exact: no fp64, of which many chips have little. Pixels are summed in fp32.
//
// Bytes: the window's part of the source, 3 or 1 a pixel, and the result. 769 x 769 pixels at scale 1 are 3.6
// MB, a microsecond of a large chip's memory; what should bind is instructions, by the code for sm_90 some
// 350 a pixel there, and where the image shrinks the 3 loads of a byte for each of the 2 reach taps across.

#include <stdexcept>

#include "../augment_image.h"
#include "device.h"
#include "kernels.h"

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kEach = 3;  // rows of a tile for each warp
constexpr int kRows = kEach * kWarps;
constexpr int kColumns = kLanes;
constexpr int kTogether = 4;               // source rows that a thread resamples across at a time
constexpr int kHeld = kTogether * kWarps;  // in shared memory
constexpr int kChannels = 3;
constexpr int kLine = kChannels * kColumns;  // values of a row of a tile
constexpr int kRun = 1 << 12;                // taps added up before they join a larger sum, which is fp32 too

__device__ int least(int a, int b) { return a < b ? a : b; }

// Distances in 1 / (2 scaled) of a source pixel; all are below 2^26.
struct Filter {
    int64_t source, scaled;
    int step;   // from one source pixel to the next
    int reach;  // the distance from which on a tap weighs nothing

    Filter(int64_t source_length, int64_t scaled_length)
        : source(source_length),
          scaled(scaled_length),
          step(static_cast<int>(2 * scaled_length)),
          reach(static_cast<int>(2 * larger(source_length, scaled_length))) {}

    __device__ float weight(int distance) const {
        return static_cast<float>(reach - (distance < 0 ? -distance : distance));
    }
};

// The source pixels that make one scaled pixel.
struct alignas(16) Taps {
    int first, count;
    int distance;  // of the first from the centre, negative before it
    float share;   // 1 / the sum of the weights
};

// at: 0 to scaled - 1
__device__ Taps taps_of(const Filter& filter, int64_t at) {
    const int64_t centre = (2 * at + 1) * filter.source;
    const int64_t before = centre - filter.reach - filter.scaled;  // a pixel there would weigh 0
    const int64_t first = before < 0 ? 0 : before / filter.step + 1;
    const int start = static_cast<int>((2 * first + 1) * filter.scaled - centre);
    int64_t sum = 0;
    int64_t end = first;
    for (int distance = start; end < filter.source && distance < filter.reach; distance += filter.step) {
        sum += filter.reach - (distance < 0 ? -distance : distance);
        ++end;
    }
    return {static_cast<int>(first), static_cast<int>(end - first), start, 1.0f / static_cast<float>(sum)};
}

struct CropPlan {
    CropArgs args;
    Span rows, columns;  // of the output that are not padding
    Filter vertical, horizontal;
    uint32_t tiles_x, tiles;

    // Where an output row or column lies in the scaled image.
    __device__ int64_t scaled_row(int64_t y) const { return args.top + y; }
    __device__ int64_t scaled_column(int64_t x) const {
        return args.flip ? args.right - 1 - x : args.left + x;
    }
};

CropPlan crop_plan(const CropArgs& args) {
    const int64_t height = args.bottom - args.top;
    const int64_t width = args.right - args.left;
    const Span columns = inside(args.left, args.right, args.scaled_width);
    const int64_t tiles_y = (height + kRows - 1) / kRows;
    const int64_t tiles_x = (width + kColumns - 1) / kColumns;
    if (tiles_x > INT32_MAX / tiles_y) throw std::invalid_argument("more than 2^31 tiles");
    return {args,
            inside(args.top, args.bottom, args.scaled_height),
            args.flip ? reversed(columns, width) : columns,
            Filter(args.height, args.scaled_height),
            Filter(args.width, args.scaled_width),
            static_cast<uint32_t>(tiles_x),
            static_cast<uint32_t>(tiles_x * tiles_y)};
}

// Part of an axis of a tile.
struct Part {
    int begin, end;

    __device__ bool has(int i) const { return begin <= i && i < end; }
    __device__ bool empty() const { return begin >= end; }
};

__device__ Part part_of(Span span, int64_t origin, int length) {
    return {static_cast<int>(larger(0, smaller(length, span.begin - origin))),
            static_cast<int>(larger(0, smaller(length, span.end - origin)))};
}

struct Tile {
    int64_t y, x;        // in the output
    Part rows, columns;  // that are not padding
    int height, width;   // that lie in the output

    __device__ Tile(const CropPlan& plan, uint32_t index)
        : y(int64_t{kRows} * (index / plan.tiles_x)), x(int64_t{kColumns} * (index % plan.tiles_x)) {
        rows = part_of(plan.rows, y, kRows);
        columns = part_of(plan.columns, x, kColumns);
        height = static_cast<int>(smaller(kRows, plan.args.bottom - plan.args.top - y));
        width = static_cast<int>(smaller(kColumns, plan.args.right - plan.args.left - x));
    }
};

// `count` source rows from `row` on, at most kHeld, to held (kHeld, kLine).
__device__ void across(const CropPlan& plan, const Taps& taps, int row, int count, float* held) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const uint8_t* from[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
        from[i] = plan.args.source + (int64_t{row} + warp + i * kWarps) * plan.args.row_stride +
                  kChannels * taps.first;
    for (int done = 0; done < taps.count; done += kRun) {
        const int past = least(taps.count, done + kRun);
        float sums[kTogether][kChannels] = {};
#pragma unroll 1
        for (int k = done; k < past; ++k) {
            const float weight = plan.horizontal.weight(taps.distance + k * plan.horizontal.step);
            uint8_t pixels[kTogether][kChannels] = {};  // all on their way before the first is used
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
                if (warp + i * kWarps < count)
#pragma unroll
                    for (int c = 0; c < kChannels; ++c) pixels[i][c] = __ldg(from[i] + kChannels * k + c);
#pragma unroll
            for (int i = 0; i < kTogether; ++i)
#pragma unroll
                for (int c = 0; c < kChannels; ++c) sums[i][c] += weight * static_cast<float>(pixels[i][c]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
                float* const to = held + (warp + i * kWarps) * kLine + kChannels * lane + c;
                *to = (done > 0 ? *to : 0.0f) + sums[i][c] * taps.share;
            }
    }
}

// Adds the taps among `count` held rows from `row` on to sums: three values of a row of the tile for each
// lane, kLanes apart, whatever channels. Even for 2^24 rows the sums of parts are off by a twentieth of a
// level only.
__device__ void down(const Filter& filter, const Taps& taps, int row, int count, const float* held,
                     float (&sums)[kChannels]) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int begin = taps.first > row ? taps.first : row;
    const int end = least(taps.first + taps.count, row + count);
    float part[kChannels] = {};
#pragma unroll 2
    for (int r = begin; r < end; ++r) {
        const float weight = filter.weight(taps.distance + (r - taps.first) * filter.step);
        const float* const line = held + (r - row) * kLine + lane;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) part[i] += weight * line[i * kLanes];
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums[i] += part[i];
}

__device__ void write_row(const CropPlan& plan, const Tile& tile, int y, float share,
                          const float (&sums)[kChannels]) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int64_t width = plan.args.right - plan.args.left;
    uint8_t* const out = plan.args.out + kChannels * ((tile.y + y) * width + tile.x);
    const uint32_t pad = plan.args.pad[0] | plan.args.pad[1] << 8 | plan.args.pad[2] << 16;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
        const int at = lane + i * kLanes;
        if (at >= kChannels * tile.width) continue;
        const bool image = tile.rows.has(y) && tile.columns.has(at / kChannels);
        out[at] = static_cast<uint8_t>(image ? static_cast<uint32_t>(sums[i] * share + 0.5f)
                                             : pad >> 8 * (at % kChannels));
    }
}

constexpr int kShared = (kRows + kColumns) * sizeof(Taps) + kHeld * kLine * sizeof(float);

__global__ void __launch_bounds__(kThreads, 4) crop_image(CropPlan plan) {
    extern __shared__ uint4 shared[];
    Taps* const row_taps = reinterpret_cast<Taps*>(shared);
    Taps* const column_taps = row_taps + kRows;
    float* const held = reinterpret_cast<float*>(column_taps + kColumns);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kLanes;
    const int lane = thread % kLanes;
    const Tile tile(plan, blockIdx.x);
    const Taps none = {0, 0, 0, 0.0f};  // of padding
    if (warp == 0 && lane < kRows)
        row_taps[lane] = tile.rows.has(lane) ? taps_of(plan.vertical, plan.scaled_row(tile.y + lane)) : none;
    if (warp == 1)
        column_taps[lane] =
            tile.columns.has(lane) ? taps_of(plan.horizontal, plan.scaled_column(tile.x + lane)) : none;
    __syncthreads();

    const Taps column = column_taps[lane];
    float sums[kEach][kChannels] = {};
    int begin = 0;
    int end = 0;
    if (!tile.rows.empty() && !tile.columns.empty()) {
        begin = row_taps[tile.rows.begin].first;
        end = row_taps[tile.rows.end - 1].first + row_taps[tile.rows.end - 1].count;
    }
    for (int row = begin; row < end; row += kHeld) {
        const int count = least(kHeld, end - row);
        across(plan, column, row, count, held);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            down(plan.vertical, row_taps[warp + i * kWarps], row, count, held, sums[i]);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int y = warp + i * kWarps;
        if (y < tile.height) write_row(plan, tile, y, row_taps[y].share, sums[i]);
    }
}

constexpr int kMaskShared = (kRows + kColumns) * sizeof(int);

__global__ void __launch_bounds__(kThreads) crop_mask(CropPlan plan) {
    extern __shared__ uint4 shared[];
    int* const source_row = reinterpret_cast<int*>(shared);
    int* const source_column = source_row + kRows;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kLanes;
    const int lane = thread % kLanes;
    const Tile tile(plan, blockIdx.x);
    if (warp == 0 && tile.rows.has(lane))
        source_row[lane] = static_cast<int>(
            nearest(plan.scaled_row(tile.y + lane), plan.vertical.source, plan.vertical.scaled));
    if (warp == 1 && tile.columns.has(lane))
        source_column[lane] = static_cast<int>(
            nearest(plan.scaled_column(tile.x + lane), plan.horizontal.source, plan.horizontal.scaled));
    __syncthreads();
    if (lane >= tile.width) return;
    const int64_t width = plan.args.right - plan.args.left;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int y = warp + i * kWarps;
        if (y >= tile.height) continue;
        uint8_t label = plan.args.pad[0];
        if (tile.rows.has(y) && tile.columns.has(lane))
            label = __ldg(plan.args.source + source_row[y] * plan.args.row_stride + source_column[lane]);
        plan.args.out[(tile.y + y) * width + tile.x + lane] = label;
    }
}

}  // namespace

namespace cuda {

void augment_image(const CropArgs& args, int device, CudaStream cuda_stream) {
    const CropPlan plan = crop_plan(args);
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    crop_image<<<plan.tiles, kThreads, kShared, stream>>>(plan);
    check_cuda(cudaGetLastError(), "augment_image");
}

void augment_image_mask(const CropArgs& args, int device, CudaStream cuda_stream) {
    const CropPlan plan = crop_plan(args);
    const DeviceGuard guard(device);
    const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
    crop_mask<<<plan.tiles, kThreads, kMaskShared, stream>>>(plan);
    check_cuda(cudaGetLastError(), "augment_image_mask");
}

}  // namespace cuda

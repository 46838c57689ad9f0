// The blocks of depthwise_plan.h: 3 x 3, 16 bytes of channels a thread.
//
// A block's rows of x come through a ring in shared memory by asynchronous copies, kStages - 1 of them on
// their way: a row is read from device memory once, and loads need no registers. A thread holds the weights
// of its channels in fp32 and the sums of two results of its column: each row of x, three loads from shared
// memory, ends the result above, goes on with the middle one and begins the one below. Taps in rows outside
// the image are code that is not run; columns outside are the zero at the end of each stage, and where they
// are outside for every pixel no code either.
//
// Instructions of a bf16 row that has all taps, counted in sm_90's: 175 a thread for 8 results and 32 bytes,
// of which 72 multiply and add, 24 unpack x, and 24 apply scale and shift, round and clamp: 44 cycles of a
// multiprocessor for the 1024 bytes of a warp. An H200 would move 5.4 TB/s at 1.75 GHz, so that its 4.3 of a
// copy should bind, with four fifths of the cycles in use; fp32, 110 instructions, and rows with dead taps
// have more room. Registers: 142 a thread in bf16 (72 of them weights: kept packed, they cost 72 instructions
// a row), so 12 warps of 64 in a multiprocessor. More are not needed, as only the ring waits for memory:
// three blocks have 48 KB on their way, and some 27 KB hide 0.75 us of latency at 4.8 TB/s.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "depthwise_plan.h"
#include "depthwise_statistics.h"
#include "lanes.h"

namespace {

// Which of the plan's blocks this is.
struct DepthwisePlace {
    uint32_t image, group, rate, part, tile;
    int row, rows_end, column;  // slots of results; the column is the tile's first

    __device__ DepthwisePlace(const DepthwisePlan& plan, uint32_t block) {
        const uint32_t both = block / plan.tiles;
        image = both / plan.groups;
        group = both - image * plan.groups;
        tile = block - both * plan.tiles;
        rate = 0;
        for (int i = 1; i < plan.args.rates; ++i) rate += tile >= plan.before[i] ? 1 : 0;
        const DepthwiseTiling& tiling = plan.tiling[rate];
        const uint32_t within = tile - plan.before[rate];
        const uint32_t across = within / tiling.parts;
        part = within - across * tiling.parts;
        row = static_cast<int>(part) * tiling.tile_rows;
        const int past = row + tiling.tile_rows;
        rows_end = past < tiling.rows.output ? past : tiling.rows.output;
        column = static_cast<int>(across) * plan.columns;
    }
};

// Vectors of one stage of the ring, of which the last is zero.
__host__ __device__ int stage_vectors(const DepthwisePlan& plan, int ratio) {
    return ((plan.columns - 1) * ratio + 3) * plan.vectors + 1;
}

template <int kRatio>
constexpr int kStages = kRatio == 1 ? 8 : 5;

// Blocks of a multiprocessor: at most 168 registers a thread for 8 channels, 96 for 4.
template <class T>
constexpr int kPlaces = Lanes<T>::kCount == 8 ? 3 : 5;

// This thread's copies of a row of x: kRatio + 1 vectors at most.
template <int kRatio>
struct DepthwiseCopies {
    static constexpr int kCount = kRatio + 1;
    const char* from[kCount];  // in the row of coordinate 0; null: none

    __device__ DepthwiseCopies(const DepthwisePlan& plan, const DepthwisePlace& place) {
        const DepthwiseAxis& axis = plan.tiling[place.rate].columns;
        const int of_pixel = static_cast<int>(plan.args.channels / plan.lanes);
        const int filled = stage_vectors(plan, kRatio) - 1;
        const uint4* image = static_cast<const uint4*>(plan.args.x) +
                             int64_t{place.image} * plan.args.height * plan.args.width * of_pixel;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int index = static_cast<int>(threadIdx.x) + i * kDepthwiseThreads;
            const int position = index / plan.vectors;
            const int vector = static_cast<int>(place.group) * plan.vectors + index - position * plan.vectors;
            const int slot = kRatio * place.column - 1 + position;
            const bool there = index < filled && vector < of_pixel && slot >= 0 && slot < axis.elements;
            const int64_t column = there ? int64_t{axis.coordinate(slot)} * axis.pitch : 0;
            from[i] = there ? reinterpret_cast<const char*>(image + column * of_pixel + vector) : nullptr;
        }
    }
    __device__ void start(uint4* stage, uint64_t offset) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (from[i] != nullptr)
                __pipeline_memcpy_async(stage + i * kDepthwiseThreads, from[i] + offset, sizeof(uint4));
    }
};

// The results of a thread: its column, channels, and where they go.
template <class T, int kRatio>
struct DepthwiseColumn {
    static constexpr int kLanes = Lanes<T>::kCount;
    int tap[3];   // vectors from a stage's first: of the columns to the left, in the middle, to the right
    bool writes;  // whether there is such a result
    int lane;     // vector of the block's
    int channel;  // the first
    char* to;     // in the first row

    __device__ DepthwiseColumn(const DepthwisePlan& plan, const DepthwisePlace& place) {
        const DepthwiseTiling& tiling = plan.tiling[place.rate];
        const DepthwiseAxis& axis = tiling.columns;
        const int of_pixel = static_cast<int>(plan.args.channels / kLanes);
        const int index = static_cast<int>(threadIdx.x) / plan.vectors;
        lane = static_cast<int>(threadIdx.x) - index * plan.vectors;
        const int vector = static_cast<int>(place.group) * plan.vectors + lane;
        const int slot = place.column + index;
        writes = index < plan.columns && vector < of_pixel && slot < axis.output;
        const int zero = stage_vectors(plan, kRatio) - 1;
        const int column = writes ? kRatio == 1 ? axis.coordinate(slot) : slot : 0;
        const int64_t middle = int64_t{column} * axis.stride;
#pragma unroll
        for (int b = 0; b < 3; ++b) {
            const int64_t at = middle + (b - 1) * int64_t{axis.dilation};
            const bool inside = writes && at >= 0 && at < axis.input;
            tap[b] = inside ? (kRatio * index + b) * plan.vectors + lane : zero;
        }
        channel = writes ? vector * kLanes : 0;
        uint4* image = static_cast<uint4*>(tiling.rate.y) +
                       int64_t{place.image} * tiling.rows.output * axis.output * of_pixel;
        to = reinterpret_cast<char*>(image + int64_t{column} * of_pixel + channel / kLanes);
    }
};

// (C, 3, 3) lies so that the nine taps of a vector's channels are nine vectors.
template <class T, int kLanes>
__device__ void load_weights(const void* weight, int channel, float (&taps)[9][kLanes]) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(weight) + int64_t{9} * channel);
#pragma unroll
    for (int i = 0; i < 9; ++i) {
        float x[kLanes];
        Lanes<T>::unpack(__ldg(from + i), x);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
            keep(x[j]);
            taps[(i * kLanes + j) % 9][(i * kLanes + j) / 9] = x[j];
        }
    }
}

// Scale and shift of a block's channels in shared memory, so that no lanes meet in a bank: (2, kLanes / 4,
// vectors).
template <int kLanes>
struct Affine {
    float4* at;
    int vectors;

    __device__ void load(const DepthwiseRate& rate, int lane, int channel) const {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            const int to = (i / 4 * vectors + lane) * 4 + i % 4;
            reinterpret_cast<float*>(at)[to] = rate.scale != nullptr ? __ldg(rate.scale + channel + i) : 1.0f;
            reinterpret_cast<float*>(at + kLanes / 4 * vectors)[to] =
                rate.shift != nullptr ? __ldg(rate.shift + channel + i) : 0.0f;
        }
    }
    __device__ void apply(int lane, float (&x)[kLanes]) const {
#pragma unroll
        for (int i = 0; i < kLanes / 4; ++i) {
            const float4 scale = at[i * vectors + lane];
            const float4 shift = at[(kLanes / 4 + i) * vectors + lane];
            x[4 * i] = __fmaf_rn(x[4 * i], scale.x, shift.x);
            x[4 * i + 1] = __fmaf_rn(x[4 * i + 1], scale.y, shift.y);
            x[4 * i + 2] = __fmaf_rn(x[4 * i + 2], scale.z, shift.z);
            x[4 * i + 3] = __fmaf_rn(x[4 * i + 3], scale.w, shift.w);
        }
    }
};

template <bool kBegin, int kLanes>
__device__ void add_product(float (&to)[kLanes], const float (&x)[kLanes], const float (&w)[kLanes],
                            const float (&before)[kLanes]) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) to[i] = __fmaf_rn(x[i], w[i], kBegin ? before[i] : to[i]);
}

template <class T, int kRatio, bool kStatistics>
struct DepthwiseThread {
    static constexpr int kLanes = Lanes<T>::kCount;

    float taps[9][kLanes];
    float middle[kLanes],
        below[kLanes];  // sums of the results of which this row is the middle, the upper tap
    Welford<kLanes> statistics;

    // What a row of x does; kAll: to three results and in three columns. above: the sum that it ends
    template <bool kAll>
    __device__ void row(const uint4* stage, const DepthwiseColumn<T, kRatio>& column, uint32_t is, bool sides,
                        float (&above)[kLanes]) {
        const bool lower = kAll || (is & DepthwiseStep::kLower);
        const bool centre = kAll || (is & DepthwiseStep::kMiddle);
        const bool upper = kAll || (is & DepthwiseStep::kUpper);
        constexpr int kOrder[] = {1, 0, 2};
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const int b = kOrder[i];
            if (i > 0 && !kAll && !sides) break;
            float x[kLanes];
            Lanes<T>::unpack(stage[column.tap[b]], x);
#pragma unroll
            for (int j = 0; j < kLanes; ++j) keep(x[j]);
            if (i == 0) {
                if (lower) add_product<true>(above, x, taps[6 + b], middle);
                if (centre) add_product<true>(middle, x, taps[3 + b], below);
#pragma unroll
                for (int j = 0; j < kLanes; ++j) below[j] = upper ? __fmul_rn(x[j], taps[b][j]) : 0.0f;
            } else {
                if (lower) add_product<false>(above, x, taps[6 + b], above);
                if (centre) add_product<false>(middle, x, taps[3 + b], middle);
                if (upper) add_product<false>(below, x, taps[b], below);
            }
        }
    }

    __device__ void finish(const float (&sum)[kLanes], const Affine<kLanes>& affine, const Bounds<T>& bounds,
                           const DepthwiseColumn<T, kRatio>& column, uint64_t offset) {
        float y[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) y[i] = sum[i];
        if (!kStatistics) affine.apply(column.lane, y);
        const uint4 packed = Lanes<T>::pack(y, bounds.low, bounds.high);
        if (column.writes) *reinterpret_cast<uint4*>(column.to + offset) = packed;
        if (kStatistics) {
            Lanes<T>::unpack(packed, y);
            statistics.add(y);
        }
    }
};

template <class T, int kRatio, bool kStatistics>
__global__ void __launch_bounds__(kDepthwiseThreads, kPlaces<T>)
    convolve_tiles(const __grid_constant__ DepthwisePlan plan) {
    constexpr int kLanes = Lanes<T>::kCount;
    constexpr int kDepth = kStages<kRatio>;
    extern __shared__ uint4 shared[];
    const DepthwisePlace place(plan, blockIdx.x);
    const DepthwiseTiling& tiling = plan.tiling[place.rate];
    const DepthwiseAxis& rows = tiling.rows;
    const DepthwiseCopies<kRatio> copies(plan, place);
    const DepthwiseColumn<T, kRatio> column(plan, place);
    const int of_stage = stage_vectors(plan, kRatio);
    if (threadIdx.x < kDepth) shared[threadIdx.x * of_stage + of_stage - 1] = {0, 0, 0, 0};

    const DepthwiseSpan span(rows, place.row, place.rows_end);
    const int count = span.last + 1 - span.first;
    const auto copy_row = [&](int stage_from, uint32_t coordinate) {
        copies.start(shared + stage_from + threadIdx.x, uint64_t{coordinate} * tiling.x_step);
    };
    for (int i = 0; i < kDepth - 1; ++i) {
        if (i < count) copy_row(i * of_stage, static_cast<uint32_t>(rows.coordinate(span.first + i)));
        __pipeline_commit();
    }
    const int ring = kDepth * of_stage;
    const Affine<kLanes> affine{reinterpret_cast<float4*>(shared + ring), plan.vectors};
    DepthwiseStep* steps = reinterpret_cast<DepthwiseStep*>(shared + ring + kLanes / 2 * plan.vectors);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kDepthwiseThreads)
        steps[i] = DepthwiseStep(rows, span.first + i, place.row, place.rows_end, span.first + i + kDepth - 1,
                                 span.last);
    if (!kStatistics && static_cast<int>(threadIdx.x) < plan.vectors)
        affine.load(tiling.rate, column.lane, column.channel);
    DepthwiseThread<T, kRatio, kStatistics> thread{};
    load_weights<T>(tiling.rate.weight, column.channel, thread.taps);
    const Bounds<T> bounds(kStatistics ? Activation::none : plan.args.activation);

    int stage = 0;
    int before = ring - of_stage;  // the stage of the row before
    for (int i = 0; i < count; ++i) {
        __pipeline_wait_prior(kDepth - 2);
        __syncthreads();  // this row is there for all, and the one before has been read by all
        const DepthwiseStep step = steps[i];
        if (step.ahead != DepthwiseStep::kNone) copy_row(before, step.ahead);
        __pipeline_commit();
        float above[kLanes];
        if ((step.is & DepthwiseStep::kAll) == DepthwiseStep::kAll && tiling.sides)
            thread.template row<true>(shared + stage, column, step.is, true, above);
        else
            thread.template row<false>(shared + stage, column, step.is, tiling.sides, above);
        if (step.is & DepthwiseStep::kLower)
            thread.finish(above, affine, bounds, column, uint64_t{step.above} * tiling.y_step);
        if (step.is & DepthwiseStep::kLast)
            thread.finish(thread.middle, affine, bounds, column, uint64_t{step.at} * tiling.y_step);
        before = stage;
        stage = stage + of_stage == ring ? 0 : stage + of_stage;
    }
    if (kStatistics) {
        __syncthreads();  // the ring has been read by all
        const int64_t part = int64_t{place.image} * plan.tiles + place.tile;
        const int live = tiling.columns.output - place.column;
        save_statistics(plan, thread.statistics, live < plan.columns ? live : plan.columns, part,
                        place.group * plan.vectors * kLanes, shared);
    }
}

}  // namespace

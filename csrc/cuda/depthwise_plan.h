// How a depthwise convolution of 3 x 3 is cut into blocks: arithmetic of the host and of the kernels.
//
// Results that lie STEP = dilation / gcd(dilation, stride) apart read each other's taps: a chain. Along an
// axis the chains are laid one after another, 0, STEP, 2 STEP, ..., 1, 1 + STEP, ...: in these `slots` taps
// are neighbours whatever the dilation, so that a tile of slots has a halo of one, and none where a chain
// ends. A block has a tile of columns, a vector of channels for each thread, and walks down `rows` slots.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../host_device.h"
#include "../types.h"

constexpr int kMostRates = 3;  // results of one launch

// One result of x. Everything is contiguous; scale and shift are (C,) or null, for 1 and 0.
struct DepthwiseRate {
    const void* weight;  // (C, kernel, kernel)
    const float* scale;
    const float* shift;
    void* y;  // (N, ceil(H / stride), ceil(W / stride), C)
    int64_t dilation;
};

struct DepthwiseCudaArgs {
    const void* x;  // (N, H, W, C)
    DType type;     // of x, y and weight
    int64_t batch, height, width, channels;
    int64_t kernel, stride;  // the padding is dilation * (kernel / 2)
    Activation activation;
    int rates;
    DepthwiseRate rate[kMostRates];
    // Of the only rate's rounded y, or null: mean and biased variance (C,); and the counts (parts,), means
    // and sums of squared deviations (parts, C) of its parts, as many as depthwise_conv_parts says.
    float *mean, *variance;
    float *counts, *means, *squares;
};

namespace {

constexpr int kDepthwiseThreads = 128;
constexpr int kMostVectors = 16;  // of a pixel in one block
constexpr int kMostRows = 128;    // of a block: its steps are a table in shared memory
constexpr int kLeastRows = 8;     // a walk's first row costs as much as its others: the halo's share
constexpr int kWaves = 4;         // blocks that a multiprocessor is to have one after another, in each place

struct DepthwiseAxis {
    int input, output, stride, dilation;
    // Chains run over `elements` coordinates, `step` apart; x's pixel is coordinate * pitch. With a ratio of
    // 1 coordinates are the results', else (step 1) they are those of x's pixels that have a tap at all.
    int elements, pitch, step, ratio;

    HOST_DEVICE int longest() const { return (elements + step - 1) / step; }

    HOST_DEVICE int coordinate(int slot) const {
        if (step == 1) return slot;
        const int shorter = elements / step;  // of the later chains; the first have one more
        const int longer = elements % step;
        if (slot < longer * (shorter + 1)) return slot / (shorter + 1) + slot % (shorter + 1) * step;
        const int rest = slot - longer * (shorter + 1);
        return longer + rest / shorter + rest % shorter * step;
    }
    HOST_DEVICE bool has_before(int coordinate) const { return coordinate >= step; }
    HOST_DEVICE bool has_after(int coordinate) const { return coordinate + step < elements; }
};

[[maybe_unused]] int greatest_common_divisor(int a, int b) {
    while (b != 0) {
        const int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// A dilation of the axis' length or more leaves the middle tap alone, as its length itself does.
[[maybe_unused]] DepthwiseAxis depthwise_axis(int64_t input, int64_t stride, int64_t dilation) {
    DepthwiseAxis axis{};
    axis.input = static_cast<int>(input);
    axis.stride = static_cast<int>(stride);
    axis.dilation = static_cast<int>(dilation < input ? dilation : (input + stride - 1) / stride * stride);
    axis.output = (axis.input + axis.stride - 1) / axis.stride;
    const int common = greatest_common_divisor(axis.dilation, axis.stride);
    axis.step = axis.dilation / common;
    axis.ratio = axis.stride / common;
    axis.pitch = axis.ratio == 1 ? axis.stride : axis.dilation;
    axis.elements = (axis.input + axis.pitch - 1) / axis.pitch;
    return axis;
}

// The slots of x that results [begin, end) read.
struct DepthwiseSpan {
    int first, last;

    HOST_DEVICE DepthwiseSpan(const DepthwiseAxis& axis, int begin, int end) {
        if (axis.ratio == 1) {
            first = begin - (axis.has_before(axis.coordinate(begin)) ? 1 : 0);
            last = end - 1 + (axis.has_after(axis.coordinate(end - 1)) ? 1 : 0);
        } else {
            first = begin > 0 ? axis.ratio * begin - 1 : 0;
            const int past = axis.ratio * (end - 1) + 1;
            last = past < axis.elements ? past : axis.elements - 1;
        }
    }
};

// What the row of x in `slot` is to the results [begin, end): a lower, middle and upper tap, each of another
// one.
struct alignas(16) DepthwiseStep {
    static constexpr uint32_t kLower = 1, kMiddle = 2, kUpper = 4, kAll = 7;
    static constexpr uint32_t kLast = 8;  // there is no row below: the result of the middle is done
    static constexpr uint32_t kNone = UINT32_MAX;

    uint32_t is;         // kLower, ...
    uint32_t above, at;  // rows of the results of the lower and of the middle tap
    uint32_t ahead;      // coordinate of the row that is copied meanwhile, or kNone

    HOST_DEVICE DepthwiseStep(const DepthwiseAxis& axis, int slot, int begin, int end, int ahead_slot,
                              int last_slot) {
        const int coordinate = axis.coordinate(slot);
        const bool after = axis.has_after(coordinate);
        bool lower, middle, upper;
        if (axis.ratio == 1) {
            lower = axis.has_before(coordinate) && slot > begin;
            middle = slot >= begin && slot < end;
            upper = after && slot + 1 < end;
            above = static_cast<uint32_t>(coordinate - axis.step);
            at = static_cast<uint32_t>(coordinate);
        } else {  // a ratio of 2: every other row is nobody's middle
            const int half = slot / 2;
            middle = slot % 2 == 0;
            lower = !middle && half >= begin;
            upper = !middle && half + 1 < end;
            above = at = static_cast<uint32_t>(half);
        }
        is = (lower ? kLower : 0) | (middle ? kMiddle : 0) | (upper ? kUpper : 0) |
             (middle && !after ? kLast : 0);
        ahead = ahead_slot <= last_slot ? static_cast<uint32_t>(axis.coordinate(ahead_slot)) : kNone;
    }
};

struct DepthwiseTiling {
    DepthwiseRate rate;
    DepthwiseAxis rows, columns;
    uint32_t x_step, y_step;  // bytes from one coordinate, one row of the result to the next
    bool sides;               // the dilation leaves the taps beside the middle column inside for some
    int tile_rows;            // slots of results that a block walks down
    uint32_t parts, tiles;    // of an image: along the rows, and in all
};

struct DepthwisePlan {
    DepthwiseCudaArgs args;
    bool tiled;                   // else one result of one channel a thread, for anything
    int lanes;                    // channels of a vector of 16 bytes
    int vectors, columns;         // of a pixel, and pixels of a row, that a block has
    uint32_t groups;              // blocks that share a pixel's channels
    uint32_t before[kMostRates];  // tiles of an image's rates before this one
    uint32_t tiles;               // of an image, of all rates
    uint32_t blocks;              // (batch, groups, tiles)
    DepthwiseTiling tiling[kMostRates];
};

[[maybe_unused]] int bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

[[maybe_unused]] bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// As few blocks as possible; of equals whole sectors of 32 bytes, and then the fewest pixels of halo.
[[maybe_unused]] void choose_vectors(DepthwisePlan* plan, int64_t vectors, int64_t slots) {
    int64_t least = INT64_MAX;
    for (int v = 1; v <= kMostVectors && v <= vectors; ++v) {
        const int columns = kDepthwiseThreads / v;
        const int64_t groups = (vectors + v - 1) / v;
        const int64_t tiles = (slots + columns - 1) / columns;
        const int64_t cost = groups * tiles * 64 + (v % 2 == 0 || v == vectors ? 0 : 32) +
                             (v < 4 ? 4 - v : 0) + (v > 8 ? v - 8 : 0);
        if (cost < least) {
            least = cost;
            plan->vectors = v;
            plan->columns = columns;
            plan->groups = static_cast<uint32_t>(groups);
        }
    }
}

// Rows that leave kWaves blocks for every place of a multiprocessor; whole chains, which have no halo, where
// they fill every place once.
[[maybe_unused]] void choose_rows(DepthwiseTiling* tiling, int64_t walks, int64_t places) {
    const int output = tiling->rows.output;
    const int64_t wanted = (kWaves * places + walks - 1) / walks;
    int64_t rows = (output + wanted - 1) / wanted;
    if (rows < kLeastRows) rows = kLeastRows;
    const int64_t chain = tiling->rows.ratio == 1 ? tiling->rows.longest() : output;
    const int64_t whole = (rows + chain - 1) / chain * chain;
    if (rows > chain && walks * ((output + whole - 1) / whole) >= places) rows = whole;
    if (rows > kMostRows) rows = kMostRows;
    if (rows > output) rows = output;
    tiling->tile_rows = static_cast<int>(rows);
    tiling->parts = static_cast<uint32_t>((output + rows - 1) / rows);
}

// places: blocks that the device runs at once
[[maybe_unused]] DepthwisePlan depthwise_plan(const DepthwiseCudaArgs& args, int64_t places) {
    constexpr int64_t kLongest = int64_t{1} << 30;
    DepthwisePlan plan{};
    plan.args = args;
    const int64_t lanes = 16 / bytes_of(args.type);
    const int64_t vectors = args.channels / lanes;
    plan.lanes = static_cast<int>(lanes);
    if (args.batch == 0 || args.kernel != 3 || args.channels % lanes != 0 || args.height > kLongest ||
        args.width > kLongest || args.stride > kLongest || !aligned(args.x))
        return plan;
    int64_t output = 0;
    for (int i = 0; i < args.rates; ++i) {
        DepthwiseTiling& tiling = plan.tiling[i];
        tiling.rate = args.rate[i];
        tiling.rows = depthwise_axis(args.height, args.stride, args.rate[i].dilation);
        tiling.columns = depthwise_axis(args.width, args.stride, args.rate[i].dilation);
        tiling.sides = args.rate[i].dilation < args.width;
        output = tiling.columns.output;
        const DepthwiseAxis* axes[] = {&tiling.rows, &tiling.columns};
        for (const DepthwiseAxis* axis : axes)
            if (axis->ratio > 2 || (axis->ratio == 2 && axis->step > 1)) return plan;
        if (tiling.rows.ratio != plan.tiling[0].rows.ratio || tiling.rows.ratio != tiling.columns.ratio)
            return plan;
        const int64_t pixel = args.channels * bytes_of(args.type);
        if (tiling.rows.pitch * args.width * pixel > UINT32_MAX) return plan;
        tiling.x_step = static_cast<uint32_t>(tiling.rows.pitch * args.width * pixel);
        tiling.y_step = static_cast<uint32_t>(output * pixel);
        if (!aligned(tiling.rate.weight) || !aligned(tiling.rate.y)) return plan;
    }
    choose_vectors(&plan, vectors, output);
    const int64_t across = (output + plan.columns - 1) / plan.columns;
    const int64_t walks = args.batch * plan.groups * across * args.rates;
    int64_t tiles = 0;
    for (int i = 0; i < args.rates; ++i) {
        DepthwiseTiling& tiling = plan.tiling[i];
        choose_rows(&tiling, walks, places);
        if (tiling.parts * across > INT32_MAX) return plan;
        tiling.tiles = static_cast<uint32_t>(tiling.parts * across);
        plan.before[i] = static_cast<uint32_t>(tiles);
        tiles += tiling.tiles;
        if (tiles * plan.groups * args.batch > INT32_MAX) return plan;
    }
    plan.tiles = static_cast<uint32_t>(tiles);
    plan.blocks = static_cast<uint32_t>(tiles * plan.groups * args.batch);
    plan.tiled = true;
    return plan;
}

// Rows of y that one part's statistics are of, where the blocks do not take them.
constexpr int64_t kStatisticsRows = 256;

[[maybe_unused]] int64_t result_pixels(const DepthwiseCudaArgs& args) {
    return args.batch * ((args.height + args.stride - 1) / args.stride) *
           ((args.width + args.stride - 1) / args.stride);
}

[[maybe_unused]] int64_t statistics_parts(const DepthwisePlan& plan) {
    if (plan.tiled) return plan.args.batch * plan.tiles;
    return (result_pixels(plan.args) + kStatisticsRows - 1) / kStatisticsRows;
}

}  // namespace

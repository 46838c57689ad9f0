// Both gradients of a depthwise convolution in one pass over grad_y and x.
//
// A task is a block of rows of all images and a block of channels: it writes its part of grad_x, which is
// gathered, and its own table of sums for grad_weight. The tables are added in the order of the blocks, which
// depend on the shape alone, so neither gradient depends on the number of threads.

#include "depthwise_conv_backward.h"

#include <cstdlib>

#include "depthwise_backward_row.h"

namespace {

// Whole pixels as far as it goes: memory is read in order.
constexpr int64_t kChannelBlock = 512;
constexpr int64_t kElementsPerThread = 1 << 15;  // less is not worth waking a thread
constexpr int64_t kBlockRows = 32;
constexpr int64_t kFewestBlockRows = 8;
constexpr int64_t kBlockPixels = 1024;  // at least, or the tables would be large beside x
constexpr int64_t kTasks = 64;          // where there are rows enough: for processors of many cores
constexpr int64_t kLine = 64;           // bytes

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

struct Plan {
    RowShape shape;
    int64_t rows;        // of all images
    int64_t row_blocks;  // of rows * i / row_blocks
    int64_t vectors;     // of channels; the last one ends at the last channel and may overlap the one before
    int64_t channel_blocks;  // of vectors * i / channel_blocks
    int64_t taps;            // floats of (kernel, kernel, padded C)
    int64_t table;           // those, and of (2, padded C)
    int teams;
    float* weight;    // taps
    float* norm;      // (3, padded C)
    float* sums;      // (row_blocks, table)
    float* row_sums;  // (teams, kernel, kernel, kLanes)
    Taps* columns;    // (width)
};

Taps taps_at(const DepthwiseBackwardArgs& args, int64_t position, int64_t out_size) {
    Taps taps = {0, 0, 0};
    const int64_t padding = args.dilation * (args.kernel / 2);
    for (int64_t tap = 0; tap < args.kernel; ++tap) {
        const int64_t reached = position + padding - args.dilation * tap;
        if (reached < 0) break;
        if (reached % args.stride != 0 || reached / args.stride >= out_size) continue;
        if (taps.count++ == 0) {
            taps.tap = tap;
            taps.out = reached / args.stride;
        }
    }
    return taps;
}

Plan make_plan(const DepthwiseBackwardArgs& args, int threads) {
    Plan plan = {};
    const int64_t divisor = common_divisor(args.stride, args.dilation);
    const int64_t padded = divided_up(args.channels, kLanes) * kLanes;
    plan.shape = {args.channels,
                  padded,
                  args.width,
                  args.out_width,
                  args.kernel,
                  args.dilation,
                  args.stride / divisor,
                  args.dilation / divisor,
                  lower_bound(args.norm.activation),
                  upper_bound(args.norm.activation),
                  nullptr};
    plan.rows = args.batch * args.height;
    plan.vectors = padded / kLanes;
    plan.channel_blocks = larger(1, plan.vectors * kLanes / kChannelBlock);
    int64_t block = larger(kBlockRows, divided_up(kBlockPixels, args.width));
    while (block > kFewestBlockRows && divided_up(plan.rows, block) * plan.channel_blocks < kTasks)
        block /= 2;
    plan.row_blocks = divided_up(plan.rows, block);
    plan.taps = args.kernel * args.kernel * padded;
    plan.table = plan.taps + (args.norm.mean != nullptr ? 2 * padded : 0);
    const int64_t elements = plan.rows * args.width * args.channels;
    const int64_t useful = smaller(plan.row_blocks * plan.channel_blocks, elements / kElementsPerThread + 1);
    plan.teams = static_cast<int>(larger(1, smaller(threads, useful)));
    return plan;
}

// One allocation, of which every part begins at a cache line.
void* allocate(Plan& plan) {
    const int64_t taps = plan.shape.kernel * plan.shape.kernel;
    const int64_t channels = plan.shape.padded_channels;
    const int64_t floats =
        plan.taps + 3 * channels + plan.table * plan.row_blocks + plan.teams * taps * kLanes;
    const int64_t bytes = floats * static_cast<int64_t>(sizeof(float)) +
                          plan.shape.width * static_cast<int64_t>(sizeof(Taps)) + kLine;
    void* memory = std::malloc(static_cast<size_t>(bytes));
    if (memory == nullptr) return nullptr;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    plan.weight = reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
    plan.norm = plan.weight + plan.taps;
    plan.sums = plan.norm + 3 * channels;
    plan.row_sums = plan.sums + plan.table * plan.row_blocks;
    plan.columns = reinterpret_cast<Taps*>(plan.row_sums + plan.teams * taps * kLanes);
    plan.shape.columns = plan.columns;
    return memory;
}

int64_t first_channel(const DepthwiseBackwardArgs& args, int64_t vector) {
    return smaller(vector * kLanes, args.channels - kLanes);
}

// (C, kernel, kernel) -> (kernel, kernel, padded C): the channels of one vector after the other
template <class W>
void transpose_weight(const DepthwiseBackwardArgs& args, const Plan& plan) {
    const int64_t taps = args.kernel * args.kernel;
    const int teams = plan.teams;
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int64_t v = 0; v < plan.vectors; ++v) {
        const W* from = static_cast<const W*>(args.weight) + first_channel(args, v) * taps;
        for (int64_t t = 0; t < taps; ++t) {
            float* to = plan.weight + t * plan.shape.padded_channels + v * kLanes;
            for (int i = 0; i < kLanes; ++i) to[i] = to_float(from[i * taps + t]);
        }
    }
}

// mean, scale and shift of x in the order of the weights
void make_norm(const DepthwiseBackwardArgs& args, const Plan& plan) {
    const int64_t padded = plan.shape.padded_channels;
    for (int64_t v = 0; v < plan.vectors; ++v)
        for (int i = 0; i < kLanes; ++i) {
            const int64_t c = first_channel(args, v) + i;
            float* to = plan.norm + v * kLanes + i;
            to[0] = args.norm.mean[c];
            to[padded] = norm_scale(args.norm, c);
            to[2 * padded] = norm_shift(args.norm, c);
        }
}

// What the norm's gradient needs, from the sums of the blocks.
void reduce_norm(const DepthwiseBackwardArgs& args, const Plan& plan) {
    const int64_t padded = plan.shape.padded_channels;
    for (int64_t v = 0; v < plan.vectors; ++v)
        for (int i = 0; i < kLanes; ++i) {
            const float* from = plan.sums + plan.taps + v * kLanes + i;
            double sum = 0.0, product = 0.0;
            for (int64_t block = 0; block < plan.row_blocks; ++block, from += plan.table) {
                sum += static_cast<double>(from[0]);
                product += static_cast<double>(from[padded]);
            }
            const int64_t c = first_channel(args, v) + i;
            const double var =
                args.batch == 0 ? 0.0 : static_cast<double>(args.norm.var[c]);  // NaN of no pixels
            args.sum_grad[c] = static_cast<float>(sum);
            args.sum_grad_xhat[c] =
                static_cast<float>(product / sqrt(var + static_cast<double>(args.norm.eps)));
        }
}

// grad_weight from the sums of the blocks; in fp64, as there may be thousands of them.
template <class W>
void reduce(const DepthwiseBackwardArgs& args, const Plan& plan) {
    const int64_t taps = args.kernel * args.kernel;
    const int64_t vectors = args.channels / kLanes;
    const int teams = plan.teams;
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int64_t v = 0; v < plan.vectors; ++v) {
        W* to = static_cast<W*>(args.grad_weight) + first_channel(args, v) * taps;
        // What the last vector shares with the one before, that one writes.
        const int begin = static_cast<int>(v < vectors ? 0 : plan.vectors * kLanes - args.channels);
        for (int64_t t = 0; t < taps; ++t) {
            double sum[kLanes] = {};
            const float* from = plan.sums + t * plan.shape.padded_channels + v * kLanes;
            for (int64_t block = 0; block < plan.row_blocks; ++block, from += plan.table)
                for (int i = 0; i < kLanes; ++i) sum[i] += static_cast<double>(from[i]);
            for (int i = begin; i < kLanes; ++i) from_float(static_cast<float>(sum[i]), to + i * taps + t);
        }
    }
}

template <class T>
using RunRow = void(const Row<T>&, const RowShape&);

// What computes a row that `taps` vertical taps reach.
template <class T, bool kNeedX, bool kNeedWeight, bool kNorm>
RunRow<T>* row_kernel(const DepthwiseBackwardArgs& args, int64_t taps) {
    if (args.kernel != kTaps || taps < 1) return any_row<T, kNeedX, kNeedWeight, kNorm>;
    if (args.stride == 1) {
        if (taps == 1) return row_of_stride_1<T, 1, kNeedX, kNeedWeight, kNorm>;
        if (taps == 2) return row_of_stride_1<T, 2, kNeedX, kNeedWeight, kNorm>;
        return row_of_stride_1<T, 3, kNeedX, kNeedWeight, kNorm>;
    }
    if (args.stride != 2 || args.dilation != 1) return any_row<T, kNeedX, kNeedWeight, kNorm>;
    return taps == 1 ? row_of_stride_2<T, 1, kNeedX, kNeedWeight, kNorm>
                     : row_of_stride_2<T, 2, kNeedX, kNeedWeight, kNorm>;
}

template <class T, bool kNeedX, bool kNeedWeight, bool kNorm>
void run_task(const DepthwiseBackwardArgs& args, const Plan& plan, int64_t task, int team) {
    const RowShape& shape = plan.shape;
    const int64_t channels = args.channels;
    // Neighbouring tasks share their channels: a thread keeps its weights in cache.
    const int64_t row_block = task % plan.row_blocks, channel_block = task / plan.row_blocks;
    const int64_t first = plan.vectors * channel_block / plan.channel_blocks;
    const int64_t last = plan.vectors * (channel_block + 1) / plan.channel_blocks;
    const int64_t taps = args.kernel * args.kernel;
    float* sums = plan.sums + row_block * plan.table;
    if (kNeedWeight)
        for (int64_t t = 0; t < taps; ++t)
            for (int64_t v = first; v < last; ++v)
                store(sums + t * shape.padded_channels + v * kLanes, zero());
    if (kNorm)
        for (int64_t v = first; v < last; ++v) {
            store(sums + plan.taps + v * kLanes, zero());
            store(sums + plan.taps + shape.padded_channels + v * kLanes, zero());
        }

    const int64_t end = plan.rows * (row_block + 1) / plan.row_blocks;
    for (int64_t r = plan.rows * row_block / plan.row_blocks; r < end; ++r) {
        const int64_t grad_y = r / args.height * args.out_height * args.out_width * channels;
        const int64_t x = r * args.width * channels;
        Row<T> row;
        row.taps = taps_at(args, r % args.height, args.out_height);
        row.row_sums = plan.row_sums + team * taps * kLanes;
        RunRow<T>* const run = row_kernel<T, kNeedX, kNeedWeight, kNorm>(args, row.taps.count);
        for (int64_t v = first; v < last; ++v) {
            const int64_t c = first_channel(args, v);
            row.x = static_cast<const T*>(args.x) + x + c;
            row.grad_y = static_cast<const T*>(args.grad_y) + grad_y + c;
            row.grad_x = kNeedX ? static_cast<T*>(args.grad_x) + x + c : nullptr;
            row.weight = plan.weight + v * kLanes;
            row.sums = sums + v * kLanes;
            row.norm = plan.norm + v * kLanes;
            row.norm_sums = kNorm ? sums + plan.taps + v * kLanes : nullptr;
            run(row, shape);
        }
    }
}

template <class T, bool kNeedX, bool kNeedWeight, bool kNorm>
void run_tasks(const DepthwiseBackwardArgs& args, const Plan& plan) {
    const int64_t tasks = plan.row_blocks * plan.channel_blocks;
    const int teams = plan.teams;
    // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team)
        for (int64_t task = tasks * team / teams; task < tasks * (team + 1) / teams; ++task)
            run_task<T, kNeedX, kNeedWeight, kNorm>(args, plan, task, team);
}

template <class T>
void run_needed(const DepthwiseBackwardArgs& args, const Plan& plan) {
    if (args.norm.mean != nullptr)
        run_tasks<T, true, true, true>(args, plan);
    else if (args.grad_x != nullptr && args.grad_weight != nullptr)
        run_tasks<T, true, true, false>(args, plan);
    else if (args.grad_x != nullptr)
        run_tasks<T, true, false, false>(args, plan);
    else if (args.grad_weight != nullptr)
        run_tasks<T, false, true, false>(args, plan);
}

}  // namespace

namespace ISA {

bool depthwise_conv_backward(const DepthwiseBackwardArgs& args, int threads) {
    Plan plan = make_plan(args, threads);
    void* memory = allocate(plan);
    if (memory == nullptr) return false;
    const bool wide_weight = args.weight_dtype == DType::f32;
    wide_weight ? transpose_weight<float>(args, plan) : transpose_weight<bf16>(args, plan);
    if (args.norm.mean != nullptr) make_norm(args, plan);
    for (int64_t w = 0; w < args.width; ++w) plan.columns[w] = taps_at(args, w, args.out_width);
    args.dtype == DType::f32 ? run_needed<float>(args, plan) : run_needed<bf16>(args, plan);
    if (args.grad_weight != nullptr) wide_weight ? reduce<float>(args, plan) : reduce<bf16>(args, plan);
    if (args.norm.mean != nullptr) reduce_norm(args, plan);
    std::free(memory);
    return true;
}

}  // namespace ISA

// The gradient of upsample_concat, gathered for each pixel of x.
//
// It is separable. A row of grad is reduced along its width to the width of x, each element read once and
// added to both of its columns; that short row is then added to both of its rows of x. Every sum runs in an
// order that does not depend on the number of threads.
#pragma once

#include "prefetch.h"
#include "upsample_concat_taps.h"

namespace {

constexpr int64_t kCacheBytes = 1 << 18;  // what the gradient's three rows of x may take of the L2
constexpr int64_t kChannelStep = 64;      // a channel block starts on a cache line

// A vector of channels of one run. rest: nothing, or how many of its channels there are.
template <class T, class... Rest>
void reduce_channels(const T* grad, int64_t stride, const Tap* columns, int64_t count, float* low,
                     float* high, Rest... rest) {
    Vec to_low = zero(), to_high = zero();
    const int64_t ahead = count * stride;
    for (int64_t i = 0; i < count; ++i, grad += stride) {
        // The pixels of a run lie too far apart, and are too few, for the hardware to see what comes next.
        prefetch(grad, ahead * static_cast<int64_t>(sizeof(T)));
        const Vec g = load(grad, rest...);
        to_low = fma(set1(columns[i].weight_low), g, to_low);
        to_high = fma(set1(columns[i].weight_high), g, to_high);
    }
    store(low, load(low, rest...) + to_low, rest...);
    store(high, load(high, rest...) + to_high, rest...);  // after `low`: both are one at the end of the axis
}

// Adds the `count` pixels of a run, `stride` elements apart, to their two columns of x.
template <class T>
void reduce_run(const T* grad, int64_t stride, const Tap* columns, int64_t count, int64_t channels,
                float* low, float* high) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes)
        reduce_channels(grad + c, stride, columns, count, low + c, high + c);
    if (c < channels)
        reduce_channels(grad + c, stride, columns, count, low + c, high + c, static_cast<int>(channels - c));
}

void add_scaled(float* sum, const float* row, float weight, int64_t size) {
    const Vec factor = set1(weight);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(sum + i, fma(factor, load(row + i), load(sum + i)));
    for (; i < size; ++i) sum[i] += weight * row[i];
}

// Part of the gradient: rows of one image of x, and a block of channels.
struct Part {
    int64_t image, row_begin, row_end, channel_begin, channel_end;
};

template <class T>
void flush(const UpsampleConcatBackwardArgs& args, const Part& part, int64_t row, float* sum) {
    const UpsampleConcatShape& s = args.shape;
    const int64_t channels = part.channel_end - part.channel_begin;
    T* out = static_cast<T*>(args.grad_x) + (part.image * s.height + row) * s.width * s.channels +
             part.channel_begin;
    for (int64_t x = 0; x < s.width; ++x) {
        const float* from = sum + x * channels;
        T* to = out + x * s.channels;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) store(to + c, load(from + c));
        for (; c < channels; ++c) from_float(from[c], to + c);
    }
    std::memset(sum, 0, sizeof(float) * static_cast<size_t>(s.width * channels));
}

// buffer: (3, width, channels of the part)
template <class T>
void gather(const UpsampleConcatBackwardArgs& args, const Axis& rows, const Tap* columns, const Part& part,
            float* buffer) {
    const UpsampleConcatShape& s = args.shape;
    const int64_t stride = s.channels + s.low_channels;
    const int64_t channels = part.channel_end - part.channel_begin;
    const int64_t size = s.width * channels;
    float* const short_row = buffer;
    float* const sums[2] = {buffer + size, buffer + 2 * size};  // of an even and an odd row of x
    std::memset(buffer, 0, sizeof(float) * static_cast<size_t>(3 * size));
    int64_t unfinished = part.row_begin;
    for (int64_t y = rows.first_reading(part.row_begin); y < s.out_height; ++y) {
        const Tap row = rows.at(y);
        if (row.low >= part.row_end) break;
        for (; unfinished < row.low; ++unfinished) flush<T>(args, part, unfinished, sums[unfinished & 1]);
        const T* grad = static_cast<const T*>(args.grad) +
                        (part.image * s.out_height + y) * s.out_width * stride + part.channel_begin;
        std::memset(short_row, 0, sizeof(float) * static_cast<size_t>(size));
        for (int64_t begin = 0, end; begin < s.out_width; begin = end) {
            end = run_end(columns, begin, s.out_width);
            reduce_run(grad + begin * stride, stride, columns + begin, end - begin, channels,
                       short_row + columns[begin].low * channels, short_row + columns[begin].high * channels);
        }
        if (row.low >= part.row_begin) add_scaled(sums[row.low & 1], short_row, row.weight_low, size);
        if (row.high < part.row_end) add_scaled(sums[row.high & 1], short_row, row.weight_high, size);
    }
    for (; unfinished < part.row_end; ++unfinished) flush<T>(args, part, unfinished, sums[unfinished & 1]);
}

// Rows of x and blocks of channels to threads. More blocks where rows are wide, or fewer than threads.
template <class T>
bool backward_x(const UpsampleConcatBackwardArgs& args, int threads) {
    const UpsampleConcatShape& s = args.shape;
    const int64_t total = s.images * s.height;
    const int64_t steps = (s.channels + kChannelStep - 1) / kChannelStep;
    const int64_t grad_bytes =
        s.images * s.out_height * s.out_width * s.channels * static_cast<int64_t>(sizeof(T));
    const int teams = teams_for(total * steps, grad_bytes, threads);
    const int64_t row_parts = total < teams ? total : teams;
    int64_t blocks = (teams + row_parts - 1) / row_parts;
    const int64_t row_bytes = 3 * s.width * s.channels * static_cast<int64_t>(sizeof(float));
    if (blocks < row_bytes / kCacheBytes) blocks = row_bytes / kCacheBytes;
    const int64_t block = (steps + blocks - 1) / blocks * kChannelStep;
    blocks = (s.channels + block - 1) / block;

    const Axis rows(s.height, s.out_height, s.align_corners);
    const int64_t buffer = 3 * s.width * (block < s.channels ? block : s.channels);
    Tap* columns = Axis(s.width, s.out_width, s.align_corners).table();
    float* buffers = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(buffer * teams)));
    const bool enough = columns != nullptr && buffers != nullptr;
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int64_t team = 0; team < (enough ? teams : 0); ++team) {
        const int64_t items = row_parts * blocks;
        for (int64_t item = items * team / teams; item < items * (team + 1) / teams; ++item) {
            const int64_t row_part = item / blocks, channel = item % blocks * block;
            const int64_t channel_end = channel + block < s.channels ? channel + block : s.channels;
            const int64_t last = total * (row_part + 1) / row_parts;
            for (int64_t row = total * row_part / row_parts; row < last;) {
                const int64_t image = row / s.height, first = image * s.height;
                const int64_t end = last < first + s.height ? last : first + s.height;
                const Part part = {image, row - first, end - first, channel, channel_end};
                gather<T>(args, rows, columns, part, buffers + buffer * team);
                row = end;
            }
        }
    }
    std::free(columns);
    std::free(buffers);
    return enough;
}

template <class T>
void backward_low(const UpsampleConcatBackwardArgs& args, int threads) {
    const UpsampleConcatShape& s = args.shape;
    const int64_t total = s.images * s.out_height;
    const int64_t stride = s.channels + s.low_channels;
    const int64_t bytes = s.low_channels * static_cast<int64_t>(sizeof(T));
    const int teams = teams_for(total, total * s.out_width * bytes, threads);
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int64_t row = 0; row < total; ++row) {
        const T* from = static_cast<const T*>(args.grad) + row * s.out_width * stride + s.channels;
        T* to = static_cast<T*>(args.grad_low) + row * s.out_width * s.low_channels;
        for (int64_t i = 0; i < s.out_width; ++i) copy(to + i * s.low_channels, from + i * stride, bytes);
    }
}

template <class T>
bool backward(const UpsampleConcatBackwardArgs& args, int threads) {
    if (args.shape.images == 0) return true;
    if (args.grad_low != nullptr) backward_low<T>(args, threads);
    return args.grad_x == nullptr || backward_x<T>(args, threads);
}

}  // namespace

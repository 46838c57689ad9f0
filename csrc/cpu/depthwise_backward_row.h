// One row of x in the backward pass of a depthwise convolution, for one vector of channels.
//
// Both gradients are seen from the pixel of x: with o the pixel of grad_y that the tap t reaches from there,
//   grad_x[pixel] = sum over t of grad_y[o] * weight[t],    grad_weight[t] += grad_y[o] * x[pixel],
// so that every vector of grad_y is loaded and widened once for two multiplications, at any stride. Taps
// outside of grad_y take no part: a zero in their place would turn an Inf of x or of the weight into NaN.
#pragma once

#include "input_norm.h"
#include "prefetch.h"
#include "vec.h"

namespace {

// The taps of one axis that reach grad_y from one position of x: the first, and where it reaches it. The next
// one is tap_step further and reaches out_step less far.
struct Taps {
    int64_t tap;
    int64_t out;
    int64_t count;
};

template <class T>
struct Row {
    const T* x;           // (width, C), of which this vector's channels
    const T* grad_y;      // (out_height, out_width, C)
    T* grad_x;            // (width, C)
    const float* weight;  // (kernel, kernel, padded C)
    float* sums;          // (kernel, kernel, padded C): what grad_weight gets from a block of rows, added to
    float* row_sums;      // (kernel, kernel, kLanes), for any_row
    const float* norm;    // (3, padded C): mean, scale and shift of the norm of x
    float* norm_sums;     // (2, padded C): the sums that its gradient needs, added to
    Taps taps;            // of the vertical axis
};

struct RowShape {
    int64_t channels;
    int64_t padded_channels;
    int64_t width;
    int64_t out_width;
    int64_t kernel;
    int64_t dilation;
    int64_t tap_step;
    int64_t out_step;
    float low, high;      // bounds of the activation of x
    const Taps* columns;  // (width), for any_row
};

// With kNorm, what was convolved is the normalised and activated x; without, x.
template <bool kNorm>
struct Normalised {
    Vec mean, scale, shift, low, high;
    Vec sum = zero(), product = zero();

    template <class T>
    ALWAYS_INLINE Normalised(const Row<T>& row, const RowShape& shape) {
        if (!kNorm) return;
        mean = load(row.norm);
        scale = load(row.norm + shape.padded_channels);
        shift = load(row.norm + 2 * shape.padded_channels);
        low = set1(shape.low);
        high = set1(shape.high);
    }
    ALWAYS_INLINE Vec input(Vec x) const { return kNorm ? min(high, max(low, fma(x, scale, shift))) : x; }
    // The gradient where the activation let it pass. A bound that is reached does not pass.
    ALWAYS_INLINE Vec gradient(Vec grad, Vec x, Vec in) {
        if (!kNorm) return grad;
        grad = where_greater(high, in, where_greater(in, low, grad));
        sum = sum + grad;
        product = fma(grad, x - mean, product);
        return grad;
    }
    template <class T>
    ALWAYS_INLINE void finish(const Row<T>& row, const RowShape& shape) const {
        if (!kNorm) return;
        store(row.norm_sums, load(row.norm_sums) + sum);
        float* to = row.norm_sums + shape.padded_channels;
        store(to, load(to) + product);
    }
};

constexpr int kTaps = 3;  // of a kernel of 3 x 3, in each direction

// Weights, sums and rows of grad_y of the kRows vertical taps that reach a row of x.
template <class T, int kRows, bool kNeedX, bool kNeedWeight, bool kNorm>
struct Pixels {
    Vec weight[kRows][kTaps];
    Vec sum[kRows][kTaps];
    const T* grad_y[kRows];
    int64_t ahead_x;  // bytes
    int64_t ahead_y;
    Normalised<kNorm> norm;

    ALWAYS_INLINE Pixels(const Row<T>& row, const RowShape& shape)
        : ahead_x(shape.width * shape.channels * static_cast<int64_t>(sizeof(T))),
          ahead_y(shape.out_width * shape.channels * static_cast<int64_t>(sizeof(T))),
          norm(row, shape) {
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) {
            const int64_t tap = row.taps.tap + i * shape.tap_step;
            grad_y[i] = row.grad_y + (row.taps.out - i * shape.out_step) * shape.out_width * shape.channels;
#pragma GCC unroll 3
            for (int j = 0; j < kTaps; ++j) {
                weight[i][j] = load(row.weight + (tap * kTaps + j) * shape.padded_channels);
                sum[i][j] = zero();
            }
        }
    }

    ALWAYS_INLINE void column(int64_t offset, Vec (&g)[kRows]) const {
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) g[i] = load(grad_y[i] + offset);
        // The next row of grad_y, and below of x and grad_x, while this one is computed: its columns are too
        // far apart for the processor to see what comes. What lies behind the last row is fetched in vain.
        prefetch<2>(grad_y[0] + offset, ahead_y);
    }

    // The tap j of every row, which reaches the column g of grad_y.
    template <int j>
    ALWAYS_INLINE void add(const Vec (&g)[kRows], Vec x, Vec& grad_x) {
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) {
            if (kNeedX) grad_x = fma(g[i], weight[i][j], grad_x);
            if (kNeedWeight) sum[i][j] = fma(g[i], x, sum[i][j]);
        }
    }

    // Taps 0, 1 and 2 reach right, straight and left of the pixel in grad_y.
    template <bool kLeft, bool kStraight, bool kRight>
    ALWAYS_INLINE void pixel(const T* x, T* grad_x, const Vec (&left)[kRows], const Vec (&straight)[kRows],
                             const Vec (&right)[kRows]) {
        const Vec raw = kNeedWeight ? load(x) : zero(), here = norm.input(raw);
        if (kNeedWeight) prefetch<2>(x, ahead_x);
        if (kNeedX) prefetch<2>(grad_x, ahead_x);
        Vec grad = zero();
        if (kStraight) add<1>(straight, here, grad);
        if (kLeft) add<2>(left, here, grad);
        if (kRight) add<0>(right, here, grad);
        if (kNeedX) store(grad_x, norm.gradient(grad, raw, here));
    }

    ALWAYS_INLINE void finish(const Row<T>& row, const RowShape& shape) const {
        norm.finish(row, shape);
        if (!kNeedWeight) return;
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) {
            const int64_t tap = row.taps.tap + i * shape.tap_step;
#pragma GCC unroll 3
            for (int j = 0; j < kTaps; ++j) {
                float* to = row.sums + (tap * kTaps + j) * shape.padded_channels;
                store(to, load(to) + sum[i][j]);
            }
        }
    }
};

// 3 x 3, stride 1. Columns a dilation apart follow each other, so that the three columns of grad_y around a
// pixel stay in registers for the next one.
template <class T, int kRows, bool kNeedX, bool kNeedWeight, bool kNorm>
void row_of_stride_1(const Row<T>& row, const RowShape& shape) {
    Pixels<T, kRows, kNeedX, kNeedWeight, kNorm> pixels(row, shape);
    const int64_t step = shape.dilation * shape.channels;
    const int64_t end = shape.width * shape.channels;
    const int64_t phases = shape.dilation < shape.width ? shape.dilation : shape.width;
    const T* const x = row.x;
    T* const grad_x = row.grad_x;
    for (int64_t phase = 0; phase < phases; ++phase) {
        int64_t at = phase * shape.channels;
        Vec a[kRows], b[kRows], c[kRows];
        pixels.column(at, b);
        if (at + step >= end) {
            pixels.template pixel<false, true, false>(x + at, grad_x + at, b, b, b);
            continue;
        }
        pixels.column(at + step, c);
        pixels.template pixel<false, true, true>(x + at, grad_x + at, b, b, c);
        at += step;
        // From here on: left, straight and right of `at` are b, c and the next column.
        for (; at + 3 * step < end; at += 3 * step) {
            pixels.column(at + step, a);
            pixels.template pixel<true, true, true>(x + at, grad_x + at, b, c, a);
            pixels.column(at + 2 * step, b);
            pixels.template pixel<true, true, true>(x + at + step, grad_x + at + step, c, a, b);
            pixels.column(at + 3 * step, c);
            pixels.template pixel<true, true, true>(x + at + 2 * step, grad_x + at + 2 * step, a, b, c);
        }
        for (; at + step < end; at += step) {
            pixels.column(at + step, a);
            pixels.template pixel<true, true, true>(x + at, grad_x + at, b, c, a);
#pragma GCC unroll 3
            for (int i = 0; i < kRows; ++i) {
                b[i] = c[i];
                c[i] = a[i];
            }
        }
        pixels.template pixel<true, true, false>(x + at, grad_x + at, b, c, c);
    }
    pixels.finish(row, shape);
}

// 3 x 3, stride 2, no dilation: even columns of x are reached by the tap in the middle, odd ones by the other
// two.
template <class T, int kRows, bool kNeedX, bool kNeedWeight, bool kNorm>
void row_of_stride_2(const Row<T>& row, const RowShape& shape) {
    Pixels<T, kRows, kNeedX, kNeedWeight, kNorm> pixels(row, shape);
    const int64_t channels = shape.channels;
    const T* x = row.x;
    T* grad_x = row.grad_x;
    Vec here[kRows], next[kRows];
    pixels.column(0, here);
    for (int64_t out = 1; out < shape.out_width; ++out, x += 2 * channels, grad_x += 2 * channels) {
        pixels.column(out * channels, next);
        pixels.template pixel<false, true, false>(x, grad_x, here, here, here);
        pixels.template pixel<true, false, true>(x + channels, grad_x + channels, here, here, next);
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) here[i] = next[i];
    }
    pixels.template pixel<false, true, false>(x, grad_x, here, here, here);
    if (shape.width % 2 == 0)
        pixels.template pixel<true, false, false>(x + channels, grad_x + channels, here, here, here);
    pixels.finish(row, shape);
}

// Any kernel, stride and dilation.
template <class T, bool kNeedX, bool kNeedWeight, bool kNorm>
void any_row(const Row<T>& row, const RowShape& shape) {
    const int64_t kernel = shape.kernel, taps = kernel * kernel;
    const int64_t channels = shape.channels, padded = shape.padded_channels;
    Normalised<kNorm> norm(row, shape);
    if (kNeedWeight)
        for (int64_t t = 0; t < taps; ++t) store(row.row_sums + t * kLanes, zero());
    for (int64_t w = 0; w < shape.width; ++w) {
        const Taps columns = shape.columns[w];
        const Vec raw = kNeedWeight ? load(row.x + w * channels) : zero(), here = norm.input(raw);
        Vec grad = zero();
        for (int64_t i = 0; i < row.taps.count; ++i) {
            const int64_t out_row = row.taps.out - i * shape.out_step;
            const T* g = row.grad_y + (out_row * shape.out_width + columns.out) * channels;
            int64_t t = (row.taps.tap + i * shape.tap_step) * kernel + columns.tap;
            for (int64_t j = 0; j < columns.count; ++j) {
                const Vec value = load(g);
                if (kNeedX) grad = fma(value, load(row.weight + t * padded), grad);
                float* sum = row.row_sums + t * kLanes;
                if (kNeedWeight) store(sum, fma(value, here, load(sum)));
                g -= shape.out_step * channels;
                t += shape.tap_step;
            }
        }
        if (kNeedX) store(row.grad_x + w * channels, norm.gradient(grad, raw, here));
    }
    norm.finish(row, shape);
    if (!kNeedWeight) return;
    for (int64_t t = 0; t < taps; ++t) {
        float* to = row.sums + t * padded;
        store(to, load(to) + load(row.row_sums + t * kLanes));
    }
}

}  // namespace

// Mean and squared deviations of each channel: sums over a tile of the distance to a pivot and of its square,
// merged by Chan's formula.
#pragma once

#include "batch_norm_rows.h"

namespace {

struct Moments {  // of one team: count, mean and squared deviations of each number of a wide row
    double *count, *mean, *squares;
    float *pivot, *sum, *square;
};

void merge(const Moments& to, int64_t rows, int64_t width) {
    const double n = static_cast<double>(rows), over = 1.0 / n;
    for (int64_t c = 0; c < width; ++c) {
        const double sum = static_cast<double>(to.sum[c]);
        const double squares = static_cast<double>(to.square[c]) - sum * sum * over;
        const double total = to.count[c] + n, share = n / total;
        const double delta = static_cast<double>(to.pivot[c]) + sum * over - to.mean[c];
        to.mean[c] += delta * share;
        to.squares[c] += (squares < 0.0 ? 0.0 : squares) + delta * delta * (to.count[c] * share);
        to.count[c] = total;
    }
}

// Where the deviations are taken from: what is known of the mean, or the mean of this first tile.
template <class T>
void choose_pivot(const T* x, int64_t begin, int64_t end, int64_t stride, int64_t width, const Moments& to) {
    if (to.count[width - 1] > 0.0) {  // a shorter row may have counted the first
        for (int64_t c = 0; c < width; ++c) to.pivot[c] = static_cast<float>(to.mean[c]);
        return;
    }
    for (int64_t c = 0; c < width; ++c) to.pivot[c] = 0.0f;
    down(begin, end, [&](int64_t row, auto count) {
        across(width, [=](int64_t c, auto part) {
            Vec sum = get(to.pivot + c, part);
            for (int r = 0; r < count.value; ++r) sum = sum + get(x + (row + r) * stride + c, part);
            put(to.pivot + c, sum, part);
        });
    });
    const float over = 1.0f / static_cast<float>(end - begin);
    for (int64_t c = 0; c < width; ++c) to.pivot[c] *= over;
}

template <class T>
void moments_of_tile(const T* x, int64_t begin, int64_t end, int64_t stride, int64_t width,
                     const Moments& to) {
    const int64_t ahead = distance_ahead<T>(stride);
    choose_pivot(x, begin, end, stride, width, to);
    for (int64_t c = 0; c < width; ++c) to.sum[c] = to.square[c] = 0.0f;
    down(begin, end, [&](int64_t row, auto count) {
        const T* from = x + row * stride;
        across(width, [=](int64_t c, auto part) {
            const Vec pivot = get(to.pivot + c, part);
            Vec sum = get(to.sum + c, part), square = get(to.square + c, part);
            for (int r = 0; r < count.value; ++r) {
                prefetch(from + r * stride + c, ahead);
                const Vec d = get(from + r * stride + c, part) - pivot;
                sum = sum + d;
                square = fma(d, d, square);
            }
            put(to.sum + c, sum, part);
            put(to.square + c, square, part);
        });
    });
    merge(to, end - begin, width);
}

}  // namespace

// Mean and variance of each channel of a depthwise convolution's result, out of the moments of its runs.
#pragma once

#include "depthwise_tile.h"

namespace {

// Mean and sum of squared deviations of `size` channels, of `count` values each: Chan, Golub, LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
struct Statistics {
    float* mean;
    float* square;
    int64_t count;
};

void merge(Statistics* to, const Moments& run, int64_t count, int64_t size) {
    const float n = static_cast<float>(count), share = 1.0f / n;
    const float weight = n / static_cast<float>(to->count + count);
    const float cross = weight * static_cast<float>(to->count);
    const bool first = to->count == 0;
    for (int64_t i = 0; i < size; ++i) {
        const float mean = run.pivot[i] + run.sum[i] * share;
        const float left = run.square[i] - run.sum[i] * run.sum[i] * share;
        const float square = left < 0.0f ? 0.0f : left;  // NaN stays
        const float delta = mean - to->mean[i];
        to->mean[i] = first ? mean : to->mean[i] + delta * weight;
        to->square[i] = first ? square : to->square[i] + square + delta * delta * cross;
    }
    to->count += count;
}

// A thread's buffers, (pairs, kPair) each, and how many values each block of channels has had.
struct Team {
    float *mean, *square, *pivot, *sum, *deviation;
    int64_t* count;
};

// The threads' parts, one after another. block: channels that share a count
template <class T>
void finish(const Team* team, int teams, int64_t channels, int64_t block, float* means, float* variances) {
    for (int64_t c = 0; c < channels; ++c) {
        const int64_t place = c / kPair * kPair + packed_place<T>(static_cast<int>(c % kPair));
        double count = 0.0, mean = 0.0, square = 0.0;
        for (int t = 0; t < teams; ++t) {
            const double more = static_cast<double>(team[t].count[c / block]);
            if (more == 0.0) continue;
            const double delta = team[t].mean[place] - mean;
            square += team[t].square[place] + delta * delta * count * more / (count + more);
            mean += delta * more / (count + more);
            count += more;
        }
        means[c] = static_cast<float>(count == 0.0 ? 0.0 / count : mean);
        variances[c] = static_cast<float>(square / count);
    }
}

}  // namespace

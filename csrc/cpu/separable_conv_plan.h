// How separable_conv divides its work and its memory, and how it packs the weights.
//
// The product is a panel of kColumns vectors of columns by kRows pixels at a time. `round` numbers the parts
// of the channels that are multiplied one after another, where they are too many for a tile.
#pragma once

#include <cmath>
#include <cstdlib>

#include "separable_conv.h"
#include "transpose.h"
#include "vec.h"

namespace {

constexpr int kTaps = 9;
constexpr int kRows = 6;  // pixels of a block of sums
#ifdef __AVX512F__
constexpr int kColumns = 4;  // vectors of it: 24 sums, 4 weights and a pixel in 32 registers
#else
constexpr int kColumns = 2;  // 12 sums, 2 weights and a pixel in 16
#endif
constexpr int64_t kTileBlocks = 10;          // of kRows pixels: the weights are read once for so many
constexpr int64_t kTileBytes = 120 << 10;    // leaves most of a cache of 512 KB or more to weights and x
constexpr int64_t kChunk = 128;              // channels of the depthwise pass whose parameters stay in L1
constexpr int64_t kWorkPerThread = 1 << 19;  // multiplications; less is not worth waking a thread
constexpr int64_t kFetchEvery = 16;
constexpr int64_t kLine = 64 / sizeof(float);  // lanes of a cache line

// Channels of one 32-bit lane.
template <class T>
constexpr int kPack = 1;
// Channels that one step of the depthwise pass computes, and the vectors of its parameters.
template <class T>
constexpr int kStep = kLanes;
template <class T>
constexpr int kParameters = kTaps + 2;
#ifdef __AVX512BF16__
template <>
constexpr int kPack<bf16> = 2;
template <>
constexpr int kStep<bf16> = 2 * kLanes;
template <>
constexpr int kParameters<bf16> = 14;  // five pairs of taps, scale and shift, each for two vectors of sums
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The activation as two bounds. NaN passes through.
struct Bounds {
    Vec low, high;
    explicit Bounds(Activation activation)
        : low(set1(activation == Activation::none ? -HUGE_VALF : 0.0f)),
          high(set1(activation == Activation::relu6 ? 6.0f : HUGE_VALF)) {}
    Vec apply(Vec x) const { return min(high, max(low, x)); }
};

// The next `count` elements of the workspace at `memory`, of which `used` bytes are taken.
template <class U>
U* take(char* memory, int64_t count, int64_t* used) {
    const int64_t begin = *used;
    *used += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return reinterpret_cast<U*>(memory + begin);
}

// What belongs to one thread.
template <class T>
struct Team {
    float* tile[2];     // (tile_rows, row): the one that is multiplied, and the next
    float* sums;        // (tile_rows, columns)
    const T** taps;     // (tile_rows, kTaps) of the tile that the depthwise pass works on
    const char** rows;  // of x, to be fetched
};

template <class T>
struct Plan {
    const SeparableConvArgs& args;
    int64_t pixels, blocks;   // of y: pixels, and kRows of them
    int64_t channels;         // of one round, a multiple of kStep
    int64_t rounds;           // of the product
    int64_t row;              // lanes from one pixel of a tile to the next
    int64_t vectors, panels;  // of the columns of the product
    int64_t tiles, groups;    // tasks: tiles of pixels x groups of panels
    int64_t tile_rows;        // pixels of the largest tile, a multiple of kRows
    int teams;
    float* parameters;  // (steps of kStep channels, kParameters, kLanes)
    float* scale;       // (columns)
    float* shift;
    float* weight;  // for each round and panel of it: (lanes of the round, columns of the panel)
    T* zeros;       // (C), read where a tap is outside the image
    char* team_memory;
    int64_t team_bytes;

    Plan(const SeparableConvArgs& a, int threads) : args(a) {
        pixels = args.images * args.out_height * args.out_width;
        blocks = ceil_div(pixels, kRows);
        const int64_t most = kTileBytes / (kTileBlocks * kRows * 4) * kPack<T>;
        rounds = ceil_div(args.channels, most / kStep<T> * kStep<T>);
        channels = round_up(ceil_div(args.channels, rounds), kStep<T>);
        rounds = ceil_div(args.channels, channels);
        // A distance of whole pages between pixels would put all of a block into one set of the cache.
        row = round_up(channels / kPack<T>, kLine) + kLine;
        vectors = ceil_div(args.out_channels, kLanes);
        panels = ceil_div(vectors, kColumns);
        const int64_t work = pixels * args.channels * (args.out_channels + kTaps);
        const int64_t useful = smaller(work / kWorkPerThread + 1, blocks * panels);
        teams = static_cast<int>(smaller(threads, useful));
        tiles = smaller(round_up(ceil_div(blocks, kTileBlocks), teams), blocks);
        groups = tiles < teams ? smaller(teams / tiles, panels) : 1;
        tile_rows = ceil_div(blocks, tiles) * kRows;
    }
    int64_t steps() const { return ceil_div(args.channels, kStep<T>); }
    int64_t columns() const { return vectors * kLanes; }
    int64_t lanes() const { return ceil_div(args.channels, kPack<T>); }
    int64_t lanes_of_round(int64_t round) const {
        return ceil_div(smaller(args.channels - round * channels, channels), kPack<T>);
    }
    int64_t panel_begin(int64_t panel) const { return panel * vectors / panels; }  // in vectors

    // Both return the bytes of what begins at `memory`, aligned to 64 bytes.
    int64_t divide_team(char* memory, Team<T>* team) const {
        int64_t used = 0;
        for (float*& tile : team->tile) tile = take<float>(memory, tile_rows * row, &used);
        team->sums = take<float>(memory, rounds > 1 ? tile_rows * columns() : 0, &used);
        team->taps = take<const T*>(memory, tile_rows * kTaps, &used);
        team->rows = take<const char*>(memory, tile_rows * kTaps, &used);
        return used;
    }
    int64_t divide(char* memory) {
        int64_t used = 0;
        parameters = take<float>(memory, steps() * kParameters<T> * kLanes, &used);
        scale = take<float>(memory, columns(), &used);
        shift = take<float>(memory, columns(), &used);
        weight = take<float>(memory, lanes() * columns(), &used);
        zeros = take<T>(memory, args.channels, &used);
        team_memory = memory + used;
        Team<T> team = {};
        team_bytes = divide_team(nullptr, &team);
        return used + teams * team_bytes;
    }
    Team<T> team(int index) const {
        Team<T> team = {};
        divide_team(team_memory + index * team_bytes, &team);
        return team;
    }
};

// ---- parameters and weights, once a call ----

// Parameters of the step-th kStep channels: the taps, scale and shift.
template <class T>
void pack_step(const Plan<T>& plan, int64_t step) {
    const SeparableConvArgs& args = plan.args;
    const T* weight = static_cast<const T*>(args.depthwise);
    float* to = plan.parameters + step * kParameters<T> * kLanes;
    for (int i = 0; i < kStep<T>; ++i) {
        const int64_t c = step * kStep<T> + i;
        const bool inside = c < args.channels;
        const float scale = !inside ? 0.0f : args.depthwise_scale ? args.depthwise_scale[c] : 1.0f;
        const float shift = inside && args.depthwise_shift ? args.depthwise_shift[c] : 0.0f;
        if constexpr (kPack<T> == 1) {
            for (int t = 0; t < kTaps; ++t)
                to[t * kLanes + i] = inside ? to_float(weight[c * kTaps + t]) : 0.0f;
            to[kTaps * kLanes + i] = scale;
            to[(kTaps + 1) * kLanes + i] = shift;
        } else {
            // Where unpacklo and unpackhi of 16-bit words put channel i: every second four channels.
            const int part = i / 4 % 2, lane = i / 8 * 4 + i % 4;
            for (int t = 0; t < kTaps + 1; ++t) {
                const T value = inside && t < kTaps ? weight[c * kTaps + t] : T{};
                std::memcpy(reinterpret_cast<T*>(to + (t / 2 * 2 + part) * kLanes + lane) + t % 2, &value,
                            sizeof(T));
            }
            to[(10 + part) * kLanes + lane] = scale;
            to[(12 + part) * kLanes + lane] = shift;
        }
    }
}

#ifdef __AVX512F__
inline __m512i load_lanes(const float* p, int64_t n) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((uint64_t{1} << n) - 1), p);
}
inline __m512i load_lanes(const bf16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}

// Lanes k.. of (at most 16) rows of the pointwise weight, transposed: (up to 16 lanes, `stride` apart)
template <class T>
void pack_square(const T* from, int64_t row, int64_t rows, int64_t channels, float* to, int64_t stride) {
    const int64_t n = smaller(channels, 16 * kPack<T>);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? load_lanes(from + i * row, n) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < ceil_div(n, kPack<T>); ++i) _mm512_storeu_si512(to + i * stride, r[i]);
}
#else
template <class T>
void pack_square(const T* from, int64_t row, int64_t rows, int64_t channels, float* to, int64_t stride) {
    for (int64_t k = 0; k < smaller(channels, 16); ++k)
        for (int i = 0; i < kLanes; ++i) to[k * stride + i] = i < rows ? to_float(from[i * row + k]) : 0.0f;
}
#endif

// The columns of one vector of the pointwise weight, all channels.
template <class T>
void pack_columns(const Plan<T>& plan, int64_t vector) {
    const SeparableConvArgs& args = plan.args;
    const int64_t panel = ((vector + 1) * plan.panels - 1) / plan.vectors;
    const int64_t begin = plan.panel_begin(panel), width = plan.panel_begin(panel + 1) - begin;
    const int64_t column = vector * kLanes;
    const T* from = static_cast<const T*>(args.pointwise) + column * args.channels;
    for (int64_t round = 0; round < plan.rounds; ++round) {
        const int64_t first_channel = round * plan.channels;
        const int64_t end = smaller(first_channel + plan.channels, args.channels);
        float* const to = plan.weight + first_channel / kPack<T> * plan.columns() +
                          plan.lanes_of_round(round) * begin * kLanes + (vector - begin) * kLanes;
        for (int64_t c = first_channel; c < end; c += 16 * kPack<T>)
            pack_square(from + c, args.channels, args.out_channels - column, end - c,
                        to + (c - first_channel) / kPack<T> * width * kLanes, width * kLanes);
    }
    for (int64_t c = column; c < column + kLanes; ++c) {
        const bool inside = c < args.out_channels;
        plan.scale[c] = inside && args.scale ? args.scale[c] : 1.0f;
        plan.shift[c] = inside && args.shift ? args.shift[c] : 0.0f;
    }
}

}  // namespace

// How the batch norm kernels go over a tensor: wide rows, tiles of them, threads.
#pragma once

#include "batch_norm_act.h"
#include "prefetch.h"
#include "vec.h"

namespace {

constexpr int64_t kWidest = 4096;               // numbers in a wide row that is not one pixel
constexpr int64_t kNarrowest = 128;             // the loop over a row must be worth its start
constexpr int64_t kTileBytes = 1 << 17;         // of one tensor: sums in fp32 are this long
constexpr int64_t kNumbersPerThread = 1 << 15;  // less is not worth waking a thread
constexpr int kRows = 4;                        // share one loading of what is per channel
constexpr int64_t kFarthest = 1 << 13;     // bytes: the next rows are fetched ahead if they start that near
constexpr int64_t kAhead = 1 << 10;        // bytes: else what follows in the row
constexpr int64_t kStreamBytes = 1 << 22;  // of a result: from there on it goes past the caches

struct Full {};
struct Part {
    int n;
};
template <class T>
inline Vec get(const T* p, Full) {
    return load(p);
}
template <class T>
inline Vec get(const T* p, Part part) {
    return load(p, part.n);
}
template <bool past_caches = false, class T>
inline void put(T* p, Vec x, Full) {
    if (past_caches)
        stream(p, x);
    else
        store(p, x);
}
template <bool past_caches = false, class T>
inline void put(T* p, Vec x, Part part) {
    store(p, x, part.n);
}

// Four rows at a time are too short a run for the processor to see where the next reading is. In bytes:
template <class T>
inline int64_t distance_ahead(int64_t stride) {
    const int64_t next = kRows * stride * static_cast<int64_t>(sizeof(T));
    return next <= kFarthest ? next : kAhead;
}

// Bodies capture by value: a vector's store may alias anything, so that what is captured by reference would
// be read again after each.
template <class Body>
inline void across(int64_t width, Body body) {
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) body(c, Full{});
    if (c < width) body(c, Part{static_cast<int>(width - c)});
}

template <int n>
struct Count {
    static constexpr int value = n;
};

template <class Body>
inline void down(int64_t begin, int64_t end, Body body) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) body(row, Count<kRows>{});
    for (; row < end; ++row) body(row, Count<1>{});
}

struct Plan {
    int64_t repeat, width, rows, rest;  // rest: numbers in the shorter row after the last
    int64_t tile;                       // rows
    int teams;
    bool past_caches;  // results are large, and rows of them aligned
};

Plan plan_for(const BatchNormActArgs& args, int threads) {
    const int64_t channels = args.channels;
    const int64_t power = channels & -channels;
    int64_t repeat = power < kLanes ? kLanes / power : 1;
    if (repeat * channels > kWidest) repeat = 1;
    while (repeat * channels < kNarrowest) repeat *= 2;
    const int64_t width = repeat * channels, rows = args.pixels / repeat;
    const int64_t tile = kTileBytes / (width * (args.dtype == DType::f32 ? 4 : 2)) / kRows * kRows;
    const int64_t useful = args.pixels * channels / kNumbersPerThread + 1;
    const int teams = static_cast<int>(threads < useful ? threads : useful);
    const int64_t size = args.dtype == DType::f32 ? 4 : 2;
    const uint64_t places = reinterpret_cast<uintptr_t>(args.result) |
                            reinterpret_cast<uintptr_t>(args.masked) | static_cast<uint64_t>(width * size);
    const bool past_caches = args.pixels * channels * size >= kStreamBytes && places % 64 == 0;
    return {repeat, width,      rows, (args.pixels - rows * repeat) * channels, tile < kRows ? kRows : tile,
            teams,  past_caches};
}

// run(begin, end, width, team) for every tile; the last team also gets the shorter row.
template <class Run>
void each_tile(const Plan& plan, bool backwards, Run run) {
    // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
    const int teams = plan.teams;
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        const int64_t begin = plan.rows * team / teams, end = plan.rows * (team + 1) / teams;
        const int64_t tiles = (end - begin + plan.tile - 1) / plan.tile;
        if (team + 1 == teams && plan.rest > 0) run(plan.rows, plan.rows + 1, plan.rest, team);
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t from = begin + plan.tile * (backwards ? tiles - 1 - i : i);
            const int64_t to = from + plan.tile < end ? from + plan.tile : end;
            run(from, to, plan.width, team);
        }
        if (plan.past_caches) finish_streaming();
    }
}

}  // namespace

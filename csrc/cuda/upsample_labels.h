// The label of every pixel of bilinearly upsampled logits: what upsample_argmax.cu writes and
// upsample_confusion_matrix.cu counts.
//
// A block keeps the logits under its tile in shared memory as fp32, one class after another in as many chunks
// as it takes. A thread holds the best values and labels of its group's 16 pixels in registers: per class it
// reads the corners of one source cell, lerps down and across, and compares. Per pixel and class that is two
// fused multiply-adds, a half for the rows, a compare and two selects, which bind: the bytes are few.
//
// Where one class wins at every source pixel under a group, it wins at each of the group's pixels: the
// weights are positive and rounding is monotone, so no class is rounded above it. (One can be rounded to the
// same value; the class taken is then the one that wins in exact arithmetic.) Such groups are filled, and the
// others are dealt out to the first threads. Tiles that hold NaN, Inf or values near overflow are `wild`:
// nothing is skipped there, and values are compared as torch.argmax does.
#pragma once

#include "floats.h"
#include "label_plan.h"

namespace {

// Shared memory of one block, in this order; label_plan counts the bytes.
struct LabelTile {
    float* weight;     // (kTaps): of each pixel row of the tile, then of each pixel column
    int* low;          // (kTaps): its first source pixel, from the tile's first
    int* count;        // groups dealt out
    uint8_t* dealt;    // (kThreads)
    float* logits;     // (source_rows, source_columns, pitch)
    uint8_t* winners;  // (source_rows, source_columns): the class that wins there

    __device__ LabelTile(const LabelPlan& plan, void* shared) {
        weight = static_cast<float*>(shared);
        low = reinterpret_cast<int*>(weight + kTaps);
        count = low + kTaps;
        dealt = reinterpret_cast<uint8_t*>(count + 1);
        logits = reinterpret_cast<float*>(dealt + kThreads);
        winners = reinterpret_cast<uint8_t*>(logits + plan.source_rows * plan.source_columns * plan.pitch);
    }
};

// Where a tile lies: its image, its first pixel, which may be negative, and its first source pixel.
struct TilePlace {
    int64_t image;
    int y, x, source_y, source_x;

    __device__ TilePlace(const LabelPlan& plan, uint32_t tile) {
        const uint32_t row = tile / plan.tiles_x;
        image = row / plan.tiles_y;
        y = plan.rows.first + static_cast<int>(row % plan.tiles_y) * plan.groups_y * kSide;
        x = plan.columns.first + static_cast<int>(tile - row * plan.tiles_x) * plan.groups_x * kSide;
        source_y = static_cast<int>(plan.rows.tap(y).low);
        source_x = static_cast<int>(plan.columns.tap(x).low);
    }
};

__device__ float read(const float* p) { return __ldg(p); }
template <class T>
__device__ T read(const T* p) {
    return {__ldg(&p->bits)};
}

// Not finite, or so large that a lerp could overflow.
__device__ bool is_wild(float x) { return (__float_as_uint(x) & 0x7fffffffu) >= 0x7b800000u; }  // 2^120

// Whether x takes the place of `best`, an earlier class.
template <bool kWild>
__device__ bool beats(float x, float best) {
    return x > best || (kWild && x != x && best == best);
}

// Weight and place of every pixel row, then of every pixel column of the tile, by all threads.
__device__ void place_taps(const LabelPlan& plan, const TilePlace& place, const LabelTile& tile) {
    const int rows = kSide * plan.groups_y;
    for (int i = threadIdx.x; i < rows + kSide * plan.groups_x; i += kThreads) {
        const bool is_row = i < rows;
        const LabelAxis& axis = is_row ? plan.rows : plan.columns;
        const BilinearTap tap = axis.tap(is_row ? place.y + i : place.x + (i - rows));
        tile.weight[i] = tap.weight;
        tile.low[i] = static_cast<int>(tap.low - (is_row ? place.source_y : place.source_x));
    }
}

// Classes [begin, begin + chunk) of the tile's source pixels into shared memory. Whether one of them is wild.
template <class T>
__device__ bool load_chunk(const LabelPlan& plan, const TilePlace& place, int begin, const LabelTile& tile) {
    const LogitsMap& logits = plan.logits;
    const int classes = static_cast<int>(logits.classes) - begin;
    const int rows = static_cast<int>(logits.height - place.source_y);
    const int columns = static_cast<int>(logits.width - place.source_x);
    const T* from = static_cast<const T*>(logits.data) + place.image * logits.image_step +
                    place.source_y * logits.row_step + place.source_x * logits.column_step +
                    begin * logits.class_step;
    const uint32_t walk = static_cast<uint32_t>(plan.source_columns * plan.chunk);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t lane = threadIdx.x % 32;
    bool wild = false;
    for (int row = warp; row < plan.source_rows && row < rows; row += kWarps) {
        const T* source = from + row * logits.row_step;
        float* to = tile.logits + row * plan.source_columns * plan.pitch;
#pragma unroll 4
        for (uint32_t i = lane; i < walk; i += 32) {
            const uint32_t outer = plan.inner == 1 ? i : __umulhi(i, plan.inner_inverse);
            const uint32_t rest = i - outer * plan.inner;
            const int k = static_cast<int>(plan.planar ? outer : rest);
            const int column = static_cast<int>(plan.planar ? rest : outer);
            if (k >= classes || column >= columns) continue;
            const float x = to_float(read(source + k * logits.class_step + column * logits.column_step));
            wild |= is_wild(x);
            to[column * plan.pitch + k] = x;
        }
    }
    return wild;
}

__device__ bool load_any(const LabelPlan& plan, const TilePlace& place, int begin, const LabelTile& tile) {
    switch (plan.logits.type) {
        case DType::bf16:
            return load_chunk<Bf16>(plan, place, begin, tile);
        case DType::f16:
            return load_chunk<Fp16>(plan, place, begin, tile);
        case DType::f32:
            break;
    }
    return load_chunk<float>(plan, place, begin, tile);
}

// The first class of the largest value at each source pixel that is there, by all threads; none is wild.
__device__ void find_winners(const LabelPlan& plan, const TilePlace& place, const LabelTile& tile) {
    const int64_t rows = plan.logits.height - place.source_y;
    const int64_t columns = plan.logits.width - place.source_x;
    const int there =
        (rows < plan.source_rows ? static_cast<int>(rows) : plan.source_rows) * plan.source_columns;
    for (int i = threadIdx.x; i < there; i += kThreads) {
        if (i % plan.source_columns >= columns) continue;
        const float* value = tile.logits + i * plan.pitch;
        float best = value[0];
        int winner = 0;
        for (int k = 1; k < plan.chunk; ++k) {
            if (beats<false>(value[k], best)) {
                best = value[k];
                winner = k;
            }
        }
        tile.winners[i] = static_cast<uint8_t>(winner);
    }
}

// One axis of a group: its source pixels, and each pixel's weights of them.
template <int kTapsOfGroup>
struct GroupAxis {
    int at;                  // the first, from the tile's first
    int step[kTapsOfGroup];  // from `at` to each, as far as they exist and are needed
    float weight[kSide][kTapsOfGroup];
    uint32_t second;  // bit j: pixel j is in the second cell

    // low, weights: of the group's first pixel; left: source pixels from the tile's first to the axis's end
    __device__ GroupAxis(const int* low, const float* weights, int64_t left) {
        at = low[0];
        second = 0;
        step[0] = 0;
        step[1] = at + 1 < left ? 1 : 0;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
            const bool later = kTapsOfGroup > 2 && low[j] != at;
            const float w = weights[j];
            weight[j][0] = later ? 0.0f : 1.0f - w;
            weight[j][1] = later ? 1.0f - w : w;
            if (kTapsOfGroup > 2) weight[j][kTapsOfGroup - 1] = later ? w : 0.0f;
            second |= static_cast<uint32_t>(later) << j;
        }
        // What no pixel needs may lie outside of the tile.
        if (kTapsOfGroup > 2) step[kTapsOfGroup - 1] = second != 0 && at + 2 < left ? 2 : step[1];
    }

    // v: the source pixels' values. As bilinear.h has it: the high one fused onto the product of the low one.
    template <bool kWild>
    __device__ float lerp(const float (&v)[kTapsOfGroup], int j) const {
        if (kTapsOfGroup == 2) return __fmaf_rn(weight[j][1], v[1], __fmul_rn(weight[j][0], v[0]));
        constexpr int kLast = kTapsOfGroup - 1;
        if (!kWild)  // a weight of 0 changes nothing beside finite values
            return __fmaf_rn(weight[j][kLast], v[kLast],
                             __fmaf_rn(weight[j][1], v[1], __fmul_rn(weight[j][0], v[0])));
        const bool later = second >> j & 1;
        return __fmaf_rn(later ? weight[j][kLast] : weight[j][1], later ? v[kLast] : v[1],
                         __fmul_rn(later ? weight[j][1] : weight[j][0], later ? v[1] : v[0]));
    }
};

// A group's pixels while its classes go by.
template <int kTapsOfGroup>
struct Group {
    GroupAxis<kTapsOfGroup> rows, columns;
    float best[kSide][kSide];
    int label[kSide][kSide];

    __device__ Group(const LabelPlan& plan, const TilePlace& place, const LabelTile& tile, int group)
        : rows(tile.low + group / plan.groups_x * kSide, tile.weight + group / plan.groups_x * kSide,
               plan.logits.height - place.source_y),
          columns(tile.low + kSide * (plan.groups_y + group % plan.groups_x),
                  tile.weight + kSide * (plan.groups_y + group % plan.groups_x),
                  plan.logits.width - place.source_x) {}

    // Whether one class wins at all source pixels, and so at all pixels of the group.
    __device__ bool decided(const LabelPlan& plan, const LabelTile& tile, int* winner) const {
        const uint8_t* corner = tile.winners + rows.at * plan.source_columns + columns.at;
        bool same = true;
#pragma unroll
        for (int i = 0; i < kTapsOfGroup; ++i)
#pragma unroll
            for (int j = 0; j < kTapsOfGroup; ++j)
                same &= corner[rows.step[i] * plan.source_columns + columns.step[j]] == corner[0];
        *winner = corner[0];
        return same;
    }

    // Classes [begin, end), which are in shared memory from class `begin` on.
    template <bool kWild>
    __device__ void compete(const LabelPlan& plan, const LabelTile& tile, int begin, int end) {
        const float* corner[kTapsOfGroup][kTapsOfGroup];
#pragma unroll
        for (int i = 0; i < kTapsOfGroup; ++i)
#pragma unroll
            for (int j = 0; j < kTapsOfGroup; ++j)
                corner[i][j] = tile.logits + ((rows.at + rows.step[i]) * plan.source_columns + columns.at +
                                              columns.step[j]) *
                                                 plan.pitch;
#pragma unroll 1
        for (int k = begin; k < end; ++k) {
            float v[kTapsOfGroup][kTapsOfGroup];  // column, row
#pragma unroll
            for (int i = 0; i < kTapsOfGroup; ++i)
#pragma unroll
                for (int j = 0; j < kTapsOfGroup; ++j) v[j][i] = corner[i][j][k - begin];
#pragma unroll
            for (int i = 0; i < kSide; ++i) {
                float mixed[kTapsOfGroup];
#pragma unroll
                for (int j = 0; j < kTapsOfGroup; ++j) mixed[j] = rows.template lerp<kWild>(v[j], i);
#pragma unroll
                for (int j = 0; j < kSide; ++j) {
                    const float x = columns.template lerp<kWild>(mixed, j);
                    if (k == 0 || beats<kWild>(x, best[i][j])) {
                        best[i][j] = x;
                        label[i][j] = k;
                    }
                }
            }
        }
    }

    // labels: a byte for each pixel of a row
    __device__ void pack(uint32_t (&labels)[kSide]) const {
#pragma unroll
        for (int i = 0; i < kSide; ++i)
            labels[i] =
                static_cast<uint32_t>(label[i][0] | label[i][1] << 8 | label[i][2] << 16 | label[i][3] << 24);
    }
};

// Deals the tile's groups out: those that one class wins go to the sink, the others to the first threads.
// Returns the calling thread's group, or -1.
template <int kTapsOfGroup, class Sink>
__device__ int deal(const LabelPlan& plan, const TilePlace& place, const LabelTile& tile, Sink& sink) {
    const int mine = static_cast<int>(threadIdx.x);
    if (mine < plan.groups_y * plan.groups_x) {
        int winner;
        if (Group<kTapsOfGroup>(plan, place, tile, mine).decided(plan, tile, &winner)) {
            const uint32_t row = static_cast<uint32_t>(winner) * 0x01010101u;
            const uint32_t labels[kSide] = {row, row, row, row};
            sink(place, mine / plan.groups_x * kSide, mine % plan.groups_x * kSide, labels);
        } else {
            tile.dealt[atomicAdd(tile.count, 1)] = static_cast<uint8_t>(mine);
        }
    }
    __syncthreads();
    return mine < *tile.count ? tile.dealt[mine] : -1;
}

// One tile. sink(place, y, x, labels) takes a group's labels, y and x from the tile's first pixel; pixels
// outside of the image are among them. All threads come here, and meet before it ends.
template <int kTapsOfGroup, class Sink>
__device__ void label_tile(const LabelPlan& plan, uint32_t index, const LabelTile& tile, Sink& sink) {
    const TilePlace place(plan, index);
    const int classes = static_cast<int>(plan.logits.classes);
    place_taps(plan, place, tile);
    if (threadIdx.x == 0) *tile.count = 0;
    bool wild = __syncthreads_or(load_any(plan, place, 0, tile)) != 0;
    int mine = static_cast<int>(threadIdx.x);
    if (mine >= plan.groups_y * plan.groups_x) mine = -1;
    if (!wild && plan.chunk == classes) {
        find_winners(plan, place, tile);
        __syncthreads();
        mine = deal<kTapsOfGroup>(plan, place, tile, sink);
    }
    Group<kTapsOfGroup> group(plan, place, tile, mine < 0 ? 0 : mine);
    for (int begin = 0;;) {
        const int end = begin + plan.chunk < classes ? begin + plan.chunk : classes;
        if (mine >= 0 && wild) group.template compete<true>(plan, tile, begin, end);
        if (mine >= 0 && !wild) group.template compete<false>(plan, tile, begin, end);
        begin = end;
        if (begin == classes) break;
        __syncthreads();
        wild |= __syncthreads_or(load_any(plan, place, begin, tile)) != 0;
    }
    if (mine >= 0) {
        uint32_t labels[kSide];
        group.pack(labels);
        sink(place, mine / plan.groups_x * kSide, mine % plan.groups_x * kSide, labels);
    }
    __syncthreads();
}

// --- ratios at which a group's pixels lie further apart: straight from global memory ---

template <class T>
__device__ int label_of(const LabelPlan& plan, int64_t image, const BilinearTap& row,
                        const BilinearTap& column) {
    const LogitsMap& logits = plan.logits;
    const T* from = static_cast<const T*>(logits.data) + image * logits.image_step;
    const T* low = from + row.low * logits.row_step;
    const T* high = from + row.high * logits.row_step;
    const int64_t left = column.low * logits.column_step;
    const int64_t right = column.high * logits.column_step;
    float best = 0.0f;
    int label = 0;
    for (int k = 0; k < static_cast<int>(logits.classes); ++k) {
        const int64_t at = k * logits.class_step;
        const auto mixed = [&](int64_t side) {
            return __fmaf_rn(row.weight, to_float(read(high + at + side)),
                             __fmul_rn(1.0f - row.weight, to_float(read(low + at + side))));
        };
        const float x = __fmaf_rn(column.weight, mixed(right), __fmul_rn(1.0f - column.weight, mixed(left)));
        if (k == 0 || beats<true>(x, best)) {
            best = x;
            label = k;
        }
    }
    return label;
}

// As label_tile, without shared memory.
template <class Sink>
__device__ void label_far_tile(const LabelPlan& plan, uint32_t index, Sink& sink) {
    const TilePlace place(plan, index);
    const int mine = static_cast<int>(threadIdx.x);
    if (mine < plan.groups_y * plan.groups_x) {
        const int y = mine / plan.groups_x * kSide;
        const int x = mine % plan.groups_x * kSide;
        uint32_t labels[kSide];
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
            const BilinearTap row = plan.rows.tap(place.y + y + i);
            labels[i] = 0;
#pragma unroll 1
            for (int j = 0; j < kSide; ++j) {
                const BilinearTap column = plan.columns.tap(place.x + x + j);
                const int label =
                    plan.logits.type == DType::bf16  ? label_of<Bf16>(plan, place.image, row, column)
                    : plan.logits.type == DType::f16 ? label_of<Fp16>(plan, place.image, row, column)
                                                     : label_of<float>(plan, place.image, row, column);
                labels[i] |= static_cast<uint32_t>(label) << 8 * j;
            }
        }
        sink(place, y, x, labels);
    }
    __syncthreads();
}

// kTapsOfGroup: the plan's `taps`
template <int kTapsOfGroup, class Sink>
__device__ void label_any_tile(const LabelPlan& plan, uint32_t index, const LabelTile& tile, Sink& sink) {
    if constexpr (kTapsOfGroup > 0)
        label_tile<kTapsOfGroup>(plan, index, tile, sink);
    else
        label_far_tile(plan, index, sink);
}

}  // namespace

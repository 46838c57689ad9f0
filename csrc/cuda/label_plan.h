// How the label map of bilinearly upsampled logits is cut into tiles and groups: host arithmetic.
//
// A thread owns a group of kSide x kSide pixels. Groups begin where, at a whole even ratio, the source cell
// changes, which may be left of and above the first pixel; so all pixels of a group have one source cell.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../bilinear.h"
#include "../confusion_matrix.h"
#include "../upsample_argmax.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSide = 4;
constexpr int64_t kLongestAxis = int64_t{1} << 30;
constexpr int kMostGroups = 32;  // of a tile along one axis
constexpr int kLeastGroups = kThreads / kMostGroups;

struct LabelAxis {
    int64_t source, output;
    float scale;
    bool align_corners;
    int first;  // pixel of the first group, -kSide < first <= 0
    int64_t groups;

    HOST_DEVICE BilinearTap tap(int64_t pixel) const {
        const int64_t within = pixel < 0 ? 0 : pixel < output ? pixel : output - 1;
        return bilinear_tap(within, source, output, scale, align_corners);
    }
};

[[maybe_unused]] LabelAxis label_axis(int64_t source, int64_t output, bool align_corners) {
    LabelAxis axis{source, output, bilinear_scale(source, output, align_corners), align_corners, 0, 0};
    const int64_t half = output / source / 2;
    if (!align_corners && half % kSide != 0) axis.first = static_cast<int>(half % kSide) - kSide;
    axis.groups = (output - axis.first + kSide - 1) / kSide;
    return axis;
}

// The most source pixels, less one, from the first to the last of `pixels` neighbours that begin at a
// multiple of `pixels` after `first`. `high` counts the second pixel of the last one's cell too.
[[maybe_unused]] int64_t widest(const LabelAxis& axis, int64_t pixels, bool high) {
    int64_t most = 0;
    for (int64_t at = axis.first; at < axis.output; at += pixels) {
        const BilinearTap last = axis.tap(at + pixels - 1);
        const int64_t span = (high ? last.high : last.low) - axis.tap(at).low;
        most = span > most ? span : most;
    }
    return most;
}

struct LabelPlan {
    LogitsMap logits;
    LabelAxis rows, columns;
    int groups_y, groups_x;  // of a tile; their product is at most kThreads
    uint32_t tiles_y, tiles_x, tiles;
    int taps;  // source pixels that a group's pixels span along an axis; 0: more than 3
    int source_rows, source_columns;  // of the largest tile
    int pitch;                      // floats from one source pixel to the next, odd: lanes in different banks
    int chunk;                      // classes in shared memory at a time
    bool planar;                    // neighbouring threads read neighbouring columns, not classes
    uint32_t inner, inner_inverse;  // of a walk along a row: how many, and 2^32 / that rounded up
    int shared;                     // bytes, see LabelTile
};

// Tiles waste least where the groups fill them; of equals the widest reads longest rows.
[[maybe_unused]] void choose_tile(LabelPlan* plan) {
    int64_t least = INT64_MAX;
    for (int x = kMostGroups; x >= kLeastGroups; --x) {
        const int y = kThreads / x;
        const int64_t tiles_x = (plan->columns.groups + x - 1) / x;
        const int64_t tiles_y = (plan->rows.groups + y - 1) / y;
        if (tiles_x * tiles_y < least) {
            least = tiles_x * tiles_y;
            plan->groups_x = x;
            plan->groups_y = y;
            plan->tiles_x = static_cast<uint32_t>(tiles_x);
            plan->tiles_y = static_cast<uint32_t>(tiles_y);
        }
    }
    // One block for each at most, and 32-bit divisions.
    if (least > INT32_MAX / plan->logits.batch) throw std::invalid_argument("more than 2^31 tiles");
    plan->tiles = static_cast<uint32_t>(plan->logits.batch * least);
}

constexpr int kTaps = kSide * (kMostGroups + kLeastGroups);  // at most, of both axes of a tile
constexpr int kFixedBytes = kTaps * (sizeof(float) + sizeof(int)) + sizeof(int) + kThreads;
constexpr int kTileClasses = 40 << 10;  // bytes of logits in shared memory that let other blocks in

constexpr int kLeastTile = 8 << 10;  // bytes that are worth a matrix's place in shared memory

// budget: bytes of shared memory for all but `kFixedBytes`
[[maybe_unused]] LabelPlan label_plan(const UpsampleArgmaxArgs& args, int budget) {
    // A pixel's row and column are 32-bit numbers; what is multiplied by a step is not.
    const int64_t axes[] = {args.logits.height, args.logits.width, args.height, args.width};
    for (const int64_t axis : axes)
        if (axis > kLongestAxis) throw std::invalid_argument("an axis of more than 2^30 pixels");
    LabelPlan plan{};
    plan.logits = args.logits;
    plan.rows = label_axis(args.logits.height, args.height, args.align_corners);
    plan.columns = label_axis(args.logits.width, args.width, args.align_corners);
    choose_tile(&plan);
    const int64_t span_y = widest(plan.rows, kSide, false);
    const int64_t span_x = widest(plan.columns, kSide, false);
    const int64_t rows = widest(plan.rows, int64_t{kSide} * plan.groups_y, true) + 1;
    const int64_t columns = widest(plan.columns, int64_t{kSide} * plan.groups_x, true) + 1;
    const int64_t span = span_y > span_x ? span_y : span_x;
    const int64_t room = budget < kTileClasses ? budget : kTileClasses;
    const int64_t winners = (rows * columns + 3) / 4 * 4;
    const int64_t floats = (room - winners) / static_cast<int64_t>(sizeof(float));
    if (span > 1 || floats < rows * columns) {
        plan.shared = kFixedBytes;
        return plan;
    }
    plan.taps = static_cast<int>(span) + 2;
    plan.source_rows = static_cast<int>(rows);
    plan.source_columns = static_cast<int>(columns);
    const int64_t fitting = (floats / (rows * columns) + 1) / 2 * 2 - 1;  // the largest odd pitch
    const int64_t classes = args.logits.classes;
    const int64_t chunks = (classes + fitting - 1) / fitting;
    plan.chunk = static_cast<int>((classes + chunks - 1) / chunks);
    plan.pitch = plan.chunk | 1;
    plan.planar = args.logits.class_step != 1;
    plan.inner = static_cast<uint32_t>(plan.planar ? plan.source_columns : plan.chunk);
    plan.inner_inverse =
        static_cast<uint32_t>((uint64_t{1} << 32) / plan.inner + ((uint64_t{1} << 32) % plan.inner != 0));
    plan.shared = kFixedBytes + static_cast<int>(rows * columns * plan.pitch * sizeof(float) + winners);
    return plan;
}

}  // namespace

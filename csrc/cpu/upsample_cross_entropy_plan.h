// What upsample_cross_entropy knows before it reads a logit, and the buffers of its threads.
#pragma once

#include <cstring>

#include "../bilinear.h"
#include "upsample_cross_entropy.h"
#include "vec.h"

namespace {

constexpr int64_t kStrips = 32;              // at least, where there are rows enough
constexpr int64_t kStripRows = 16;           // at most
constexpr int64_t kChunk = 8;                // output rows whose labels are held at once
constexpr int64_t kWorkPerThread = 1 << 16;  // logits at label resolution: less is not worth waking a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is known before any logit is read.
struct Plan {
    int64_t blocks, phases, slots;  // a slot: (block, phase, lane)
    int64_t origin;                 // 1: cell 0 lies left of the first column
    int64_t next;                   // distance of a cell's two columns; 0 where no row is resized
    int64_t stride;                 // of one class in a row of columns
    int64_t strip, strips;          // rows in a strip, strips in an image
    int32_t* pixel;                 // (slots) the column of labels, out_width where there is none
    float *left, *right;            // (slots) its taps, 0 where there is none
    int64_t* first;  // (height + 1) the output rows that start at row i are first[i] .. first[i + 1]
    float* bottom;   // (out_height) the second tap of an output row
    float* weight;   // (K + 1) the first is 0, for pixels left out
    float total_weight;
    float* halo;  // (N, strips, w, K) the row after each strip
};

struct Sums {
    double loss, weight;
    int64_t out_of_range;
};

// One thread's buffers.
struct Space {
    float *upper, *lower;            // (K, stride) two rows of logits, as columns of cells
    float *grad_upper, *grad_lower;  // the same of their gradients
    float *top, *bottom;             // (K, lanes) interpolated along the row
    float *grad_top, *grad_bottom;   // (K, lanes)
    float* x;                        // (K, lanes) one output row's logits, then their exponentials
    int32_t* row;                    // (out_width + 1)
    int32_t* labels;                 // (kChunk, slots) -1 where a pixel is left out
};

int64_t space_floats(const CrossEntropyArgs& args, const Plan& plan) {
    return args.classes * (4 * plan.stride + 5 * kLanes) + args.out_width + 1 + kChunk * plan.slots;
}

float* take(float** memory, int64_t size) {
    float* const taken = *memory;
    *memory += size;
    return taken;
}

Space space_at(float* memory, const CrossEntropyArgs& args, const Plan& plan) {
    const int64_t row = args.classes * plan.stride;
    const int64_t vectors = args.classes * kLanes;
    Space space;
    space.upper = take(&memory, row);
    space.lower = take(&memory, row);
    space.grad_upper = take(&memory, row);
    space.grad_lower = take(&memory, row);
    space.top = take(&memory, vectors);
    space.bottom = take(&memory, vectors);
    space.grad_top = take(&memory, vectors);
    space.grad_bottom = take(&memory, vectors);
    space.x = take(&memory, vectors);
    space.row = reinterpret_cast<int32_t*>(take(&memory, args.out_width + 1));
    space.labels = reinterpret_cast<int32_t*>(take(&memory, kChunk * plan.slots));
    return space;
}

void clear(float* p, int64_t size) { std::memset(p, 0, static_cast<size_t>(size) * sizeof(float)); }

// The cell and the right tap of a column of labels. Cell 0 may lie left of the image: both its columns are
// the first.
int64_t cell_of(const CrossEntropyArgs& args, int64_t origin, int64_t column, float* right) {
    const float scale = bilinear_scale(args.width, args.out_width, args.align_corners);
    const BilinearTap tap = bilinear_tap(column, args.width, args.out_width, scale, args.align_corners);
    *right = tap.weight;
    if (origin == 1 && scale * (static_cast<float>(column) + 0.5f) - 0.5f < 0.0f) {
        *right = 0.5f;
        return 0;
    }
    return tap.low + origin;
}

void plan_sizes(const CrossEntropyArgs& args, Plan* plan) {
    const bool resized = args.width != args.out_width;
    plan->origin = !args.align_corners && args.width < args.out_width ? 1 : 0;
    plan->next = resized ? 1 : 0;
    plan->blocks = ceil_div(args.width + plan->origin, kLanes);
    plan->phases = 0;
    int64_t cell = -1;
    int64_t pixels = 0;
    for (int64_t j = 0; j < args.out_width; ++j) {
        float right;
        const int64_t c = cell_of(args, plan->origin, j, &right);
        pixels = c == cell ? pixels + 1 : 1;
        cell = c;
        if (pixels > plan->phases) plan->phases = pixels;
    }
    plan->slots = plan->blocks * plan->phases * kLanes;
    plan->stride = plan->blocks * kLanes + kLanes;
    const int64_t wanted = args.batch * args.height / kStrips;
    plan->strip = wanted < 1 ? 1 : wanted < kStripRows ? wanted : kStripRows;
    plan->strips = ceil_div(args.height, plan->strip);
}

void fill_columns(const CrossEntropyArgs& args, Plan* plan) {
    for (int64_t s = 0; s < plan->slots; ++s) {
        plan->pixel[s] = static_cast<int32_t>(args.out_width);
        plan->left[s] = plan->right[s] = 0.0f;
    }
    int64_t cell = -1;
    int64_t phase = 0;
    for (int64_t j = 0; j < args.out_width; ++j) {
        float right;
        const int64_t c = cell_of(args, plan->origin, j, &right);
        phase = c == cell ? phase + 1 : 0;
        cell = c;
        const int64_t slot = (c / kLanes * plan->phases + phase) * kLanes + c % kLanes;
        plan->pixel[slot] = static_cast<int32_t>(j);
        // Where both columns are one, halves: 0 times infinity would be NaN.
        plan->right[slot] = plan->next == 0 ? 0.5f : right;
        plan->left[slot] = 1.0f - plan->right[slot];
    }
}

void fill_rows(const CrossEntropyArgs& args, Plan* plan) {
    const float scale = bilinear_scale(args.height, args.out_height, args.align_corners);
    int64_t row = 0;
    plan->first[0] = 0;
    for (int64_t y = 0; y < args.out_height; ++y) {
        const BilinearTap tap = bilinear_tap(y, args.height, args.out_height, scale, args.align_corners);
        while (row < tap.low) plan->first[++row] = y;
        plan->bottom[y] = tap.weight;
    }
    while (row < args.height) plan->first[++row] = args.out_height;
}

void fill_weights(const CrossEntropyArgs& args, Plan* plan) {
    double total = 0.0;
    plan->weight[0] = 0.0f;
    for (int64_t k = 0; k < args.classes; ++k) {
        plan->weight[k + 1] = args.weight == nullptr ? 1.0f : args.weight[k];
        total += static_cast<double>(plan->weight[k + 1]);
    }
    plan->total_weight = static_cast<float>(total);
}

}  // namespace

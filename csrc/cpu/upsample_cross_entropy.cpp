// Cross entropy of bilinearly upsampled logits, and its gradient, one pair of logit rows after another.
//
// A vector holds one class of pixels that lie in neighbouring cells, a cell being what lies between two
// columns of logits: lane i is pixel `phase` of cell first + i. So both taps of the interpolation are
// contiguous loads, its transpose is two contiguous additions, and the softmax needs no reduction across
// lanes. Between two rows of logits all work on a block of cells stays in the first-level cache: interpolate
// along the row once, for each output row combine, exponentiate, and add p - onehot to two partial gradients,
// which go back to the columns once.
//
// The image is cut into strips of logit rows by its shape alone. A strip adds the last row it touches, the
// next one's first, from a buffer at the end, in order: the sums do not depend on who computed them.

#include "upsample_cross_entropy.h"

#include <cstdlib>

#include "exp.h"
#include "upsample_cross_entropy_plan.h"

namespace {

// Label rows -> slots: classes, or -1 for what is left out.
template <class Label>
void read_labels(const CrossEntropyArgs& args, const Plan& plan, int64_t first_pixel, int32_t* row,
                 int32_t* slots, Sums* sums) {
    const Label* const labels = static_cast<const Label*>(args.target) + first_pixel;
    int64_t wrong = 0;
    for (int64_t j = 0; j < args.out_width; ++j) {
        const int64_t label = static_cast<int64_t>(labels[j]);
        const bool ignored = label == args.ignore_index;
        const bool known = label >= 0 && label < args.classes;
        row[j] = known && !ignored ? static_cast<int32_t>(label) : -1;
        wrong += !known && !ignored;
    }
    row[args.out_width] = -1;
    sums->out_of_range += wrong;
    for (int64_t s = 0; s < plan.slots; ++s) slots[s] = row[plan.pixel[s]];
}

// (w, K) -> (K, stride)
template <class T>
void to_cells(const T* row, const CrossEntropyArgs& args, const Plan& plan, float* cells) {
    const int64_t w = args.width;
    const int64_t classes = args.classes;
    for (int64_t k = 0; k < classes; ++k) {
        float* const to = cells + k * plan.stride;
        to[0] = to_float(row[k]);
        for (int64_t c = 0; c < w; ++c) to[plan.origin + c] = to_float(row[c * classes + k]);
        to[plan.origin + w] = to_float(row[(w - 1) * classes + k]);
    }
}

// (K, stride) -> (w, K); cells beside the image hold what belongs to its first and last column.
void from_cells(float* cells, const CrossEntropyArgs& args, const Plan& plan, float* row) {
    const int64_t w = args.width;
    const int64_t classes = args.classes;
    for (int64_t k = 0; k < classes; ++k) {
        float* const from = cells + k * plan.stride + plan.origin;
        if (plan.origin == 1) from[0] += from[-1];
        from[w - 1] += from[w];
        for (int64_t c = 0; c < w; ++c) row[c * classes + k] = from[c];
    }
}

// The logits of one phase of a block, interpolated along the row. Slots without a pixel read nothing, not
// even NaN.
void interpolate(const CrossEntropyArgs& args, const Plan& plan, const float* cells, int64_t slot,
                 float* out) {
    const Vec left = load(plan.left + slot);
    const Vec right = load(plan.right + slot);
    const Vec used = left + right;
    for (int64_t k = 0; k < args.classes; ++k, cells += plan.stride, out += kLanes)
        store(out, where_greater(used, zero(), fma(right, load(cells + plan.next), left * load(cells))));
}

// The transpose, added to `cells`.
void spread(const CrossEntropyArgs& args, const Plan& plan, const float* grad, int64_t slot, float* cells) {
    const Vec left = load(plan.left + slot);
    const Vec right = load(plan.right + slot);
    for (int64_t k = 0; k < args.classes; ++k, cells += plan.stride, grad += kLanes) {
        const Vec g = load(grad);
        store(cells, fma(left, g, load(cells)));
        store(cells + plan.next, fma(right, g, load(cells + plan.next)));
    }
}

// A vector of pixels of one output row.
struct Pixels {
    const int32_t* label;  // (lanes)
    const int32_t* column;
    int64_t first_pixel;  // of the row
    float bottom;         // tap
    Vec loss, weight;     // sums so far
};

template <bool smooth, bool with_grad>
void cross_entropy(const CrossEntropyArgs& args, const Plan& plan, const Space& space, Pixels* at) {
    const int64_t classes = args.classes;
    const Vec lower = set1(at->bottom);
    const Vec upper = set1(1.0f - at->bottom);
    Vec largest = set1(-__builtin_inff());
    for (int64_t i = 0; i < classes * kLanes; i += kLanes) {
        const Vec x = fma(lower, load(space.bottom + i), upper * load(space.top + i));
        store(space.x + i, x);
        largest = max(largest, x);
    }
    float weights[kLanes], valid[kLanes], target[kLanes], loss[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        const int32_t label = at->label[l];
        weights[l] = plan.weight[label + 1];
        valid[l] = label < 0 ? 0.0f : 1.0f;
        target[l] = space.x[(label < 0 ? 0 : label) * kLanes + l];
    }
    Vec sum = zero();
    Vec others = zero();
    for (int64_t k = 0; k < classes; ++k) {
        const Vec x = load(space.x + k * kLanes) - largest;
        if (smooth) others = fma(set1(plan.weight[k + 1]), x, others);
        const Vec e = exp(x);
        sum = sum + e;
        if (with_grad) store(space.x + k * kLanes, e);
    }
    // (1 - e) w_y, and e / K times the sum of all weights: see the op's docstring.
    Vec own = load(weights);
    Vec all = own;
    Vec each = zero();
    at->weight = at->weight + own;
    if (smooth) {
        own = own * set1(1.0f - args.label_smoothing);
        each = load(valid) * set1(args.label_smoothing / static_cast<float>(classes));
        all = fma(each, set1(plan.total_weight), own);
    }
    Vec value = fma(all, log(sum), own * (largest - load(target)));
    if (smooth) value = value - each * others;
    value = where_greater(load(valid), zero(), value);
    at->loss = at->loss + value;
    if (args.losses != nullptr) {
        store(loss, value);
        for (int l = 0; l < kLanes; ++l)
            if (at->label[l] >= 0) args.losses[at->first_pixel + at->column[l]] = loss[l];
    }
    if (!with_grad) return;

    if (args.grad_loss != nullptr) {
        float given[kLanes];
        for (int l = 0; l < kLanes; ++l)
            given[l] = at->label[l] < 0 ? 0.0f : args.grad_loss[at->first_pixel + at->column[l]];
        own = own * load(given);
        each = each * load(given);
        all = all * load(given);
    }
    const Vec scale = divide(all, sum);
    for (int64_t k = 0; k < classes; ++k) {
        const int64_t i = k * kLanes;
        Vec g = load(space.x + i) * scale;
        if (smooth) g = g - each * set1(plan.weight[k + 1]);
        store(space.grad_top + i, fma(upper, g, load(space.grad_top + i)));
        store(space.grad_bottom + i, fma(lower, g, load(space.grad_bottom + i)));
    }
    store(weights, own);
    for (int l = 0; l < kLanes; ++l) {
        if (at->label[l] < 0) continue;
        const int64_t i = static_cast<int64_t>(at->label[l]) * kLanes + l;
        space.grad_top[i] -= (1.0f - at->bottom) * weights[l];
        space.grad_bottom[i] -= at->bottom * weights[l];
    }
}

using CrossEntropy = void(const CrossEntropyArgs&, const Plan&, const Space&, Pixels*);

CrossEntropy* cross_entropy_for(const CrossEntropyArgs& args) {
    const bool smooth = args.label_smoothing != 0.0f;
    if (args.grad == nullptr) return smooth ? cross_entropy<true, false> : cross_entropy<false, false>;
    return smooth ? cross_entropy<true, true> : cross_entropy<false, true>;
}

bool any_label(const int32_t* label) {
    int32_t all = -1;
    for (int l = 0; l < kLanes; ++l) all &= label[l];
    return all >= 0;
}

float lane_sum(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int step = kLanes / 2; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
    return lanes[0];
}

// Output rows begin .. end, which all lie between the two rows of logits in `space`.
void output_rows(const CrossEntropyArgs& args, const Plan& plan, const Space& space, int64_t image,
                 int64_t begin, int64_t end, Sums* sums) {
    CrossEntropy* const run = cross_entropy_for(args);
    const int64_t first_pixel = (image * args.out_height + begin) * args.out_width;
    for (int64_t y = begin; y < end; ++y) {
        const int64_t pixel = first_pixel + (y - begin) * args.out_width;
        int32_t* const labels = space.labels + (y - begin) * plan.slots;
        if (args.wide_target)
            read_labels<int64_t>(args, plan, pixel, space.row, labels, sums);
        else
            read_labels<uint8_t>(args, plan, pixel, space.row, labels, sums);
        if (args.losses != nullptr) clear(args.losses + pixel, args.out_width);
    }
    const int64_t vectors = args.classes * kLanes;
    for (int64_t slot = 0; slot < plan.slots; slot += kLanes) {
        const int64_t cell = slot / (plan.phases * kLanes) * kLanes;
        Pixels at = {nullptr, plan.pixel + slot, 0, 0.0f, zero(), zero()};
        bool started = false;
        for (int64_t y = begin; y < end; ++y) {
            at.label = space.labels + (y - begin) * plan.slots + slot;
            if (!any_label(at.label)) continue;
            if (!started) {
                interpolate(args, plan, space.upper + cell, slot, space.top);
                interpolate(args, plan, space.lower + cell, slot, space.bottom);
                if (args.grad != nullptr) {
                    clear(space.grad_top, vectors);
                    clear(space.grad_bottom, vectors);
                }
                started = true;
            }
            at.first_pixel = first_pixel + (y - begin) * args.out_width;
            at.bottom = plan.bottom[y];
            run(args, plan, space, &at);
        }
        if (!started) continue;
        sums->loss += static_cast<double>(lane_sum(at.loss));
        sums->weight += static_cast<double>(lane_sum(at.weight));
        if (args.grad != nullptr) {
            spread(args, plan, space.grad_top, slot, space.grad_upper + cell);
            spread(args, plan, space.grad_bottom, slot, space.grad_lower + cell);
        }
    }
}

// The output rows that start at logit rows of one strip.
template <class T>
void strip(const CrossEntropyArgs& args, const Plan& plan, Space space, int64_t item, Sums* sums) {
    const int64_t image = item / plan.strips;
    const int64_t begin = item % plan.strips * plan.strip;
    const int64_t end = begin + plan.strip < args.height ? begin + plan.strip : args.height;
    const int64_t row_size = args.width * args.classes;
    const int64_t cells = args.classes * plan.stride;
    const T* const logits = static_cast<const T*>(args.logits) + image * args.height * row_size;
    float* const grad = args.grad == nullptr ? nullptr : args.grad + image * args.height * row_size;
    float* const buffer[2] = {space.upper, space.lower};
    float* const grad_buffer[2] = {space.grad_upper, space.grad_lower};
    to_cells(logits + begin * row_size, args, plan, buffer[0]);
    clear(grad_buffer[0], cells);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t now = (i - begin) % 2;
        const bool last = i + 1 == args.height;
        // Below the last row there is none, and none is read where rows are not resized: both taps are its
        // own.
        const int64_t below = last || args.height == args.out_height ? now : 1 - now;
        space.upper = buffer[now];
        space.grad_upper = grad_buffer[now];
        space.lower = buffer[below];
        space.grad_lower = grad_buffer[below];
        if (!last) {
            to_cells(logits + (i + 1) * row_size, args, plan, buffer[1 - now]);
            clear(grad_buffer[1 - now], cells);
        }
        for (int64_t y = plan.first[i]; y < plan.first[i + 1]; y += kChunk) {
            const int64_t until = y + kChunk < plan.first[i + 1] ? y + kChunk : plan.first[i + 1];
            output_rows(args, plan, space, image, y, until, sums);
        }
        if (grad != nullptr) from_cells(space.grad_upper, args, plan, grad + i * row_size);
    }
    if (grad != nullptr && end < args.height)
        from_cells(grad_buffer[(end - begin) % 2], args, plan, plan.halo + item * row_size);
}

void add_halos(const CrossEntropyArgs& args, const Plan& plan) {
    const int64_t row_size = args.width * args.classes;
    for (int64_t item = 0; item < args.batch * plan.strips; ++item) {
        const int64_t row = (item % plan.strips + 1) * plan.strip;
        if (row >= args.height) continue;
        float* const to = args.grad + (item / plan.strips * args.height + row) * row_size;
        const float* const from = plan.halo + item * row_size;
        for (int64_t i = 0; i < row_size; ++i) to[i] += from[i];
    }
}

}  // namespace

namespace ISA {

bool upsample_cross_entropy(const CrossEntropyArgs& args, int threads) {
    Plan plan = {};
    plan_sizes(args, &plan);
    const int64_t items = args.batch * plan.strips;
    const int64_t useful = args.batch * args.out_height * args.out_width * args.classes / kWorkPerThread + 1;
    const int64_t most = useful < items ? useful : items;
    const int teams = static_cast<int>(threads < most ? threads : most > 0 ? most : 1);
    const int64_t space_size = space_floats(args, plan);
    const int64_t halo = args.grad == nullptr ? 0 : items * args.width * args.classes;
    const int64_t floats = 3 * plan.slots + args.out_height + args.classes + 1 + halo + teams * space_size;
    void* const memory = std::malloc(static_cast<size_t>(floats) * sizeof(float) +
                                     static_cast<size_t>(args.height + 1) * sizeof(int64_t) +
                                     static_cast<size_t>(items) * sizeof(Sums));
    if (memory == nullptr) return false;
    Sums* const sums = static_cast<Sums*>(memory);
    plan.first = reinterpret_cast<int64_t*>(sums + items);
    float* free_floats = reinterpret_cast<float*>(plan.first + args.height + 1);
    plan.pixel = reinterpret_cast<int32_t*>(take(&free_floats, plan.slots));
    plan.left = take(&free_floats, plan.slots);
    plan.right = take(&free_floats, plan.slots);
    plan.bottom = take(&free_floats, args.out_height);
    plan.weight = take(&free_floats, args.classes + 1);
    plan.halo = take(&free_floats, halo);
    fill_columns(args, &plan);
    fill_rows(args, &plan);
    fill_weights(args, &plan);
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        const Space space = space_at(free_floats + team * space_size, args, plan);
        clear(space.upper, 2 * args.classes * plan.stride);  // beyond the columns
        for (int64_t item = team; item < items; item += teams) {
            sums[item] = {};
            if (args.dtype == DType::f32)
                strip<float>(args, plan, space, item, sums + item);
            else
                strip<bf16>(args, plan, space, item, sums + item);
        }
    }
    Sums all = {};
    for (int64_t item = 0; item < items; ++item) {
        all.loss += sums[item].loss;
        all.weight += sums[item].weight;
        all.out_of_range += sums[item].out_of_range;
    }
    *args.loss = static_cast<float>(all.loss);
    *args.weight_sum = static_cast<float>(all.weight);
    *args.out_of_range = all.out_of_range;
    if (args.grad != nullptr) add_halos(args, plan);
    std::free(memory);
    return true;
}

}  // namespace ISA

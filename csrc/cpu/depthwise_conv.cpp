// Depthwise convolution over channels-last memory, with the affine and the activation that follow it, or
// with the statistics of its result.
//
// The work is a list of short pieces of output rows: image by image, block of channels by block of channels,
// chain of columns by chain of columns, and down each of these in chains of rows. A chain is
// what is `dilation` apart, so that two of the three pieces of input rows that an output needs were read for
// the one above it and still are in the second-level cache: whole rows would not be, because pixels that are
// a power of two apart share its sets. Each thread takes an equal part of the list.
//
// Compiled once per instruction set into the namespace ISA. Everything else has internal linkage and no
// inline function of the standard library is used: the linker would keep one copy for all instruction sets.

#include "depthwise_conv.h"

#include <cstdlib>

#include "depthwise_pairs.h"
#include "depthwise_statistics.h"
#include "depthwise_tile.h"

namespace {

constexpr int64_t kOutputsPerThread = 1 << 15;  // less is not worth waking a thread
constexpr int64_t kWindow = 384 << 10;          // bytes of x: what three chains of one block may take
constexpr int64_t kLargeResult = 4 << 20;       // bytes: from here on results are written around the cache
constexpr int64_t kPage = 4096;  // bytes: addresses that far apart are told from one another late
constexpr int64_t kRun = 4096;   // outputs of a channel that share a pivot

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
    const DepthwiseArgs& args;
    int64_t out_height = 0, out_width = 0;
    int64_t pairs = 0;  // of vectors of channels
    int64_t block = 0;  // of which so many are done at once
    int64_t blocks = 0;
    int64_t pieces = 0;             // of output rows in a block of one image
    int64_t packed_pair = 0;        // floats: the taps of a pair, its shift, and scale and shift of its input
    const float* packed = nullptr;  // (pairs, kernel * kernel + 3, kPair), or depthwise_pairs.h's
    bool tap_pairs = false;         // whether it is
    float low = 0.0f, high = 0.0f;  // bounds of the activation
    bool past_cache = false;        // whether results are written around the cache
};

template <class T>
void pack(const DepthwiseArgs& args, float* packed) {
    const int64_t taps = args.kernel * args.kernel;
    const T* weight = static_cast<const T*>(args.weight);
    for (int64_t c = 0; c < ceil_div(args.channels, kPair) * kPair; ++c) {
        float* to = packed + c / kPair * (taps + 3) * kPair + packed_place<T>(static_cast<int>(c % kPair));
        const bool real = c < args.channels;
        const float scale = real && args.scale != nullptr ? args.scale[c] : 1.0f;
        for (int64_t tap = 0; tap < taps; ++tap)
            to[tap * kPair] = real ? scale * to_float(weight[c * taps + tap]) : 0.0f;
        to[taps * kPair] = real && args.shift != nullptr ? args.shift[c] : 0.0f;
        const bool normalised = real && args.norm.mean != nullptr;
        to[(taps + 1) * kPair] = normalised ? norm_scale(args.norm, c) : 0.0f;
        to[(taps + 2) * kPair] = normalised ? norm_shift(args.norm, c) : 0.0f;
    }
}

// Any kernel, stride and dilation; chain.row[0] is the image, chain.y output `first` of the row.
template <class T, bool kTail, Form form>
void convolve_any(const Plan& plan, const Chain<T>& chain, int64_t out_row, int64_t first) {
    const DepthwiseArgs& args = plan.args;
    const int64_t radius = args.kernel / 2;
    Output<T, kTail, form> output(chain);
    for (int64_t j = 0; j < chain.count; ++j) {
        Pair sum = output.shift;
        for (int64_t k = 0; k < args.kernel; ++k) {
            const int64_t row = out_row * args.stride + (k - radius) * args.dilation;
            if (row < 0 || row >= args.height) continue;
            for (int64_t l = 0; l < args.kernel; ++l) {
                const int64_t column = (first + j) * args.stride + (l - radius) * args.dilation;
                if (column < 0 || column >= args.width) continue;
                const Pair x = output.read(chain.row[0] + (row * args.width + column) * args.channels);
                sum = fma(load_packed(chain.weight + (k * args.kernel + l) * kPair), x, sum);
            }
        }
        output.write(j, sum);
    }
    output.finish();
}

template <class T, int kStride, bool kTail, Form form>
void convolve_three(const Chain<T>& chain, int rows) {
    if (rows == 3) return convolve_chain<T, 3, kStride, kTail, form>(chain);
    if (rows == 2) return convolve_chain<T, 2, kStride, kTail, form>(chain);
    convolve_chain<T, 1, kStride, kTail, form>(chain);
}

// A piece of an output row: the columns first, first + d, ... of one chain, d the step of the chains.
struct Piece {
    int64_t image, block;
    int64_t column_phase, first, count;
    int64_t row_phase, row;
};

bool has_chains(const DepthwiseArgs& args) { return args.kernel == 3 && args.stride <= 2; }
int64_t chain_step(const DepthwiseArgs& args) { return has_chains(args) ? args.dilation : 1; }

void set_count(const Plan& plan, Piece* piece) {
    const int64_t step = chain_step(plan.args);
    piece->count = least(kChain, ceil_div(plan.out_width - piece->first, step));
}

// The piece after this one; false at the end of an image's block of channels.
bool advance(const Plan& plan, Piece* piece) {
    const int64_t step = chain_step(plan.args);
    piece->row += step;
    if (piece->row < plan.out_height) return true;
    piece->row = ++piece->row_phase;
    if (piece->row_phase < least(step, plan.out_height)) return true;
    piece->row = piece->row_phase = 0;
    piece->first += kChain * step;
    if (piece->first >= plan.out_width) {
        piece->first = ++piece->column_phase;
        if (piece->column_phase >= least(step, plan.out_width)) {
            piece->first = piece->column_phase = 0;
            return false;
        }
    }
    set_count(plan, piece);
    return true;
}

// Runs `convolve(chain, tail)` for each pair of channels of the block.
template <class T, class Convolve>
void each_pair(const Plan& plan, const Piece& piece, Chain<T> chain, int rows, int64_t first_row_of_taps,
               const Convolve& convolve) {
    const DepthwiseArgs& args = plan.args;
    const int64_t taps = args.kernel * args.kernel;
    const int64_t begin = piece.block * plan.block, end = least(begin + plan.block, plan.pairs);
    for (int64_t pair = begin; pair < end; ++pair) {
        const float* packed = plan.packed + pair * plan.packed_pair;
        chain.weight = packed + first_row_of_taps * args.kernel * kPair;
        chain.shift = packed + taps * kPair;
        chain.in_scale = chain.shift + kPair;
        chain.in_shift = chain.in_scale + kPair;
        chain.channels = static_cast<int>(least(args.channels - pair * kPair, kPair));
        convolve(chain, chain.channels < kPair);
        for (int r = 0; r < rows; ++r) chain.row[r] += kPair;
        chain.y += kPair;
        if (chain.moments.pivot != nullptr) {
            chain.moments.pivot += kPair;
            chain.moments.sum += kPair;
            chain.moments.square += kPair;
        }
    }
}

// Whether a column of y is as far into a page as the next ones of x: loads are told from earlier stores by
// the twelve lowest bits alone, so that each of them would wait. With 2048 channels of bf16 at dilation 1
// that took a third of the time; torch's large tensors all begin at the same place in their pages.
template <class T>
bool collides(const DepthwiseArgs& args, const Chain<T>& chain) {
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const uintptr_t apart = reinterpret_cast<uintptr_t>(args.x) - reinterpret_cast<uintptr_t>(args.y);
    return chain.step * size % kPage == 0 && apart % static_cast<uintptr_t>(kPage) == 0;
}

template <class T, Form form>
void convolve_piece(const Plan& plan, const Piece& piece, const Moments& moments) {
    const DepthwiseArgs& args = plan.args;
    const int64_t dilation = args.dilation, stride = args.stride;
    const int64_t pixels = piece.image * args.height * args.width;
    const int64_t offset = piece.block * plan.block * kPair;
    const T* image = static_cast<const T*>(args.x) + pixels * args.channels + offset;
    const int64_t out_pixel = (piece.image * plan.out_height + piece.row) * plan.out_width + piece.first;
    Chain<T> chain = {};
    chain.y = static_cast<T*>(args.y) + out_pixel * args.channels + offset;
    chain.step = chain_step(args) * args.channels;
    chain.count = piece.count;
    chain.low = plan.low;
    chain.high = plan.high;
    chain.moments = moments;
    chain.past_cache = plan.past_cache && reinterpret_cast<uintptr_t>(args.y) % 64 == 0;
    if (!has_chains(args)) {
        chain.row[0] = image;
        each_pair(plan, piece, chain, 1, 0, [&](const Chain<T>& of_pair, bool tail) {
            tail ? convolve_any<T, true, form>(plan, of_pair, piece.row, piece.first)
                 : convolve_any<T, false, form>(plan, of_pair, piece.row, piece.first);
        });
        return;
    }
    const int64_t centre = piece.row * stride, column = piece.first * stride;
    const int first_tap = centre - dilation >= 0 ? 0 : 1;
    const int rows = (centre + dilation < args.height ? 3 : 2) - first_tap;
    chain.left = column - dilation >= 0;
    chain.right = column + (piece.count - 1) * dilation * stride + dilation < args.width;
    const T* top = image + ((centre + (first_tap - 1) * dilation) * args.width + column) * args.channels;
    const int64_t row_step = dilation * args.width * args.channels;
    for (int r = 0; r < rows; ++r) chain.row[r] = top + r * row_step;
    if (stride == 1 && centre + 2 * dilation < args.height) chain.below = row_step;
    chain.deferred = collides(args, chain);
    if (plan.tap_pairs) {
        each_pair(plan, piece, chain, rows, 0, [&](const Chain<T>& of_pair, bool tail) {
            convolve_pairs(of_pair, rows, first_tap, tail);
        });
        return;
    }
    each_pair(plan, piece, chain, rows, first_tap, [&](const Chain<T>& of_pair, bool tail) {
        if (stride == 1)
            tail ? convolve_three<T, 1, true, form>(of_pair, rows)
                 : convolve_three<T, 1, false, form>(of_pair, rows);
        else
            tail ? convolve_three<T, 2, true, form>(of_pair, rows)
                 : convolve_three<T, 2, false, form>(of_pair, rows);
    });
}

// The first result of a run becomes its pivot: with zero as one, the squares would cancel where the mean is
// large.
template <class T, Form form>
void begin_run(const Plan& plan, const Piece& piece, const Moments& run) {
    Plan cached = plan;
    cached.past_cache = false;
    Piece single = piece;
    single.count = 1;
    const int64_t begin = piece.block * plan.block, end = least(begin + plan.block, plan.pairs);
    for (int64_t i = 0; i < (end - begin) * kPair; ++i) run.pivot[i] = run.sum[i] = run.square[i] = 0.0f;
    convolve_piece<T, form>(cached, single, run);
    const int64_t pixel = (piece.image * plan.out_height + piece.row) * plan.out_width + piece.first;
    const T* y = static_cast<const T*>(plan.args.y) + pixel * plan.args.channels;
    for (int64_t pair = begin; pair < end; ++pair) {
        const int channels = static_cast<int>(least(plan.args.channels - pair * kPair, kPair));
        const int64_t to = (pair - begin) * kPair;
        store_packed(run.pivot + to, load_pair(y + pair * kPair, channels));
        store_packed(run.sum + to, set_pair(0.0f));
        store_packed(run.square + to, set_pair(0.0f));
    }
}

template <class T, Form form>
void convolve(const Plan& plan, int64_t begin, int64_t end, const Team& team) {
    constexpr bool kMoments = form != Form::affine;
    // `begin` and `end` count pieces of whole blocks; there are few blocks, so the way to the first is short.
    const int64_t in_block = plan.pieces;
    for (int64_t unit = begin / in_block * in_block; unit < end; unit += in_block) {
        const int64_t index = unit / in_block;
        const int64_t from = begin > unit ? begin - unit : 0, to = least(end - unit, in_block);
        Piece piece = {index / plan.blocks, index % plan.blocks, 0, 0, 0, 0, 0};
        set_count(plan, &piece);
        for (int64_t i = 0; i < from; ++i) advance(plan, &piece);
        const int64_t offset = piece.block * plan.block * kPair;
        Moments moments = {};
        if (kMoments) moments = {team.pivot, team.sum, team.deviation};
        int64_t count = 0;
        for (int64_t i = from; i < to; ++i) {
            if (kMoments && count == 0) begin_run<T, form>(plan, piece, moments);
            convolve_piece<T, form>(plan, piece, moments);
            count += piece.count;
            if (kMoments && (i + 1 == to || count >= kRun)) {
                Statistics into = {team.mean + offset, team.square + offset, team.count[piece.block]};
                const int64_t pairs = least(plan.block, plan.pairs - piece.block * plan.block);
                merge(&into, moments, count, pairs * kPair);
                team.count[piece.block] = into.count;
                count = 0;
            }
            advance(plan, &piece);
        }
    }
    finish_streams();
}

template <class T>
bool run(Plan plan, int threads) {
    const DepthwiseArgs& args = plan.args;
    const bool moments = args.mean != nullptr;
    const int64_t vectors = static_cast<int64_t>(sizeof(T)) * kPair;
    int64_t block = kWindow / ((kChain + 2) * 3 * vectors);
    block = block < 4 ? 4 : block;
    plan.blocks = ceil_div(plan.pairs, block);
    plan.block = ceil_div(plan.pairs, plan.blocks);
    plan.blocks = ceil_div(plan.pairs, plan.block);
    plan.tap_pairs =
        kHasPairsOfTaps && sizeof(T) == sizeof(bf16) && !moments && has_chains(args) && args.stride == 1;
    plan.packed_pair = (plan.tap_pairs ? kTapPairs : args.kernel * args.kernel + 3) * kPair;
    const int64_t step = chain_step(args), longer = plan.out_width % step;
    const int64_t chains = longer * ceil_div(plan.out_width / step + 1, kChain) +
                           (least(step, plan.out_width) - longer) * ceil_div(plan.out_width / step, kChain);
    plan.pieces = chains * plan.out_height;

    const int64_t units = args.batch * plan.blocks * plan.pieces;
    const int64_t outputs = args.batch * plan.out_height * plan.out_width * args.channels;
    plan.past_cache = outputs * static_cast<int64_t>(sizeof(T)) > kLargeResult &&
                      args.channels * static_cast<int64_t>(sizeof(T)) % 64 == 0;
    const int64_t most = least(units, outputs / kOutputsPerThread + 1);
    const int teams = static_cast<int>(least(threads, most < 1 ? 1 : most));

    const int64_t packed = plan.packed_pair * plan.pairs;
    const int64_t padded = plan.pairs * kPair;
    const int64_t floats = packed + (moments ? teams * 5 * padded : 0);
    float* memory = static_cast<float*>(std::malloc(static_cast<size_t>(floats) * sizeof(float) + 64));
    Team* team = static_cast<Team*>(std::calloc(static_cast<size_t>(teams), sizeof(Team)));
    int64_t* count =
        static_cast<int64_t*>(std::calloc(static_cast<size_t>(teams * plan.blocks), sizeof(int64_t)));
    const bool enough = memory != nullptr && team != nullptr && count != nullptr;
    if (enough) {
        float* aligned = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
        plan.packed = aligned;
        plan.tap_pairs ? pack_tap_pairs(args, aligned) : pack<T>(args, aligned);
        for (int t = 0; moments && t < teams; ++t) {
            float* from = aligned + packed + t * 5 * padded;
            team[t] = {from,
                       from + padded,
                       from + 2 * padded,
                       from + 3 * padded,
                       from + 4 * padded,
                       count + t * plan.blocks};
        }
        // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
        for (int t = 0; t < teams; ++t) {
            const int64_t begin = units * t / teams, end = units * (t + 1) / teams;
            if (args.norm.mean != nullptr)
                convolve<T, Form::normalised>(plan, begin, end, team[t]);
            else if (moments)
                convolve<T, Form::statistics>(plan, begin, end, team[t]);
            else
                convolve<T, Form::affine>(plan, begin, end, team[t]);
        }
        if (moments) finish<T>(team, teams, args.channels, plan.block * kPair, args.mean, args.variance);
    }
    std::free(memory);
    std::free(team);
    std::free(count);
    return enough;
}

}  // namespace

namespace ISA {

bool depthwise_conv(const DepthwiseArgs& args, int threads) {
    Plan plan{args};
    plan.out_height = ceil_div(args.height, args.stride);
    plan.out_width = ceil_div(args.width, args.stride);
    plan.pairs = ceil_div(args.channels, kPair);
    const Activation activation = args.norm.mean != nullptr ? args.norm.activation : args.activation;
    plan.low = lower_bound(activation);
    plan.high = upper_bound(activation);
    return args.type == DType::bf16 ? run<bf16>(plan, threads) : run<float>(plan, threads);
}

}  // namespace ISA

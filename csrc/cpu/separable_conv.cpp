// Depthwise 3x3 and pointwise product in one pass over tiles of pixels: the depthwise result of a tile stays
// in the second-level cache and is multiplied from there.
//
// In channels-last memory the pointwise convolution is a plain product, (pixels, C) times (C, M). A tile of
// kTileBlocks * kRows pixels by up to kTileBytes of channels is computed, then multiplied panel by panel of
// kColumns vectors, kRows pixels at a time, with all sums in registers. More channels than fit in a tile are
// added in several rounds. The weights, packed for these panels once a call, pass through the cache once a
// tile.
//
// The operands of the product are 32-bit lanes: one fp32 channel, or, with AVX-512, two bf16 channels that
// vdpbf16ps multiplies and adds. (It flushes denormals, and so may what narrows its sums.) Elsewhere bf16 is
// widened to fp32. Either way the depthwise result is rounded to bf16 first, as two convolutions in bf16 do
// it.

#include "prefetch.h"
#include "separable_conv_plan.h"

#ifdef __GNUC__
#define NOT_INLINED __attribute__((noinline))
#else
#define NOT_INLINED
#endif

namespace {

// ---- the depthwise pass over a tile ----

template <class T>
inline Vec add_product(Vec a, Vec b, Vec sum, T) {
    return fma(a, b, sum);
}

// taps: (pixels, kTaps) of pixels `begin` and after
template <class T>
void find_taps(const Plan<T>& plan, int64_t begin, int64_t pixels, const T** taps) {
    const SeparableConvArgs& args = plan.args;
    const T* const x = static_cast<const T*>(args.x);
    int64_t column = begin % args.out_width;
    int64_t line = begin / args.out_width % args.out_height;
    int64_t image = begin / args.out_width / args.out_height;
    for (int64_t p = 0; p < pixels; ++p, taps += kTaps) {
        for (int t = 0; t < kTaps; ++t) {
            const int64_t h = line * args.stride + (t / 3 - 1) * args.dilation;
            const int64_t w = column * args.stride + (t % 3 - 1) * args.dilation;
            const bool inside = h >= 0 && h < args.height && w >= 0 && w < args.width;
            taps[t] = inside ? x + ((image * args.height + h) * args.width + w) * args.channels : plan.zeros;
        }
        if (++column < args.out_width) continue;
        column = 0;
        if (++line < args.out_height) continue;
        line = 0;
        ++image;
    }
}

#ifdef __AVX512BF16__
inline __m512bh as_pairs(Vec x) { return reinterpret_cast<__m512bh>(x.v); }
inline Vec add_product(Vec a, Vec b, Vec sum, bf16) {
    return {_mm512_dpbf16_ps(sum.v, as_pairs(a), as_pairs(b))};
}

// Two vectors of sums to 32 bf16 channels in their order.
inline __m512i narrow_pair(Vec low, Vec high) {
    const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8, 23,
                                           22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
}

// 32 channels from `c` on, of which n are there.
inline void depthwise_step(const bf16* const (&taps)[kTaps], int64_t c, int64_t n, const float* parameters,
                           const Bounds& bounds, float* to) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
    Vec low = zero(), high = zero();
    for (int pair = 0; pair < 5; ++pair) {
        const __m512i a = _mm512_maskz_loadu_epi16(mask, taps[2 * pair] + c);
        __m512i b = _mm512_setzero_si512();
        if (pair < 4) b = _mm512_maskz_loadu_epi16(mask, taps[2 * pair + 1] + c);
        const float* const weight = parameters + 2 * pair * kLanes;
        low = add_product({_mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b))}, load(weight), low, bf16{});
        high = add_product({_mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b))}, load(weight + kLanes), high,
                           bf16{});
    }
    low = bounds.apply(fma(low, load(parameters + 10 * kLanes), load(parameters + 12 * kLanes)));
    high = bounds.apply(fma(high, load(parameters + 11 * kLanes), load(parameters + 13 * kLanes)));
    _mm512_storeu_si512(to, narrow_pair(low, high));
}
#endif

inline Vec rounded_to(Vec x, float) { return x; }
[[maybe_unused]] inline Vec rounded_to(Vec x, bf16) {
    bf16 part[kLanes];
    store(part, x);
    return load(part);
}

// kLanes channels from `c` on, of which n are there.
template <class T>
inline void depthwise_step(const T* const (&taps)[kTaps], int64_t c, int64_t n, const float* parameters,
                           const Bounds& bounds, float* to) {
    Vec sum = zero();
    for (int t = 0; t < kTaps; ++t) {
        const T* const x = taps[t] + c;
        sum = fma(n == kLanes ? load(x) : load(x, static_cast<int>(n)), load(parameters + t * kLanes), sum);
    }
    sum = fma(sum, load(parameters + kTaps * kLanes), load(parameters + (kTaps + 1) * kLanes));
    store(to, rounded_to(bounds.apply(sum), T{}));
}

// The channels of one round for some pixels. Channels past the last one, up to kStep, become 0.
template <class T>
void depthwise(const Plan<T>& plan, const T* const* taps, int64_t pixels, int64_t round, float* tile) {
    const Bounds bounds(plan.args.depthwise_activation);
    const int64_t first_channel = round * plan.channels;
    const int64_t end = smaller(first_channel + plan.channels, plan.args.channels);
    for (int64_t chunk = first_channel; chunk < end; chunk += kChunk) {
        const int64_t chunk_end = smaller(chunk + kChunk, end);
        for (int64_t p = 0; p < pixels; ++p) {
            const T* tap[kTaps];
            for (int t = 0; t < kTaps; ++t) tap[t] = taps[p * kTaps + t];
            const float* parameters = plan.parameters + chunk / kStep<T> * kParameters<T> * kLanes;
            float* to = tile + p * plan.row + (chunk - first_channel) / kPack<T>;
            for (int64_t c = chunk; c < chunk_end; c += kStep<T>) {
                depthwise_step(tap, c, smaller(chunk_end - c, kStep<T>), parameters, bounds, to);
                to += kStep<T> / kPack<T>;
                parameters += kParameters<T> * kLanes;
            }
        }
    }
}

// ---- the product of a tile ----

// What the next panel will read, in cache lines: fetched a few at a time while this one is multiplied, which
// leaves the memory idle.
struct Fetch {
    const char* cursor;  // first the weights, then rows of x
    const char* end;
    const char* const* rows;
    const char* const* rows_end;
    int64_t row_bytes;
    int64_t quota;  // lines for every kFetchEvery lanes of a block

    int64_t lines() const { return (end - cursor) / 64 + (rows_end - rows) * ceil_div(row_bytes, 64); }
    void advance() {
        for (int64_t i = 0; i < quota; ++i) {
            if (cursor >= end) {
                if (rows == rows_end) return;
                cursor = *rows++;
                end = cursor + row_bytes;
            }
            prefetch<2>(cursor);
            cursor += 64;
        }
    }
};

// A block of kRows pixels by some vectors of columns from `vector` on.
struct Block {
    const float* pixels;  // (kRows, row)
    int64_t row;
    const float* weight;  // (depth, columns of the panel)
    int64_t depth;
    float*
        sums;  // (kRows, sums_row): sums of earlier rounds are there, and those of all but the last go there
    int64_t sums_row;
    bool first_round, last_round;
    int64_t vector, count;  // of the first column; pixels that are there
};

// The first `most` elements of two vectors, of which `left` fit into the row.
template <class T>
inline void store_two(T* y, Vec a, Vec b, int64_t left, int64_t most) {
    const int64_t n = smaller(left, most);
#ifdef __AVX512BF16__
    if constexpr (kPack<T> == 2) {
        const __m512i narrow = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v));
        _mm512_mask_storeu_epi16(y, static_cast<__mmask32>((uint64_t{1} << n) - 1), narrow);
        return;
    }
#endif
    if (n >= kLanes)
        store(y, a);
    else
        store(y, a, static_cast<int>(n));
    if (n == 2 * kLanes)
        store(y + kLanes, b);
    else if (n > kLanes)
        store(y + kLanes, b, static_cast<int>(n - kLanes));
}

// sum[r][v] += lanes of pixel r times columns of vector v
//
// Not inlined: the bounds of the activation, which the caller keeps, and these sums are more than AVX2's
// sixteen registers, and the compiler would rather write five of the sums to memory in every step.
template <class T, int width>
NOT_INLINED void add_products(const Block& block, Vec (&result)[kRows][width], Fetch* fetch) {
    Vec sum[kRows][width];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < width; ++v) sum[r][v] = result[r][v];
    const float* pixel = block.pixels;
    const float* weight = block.weight;
    const int64_t row = block.row;
    for (int64_t left = block.depth; left > 0; left -= kFetchEvery) {
        fetch->advance();
        const float* const end = pixel + smaller(left, kFetchEvery);
        for (; pixel < end; ++pixel, weight += width * kLanes) {
            Vec b[width];
            for (int v = 0; v < width; ++v) b[v] = load(weight + v * kLanes);
            for (int r = 0; r < kRows; ++r) {
                const Vec a = set1(pixel[r * row]);
                for (int v = 0; v < width; ++v) sum[r][v] = add_product(a, b[v], sum[r][v], T{});
            }
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < width; ++v) result[r][v] = sum[r][v];
}

template <class T, int width>
void multiply(const Plan<T>& plan, const Block& block, const Bounds& bounds, T* y, Fetch* fetch) {
    Vec sum[kRows][width];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < width; ++v)
            sum[r][v] = block.first_round ? zero() : load(block.sums + r * block.sums_row + v * kLanes);
    add_products<T>(block, sum, fetch);
    if (!block.last_round) {
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < width; ++v) store(block.sums + r * block.sums_row + v * kLanes, sum[r][v]);
        return;
    }
    const int64_t columns = plan.args.out_channels;
    for (int v = 0; v < width; v += 2) {
        const int64_t column = (block.vector + v) * kLanes;
        const bool alone = v + 1 == width;
        const Vec scale = load(plan.scale + column), shift = load(plan.shift + column);
        const Vec next_scale = alone ? scale : load(plan.scale + column + kLanes);
        const Vec next_shift = alone ? shift : load(plan.shift + column + kLanes);
        for (int r = 0; r < kRows; ++r) {
            if (r >= block.count) break;
            const Vec result = bounds.apply(fma(sum[r][v], scale, shift));
            const Vec next =
                alone ? zero() : bounds.apply(fma(sum[r][v + 1 - alone], next_scale, next_shift));
            store_two(y + r * plan.args.y_pixel + column, result, next, columns - column,
                      alone ? kLanes : 2 * kLanes);
        }
    }
}

template <class T>
void multiply(const Plan<T>& plan, const Block& block, int64_t width, const Bounds& bounds, T* y,
              Fetch* fetch) {
    if (width == 1) return multiply<T, 1>(plan, block, bounds, y, fetch);
    if (width == 2) return multiply<T, 2>(plan, block, bounds, y, fetch);
#ifdef __AVX512F__
    if (width == 3) return multiply<T, 3>(plan, block, bounds, y, fetch);
    return multiply<T, 4>(plan, block, bounds, y, fetch);
#endif
}

// ---- tiles ----

// One round of one tile.
struct Step {
    int64_t round, group;   // of panels
    int64_t begin, pixels;  // of y
};

template <class T>
Step step_at(const Plan<T>& plan, int64_t index) {
    const int64_t task = index / plan.rounds, tile = task / plan.groups;
    const int64_t begin = tile * plan.blocks / plan.tiles * kRows;
    const int64_t end = smaller((tile + 1) * plan.blocks / plan.tiles * kRows, plan.pixels);
    return {index % plan.rounds, task % plan.groups, begin, end - begin};
}

// Lists the rows of x that no earlier pixel of the image's line has read. Returns their number.
template <class T>
int64_t new_rows(const Plan<T>& plan, const T* const* taps, int64_t pixels, int64_t round,
                 const char** rows) {
    int64_t count = 0;
    for (int64_t p = 0; p < pixels; ++p, taps += kTaps) {
        for (int t = 0; t < kTaps; t += 3) {
            const T* const right = taps[t + 2];
            const bool at_left = taps[t] == plan.zeros;  // what is under the middle was nobody's right
            if (right != plan.zeros)
                rows[count++] = reinterpret_cast<const char*>(right + round * plan.channels);
            if (at_left && taps[t + 1] != plan.zeros)
                rows[count++] = reinterpret_cast<const char*>(taps[t + 1] + round * plan.channels);
        }
    }
    return count;
}

// Multiplies the panels of a step; after each, a part of the next step's depthwise pass, whose x it fetched.
template <class T>
void run_step(const Plan<T>& plan, const Team<T>& team, const Step& step, const float* tile, const Step& next,
              float* next_tile) {
    const SeparableConvArgs& args = plan.args;
    const Bounds bounds(args.activation);
    T* const y = static_cast<T*>(args.y) + step.begin * args.y_pixel;
    const int64_t first_panel = step.group * plan.panels / plan.groups;
    const int64_t panels = (step.group + 1) * plan.panels / plan.groups - first_panel;
    const int64_t depth = plan.lanes_of_round(step.round);
    const float* const weight = plan.weight + step.round * plan.channels / kPack<T> * plan.columns();
    for (int64_t i = 0; i < panels; ++i) {
        const int64_t vector = plan.panel_begin(first_panel + i);
        const int64_t width = plan.panel_begin(first_panel + i + 1) - vector;
        const float* const panel = weight + depth * vector * kLanes;
        const int64_t begin = next.pixels * i / panels, end = next.pixels * (i + 1) / panels;
        const T* const* const taps = team.taps + begin * kTaps;
        const int64_t rows = new_rows(plan, taps, end - begin, next.round, team.rows);
        // Behind this panel's weights are the next one's, of the next round too.
        const char* const behind = reinterpret_cast<const char*>(panel + depth * width * kLanes);
        Fetch fetch = {behind,
                       behind + depth * width * kLanes * 4,
                       team.rows,
                       team.rows + rows,
                       plan.channels * static_cast<int64_t>(sizeof(T)),
                       0};
        fetch.quota = ceil_div(fetch.lines(), ceil_div(step.pixels, kRows) * ceil_div(depth, kFetchEvery));
        for (int64_t p = 0; p < step.pixels; p += kRows) {
            const Block block = {tile + p * plan.row,
                                 plan.row,
                                 panel,
                                 depth,
                                 team.sums + p * plan.columns() + vector * kLanes,
                                 plan.columns(),
                                 step.round == 0,
                                 step.round + 1 == plan.rounds,
                                 vector,
                                 step.pixels - p};
            multiply(plan, block, width, bounds, y + p * args.y_pixel, &fetch);
        }
        depthwise(plan, taps, end - begin, next.round, next_tile + begin * plan.row);
    }
}

template <class T>
void run_team(const Plan<T>& plan, int index) {
    const int64_t tasks = plan.tiles * plan.groups;
    const int64_t begin = tasks * index / plan.teams * plan.rounds;
    const int64_t end = tasks * (index + 1) / plan.teams * plan.rounds;
    const Team<T> team = plan.team(index);
    Step step = step_at(plan, begin);
    if (begin == end) return;
    find_taps(plan, step.begin, step.pixels, team.taps);
    depthwise(plan, team.taps, step.pixels, step.round, team.tile[0]);
    for (int64_t i = begin; i < end; ++i) {
        Step next = {};
        if (i + 1 < end) next = step_at(plan, i + 1);
        if (next.round == 0) find_taps(plan, next.begin, next.pixels, team.taps);
        run_step(plan, team, step, team.tile[(i - begin) % 2], next, team.tile[(i - begin + 1) % 2]);
        step = next;
    }
}

template <class T>
bool run(const SeparableConvArgs& args, int threads) {
    if (args.images == 0) return true;
    Plan<T> plan(args, threads);
    const size_t bytes = static_cast<size_t>(plan.divide(nullptr)) + 64;
    char* const memory = static_cast<char*>(std::malloc(bytes));
    if (memory == nullptr) return false;
    plan.divide(memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64));
    std::memset(plan.zeros, 0, sizeof(T) * static_cast<size_t>(args.channels));
    const int teams = plan.teams;
    // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        for (int64_t i = plan.steps() * team / teams; i < plan.steps() * (team + 1) / teams; ++i)
            pack_step(plan, i);
        for (int64_t i = plan.vectors * team / teams; i < plan.vectors * (team + 1) / teams; ++i)
            pack_columns(plan, i);
    }
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) run_team(plan, team);
    std::free(memory);
    return true;
}

}  // namespace

namespace ISA {

bool separable_conv(const SeparableConvArgs& args, int threads) {
    return args.type == DType::bf16 ? run<bf16>(args, threads) : run<float>(args, threads);
}

}  // namespace ISA

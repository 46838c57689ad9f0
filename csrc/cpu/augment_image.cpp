// Crop, scale and flip of a uint8 image in one pass, and of its mask.
//
// The resize is separable: each needed source row is resampled across once, into a ring of int16 rows with 7
// bits of fraction, and each output row is a weighted sum of rows of the ring. Everything is integer
// arithmetic, so the result is the same bit for bit on every instruction set and for any number of threads.
//
// Source pixels are taken two taps at a time, 8 bytes from 3 * column on: shuffled to (r0 r1 g0 g1 b0 b1 0 0)
// one multiply-add gives the three channels of both taps.

#include "augment_image.h"

#include <cstdlib>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kFraction = 7;                   // bits of a row in the ring: 255 << 7 fits an int16
constexpr int kMostBits = 16;                  // of weights: (255 << 7) << 16 fits an int32
constexpr int64_t kPixelsPerThread = 1 << 14;  // less is not worth waking a thread
constexpr int kGroup = 4;                      // pixels resampled across at a time
constexpr int64_t kSlack = 4;                  // int16 that the last group of a row may write behind it

int teams_for(int64_t rows, int64_t pixels, int threads) {
    const int64_t most = smaller(rows, pixels / kPixelsPerThread + 1);
    return static_cast<int>(threads < most ? threads : most);
}

// What one axis of the output is made of: output i is the sum over j of weight(i, j) * source[start[i] + j],
// divided by 2^bits. The taps are padded with zero weights to whole pairs, and inside the source where that
// is long enough.
struct Axis {
    int32_t* start;   // (count rounded up to groups)
    int16_t* weight;  // (pairs, count rounded up to groups, 2)
    int64_t count, padded;
    int pairs, bits;

    int16_t* pair(int64_t i, int p) const { return weight + 2 * (padded * p + i); }
};

// Pillow's triangle filter: `low` and the weights, which sum to 1, of the scaled position `at`.
int64_t triangle(int64_t at, int64_t source, int64_t scaled, int64_t* low, double* weights) {
    const double scale = static_cast<double>(source) / static_cast<double>(scaled);
    const double reach = scale > 1.0 ? scale : 1.0;
    const double centre = (static_cast<double>(at) + 0.5) * scale;
    *low = larger(0, static_cast<int64_t>(centre - reach + 0.5));
    const int64_t high = smaller(source, static_cast<int64_t>(centre + reach + 0.5));
    double total = 0.0;
    for (int64_t k = *low; k < high; ++k) {
        const double away = (static_cast<double>(k) + 0.5 - centre) / reach;
        const double height = 1.0 - (away < 0.0 ? -away : away);
        weights[k - *low] = height > 0.0 ? height : 0.0;
        total += weights[k - *low];
    }
    int64_t taps = high - *low;
    for (int64_t k = 0; k < taps; ++k) weights[k] /= total;
    while (taps > 1 && weights[taps - 1] == 0.0) --taps;
    return taps;
}

// Rounds the running sum, so that the weights sum to 2^bits exactly and a flat image stays flat.
void quantise(const double* weights, int64_t taps, int64_t shift, int64_t i, const Axis& axis) {
    double sum = 0.0;
    int32_t before = 0;
    for (int64_t k = 0; k < taps; ++k) {
        sum += weights[k];
        const int32_t now = static_cast<int32_t>(sum * static_cast<double>(1 << axis.bits) + 0.5);
        const int64_t tap = k + shift;
        axis.pair(i, static_cast<int>(tap / 2))[tap % 2] = static_cast<int16_t>(now - before);
        before = now;
    }
}

bool make_axis(int64_t source, int64_t scaled, int64_t first, int64_t count, bool backwards, Axis* axis) {
    const int64_t reach = source / scaled + 2;
    double* weights = static_cast<double*>(std::malloc(sizeof(double) * static_cast<size_t>(2 * reach + 2)));
    if (weights == nullptr) return false;
    int64_t low = 0;
    int64_t most = 1;
    double heaviest = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t taps = triangle(first + i, source, scaled, &low, weights);
        most = larger(most, taps);
        for (int64_t k = 0; k < taps; ++k) heaviest = weights[k] > heaviest ? weights[k] : heaviest;
    }
    axis->count = count;
    axis->padded = (count + kGroup - 1) / kGroup * kGroup;
    axis->pairs = static_cast<int>((most + 1) / 2);
    axis->bits = 14;
    // A weight must fit an int16, rounding included; the wider the filter, the lighter each of its weights.
    while (axis->bits < kMostBits && heaviest * static_cast<double>(2 << axis->bits) < 32766.0) ++axis->bits;
    axis->start = static_cast<int32_t*>(std::calloc(static_cast<size_t>(axis->padded), sizeof(int32_t)));
    axis->weight = static_cast<int16_t*>(
        std::calloc(static_cast<size_t>(axis->padded * axis->pairs), 2 * sizeof(int16_t)));
    if (axis->start == nullptr || axis->weight == nullptr) {
        std::free(weights);
        return false;
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t to = backwards ? count - 1 - i : i;
        const int64_t taps = triangle(first + i, source, scaled, &low, weights);
        const int64_t start = larger(0, smaller(low, source - 2 * axis->pairs));
        axis->start[to] = static_cast<int32_t>(start);
        quantise(weights, taps, low - start, to, *axis);
    }
    std::free(weights);
    return true;
}

#if defined(__AVX512F__)

// GCC 12 warns of the undefined operand inside of intrinsics without a mask; a full one costs nothing.
constexpr __mmask16 kAll = 0xffff;

// Pixels i .. i+3 of a row resampled across, as 12 int16 and 4 more that mean nothing.
void across(const uint8_t* row, const Axis& axis, int64_t i, int16_t* to) {
    const __m512i shuffle = _mm512_maskz_broadcast_i32x4(
        kAll, _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i compact = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    const int shift = axis.bits - kFraction;
    const uint8_t* from[kGroup];
    for (int k = 0; k < kGroup; ++k) from[k] = row + 3 * static_cast<int64_t>(axis.start[i + k]);
    __m512i sum = _mm512_set1_epi32(1 << (shift - 1));
    for (int p = 0; p < axis.pairs; ++p) {
        const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from[0] + 6 * p));
        __m512i pixels = _mm512_zextsi128_si512(first);
        for (int k = 1; k < kGroup; ++k) {
            const __m128i next = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from[k] + 6 * p));
            pixels = _mm512_mask_broadcastq_epi64(pixels, static_cast<__mmask8>(1 << 2 * k), next);
        }
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(axis.pair(i, p)));
        const __m512i weights = _mm512_maskz_permutexvar_epi32(kAll, spread, _mm512_zextsi128_si512(pairs));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_shuffle_epi8(pixels, shuffle), weights));
    }
    sum = _mm512_maskz_permutexvar_epi32(kAll, compact,
                                         _mm512_maskz_srl_epi32(kAll, sum, _mm_cvtsi32_si128(shift)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(kAll, sum));
}

#elif defined(__AVX2__)

void across(const uint8_t* row, const Axis& axis, int64_t i, int16_t* to) {
    const __m128i shuffle = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const int shift = axis.bits - kFraction;
    const __m128i count = _mm_cvtsi32_si128(shift);
    for (int k = 0; k < kGroup; ++k) {
        const uint8_t* from = row + 3 * static_cast<int64_t>(axis.start[i + k]);
        __m128i sum = _mm_set1_epi32(1 << (shift - 1));
        for (int p = 0; p < axis.pairs; ++p) {
            const __m128i pixels = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 6 * p));
            int32_t pair;
            std::memcpy(&pair, axis.pair(i + k, p), sizeof(pair));
            sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(pixels, shuffle), _mm_set1_epi32(pair)));
        }
        sum = _mm_srl_epi32(sum, count);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 3 * k), _mm_packs_epi32(sum, sum));
    }
}

#else

void across(const uint8_t* row, const Axis& axis, int64_t i, int16_t* to) {
    const int shift = axis.bits - kFraction;
    for (int k = 0; k < kGroup; ++k) {
        const uint8_t* from = row + 3 * static_cast<int64_t>(axis.start[i + k]);
        int32_t sum[3] = {1 << (shift - 1), 1 << (shift - 1), 1 << (shift - 1)};
        for (int p = 0; p < axis.pairs; ++p) {
            const int16_t* weights = axis.pair(i + k, p);
            for (int c = 0; c < 3; ++c)
                sum[c] += weights[0] * from[6 * p + c] + weights[1] * from[6 * p + 3 + c];
        }
        for (int c = 0; c < 3; ++c) to[3 * k + c] = static_cast<int16_t>(sum[c] >> shift);
    }
}

#endif

// One output row: the weighted sum of ring rows start .. start + taps - 1, row r lying at r % capacity.
struct Ring {
    int16_t* rows;
    int64_t length;  // int16 from row to row
    int64_t capacity;

    int16_t* row(int64_t r) const { return rows + r % capacity * length; }
};

void down_pair(const int16_t* a, const int16_t* b, int32_t weight_a, int32_t weight_b, int64_t length,
               int shift, uint8_t* __restrict__ out) {
    for (int64_t i = 0; i < length; ++i)
        out[i] = static_cast<uint8_t>((weight_a * a[i] + weight_b * b[i] + (1 << (shift - 1))) >> shift);
}

void down(const Ring& ring, const Axis& axis, int64_t i, int64_t taps, int64_t length, uint8_t* out) {
    constexpr int kBlock = 256;
    const int shift = axis.bits + kFraction;
    const int64_t start = axis.start[i];
    if (taps <= 2) {
        const int16_t* weights = axis.pair(i, 0);
        down_pair(ring.row(start), ring.row(start + taps - 1), weights[0], taps == 2 ? weights[1] : 0, length,
                  shift, out);
        return;
    }
    for (int64_t begin = 0; begin < length; begin += kBlock) {
        const int64_t width = smaller(kBlock, length - begin);
        int32_t sum[kBlock];
        for (int c = 0; c < kBlock; ++c) sum[c] = 1 << (shift - 1);
        for (int64_t k = 0; k < taps; k += 2) {
            const int16_t* weights = axis.pair(i, static_cast<int>(k / 2));
            const int16_t* a = ring.row(start + k) + begin;
            const int16_t* b = k + 1 < taps ? ring.row(start + k + 1) + begin : a;  // its weight is 0 there
            const int32_t weight_a = weights[0];
            const int32_t weight_b = weights[1];
            for (int64_t c = 0; c < width; ++c) sum[c] += weight_a * a[c] + weight_b * b[c];
        }
        for (int64_t c = 0; c < width; ++c) out[begin + c] = static_cast<uint8_t>(sum[c] >> shift);
    }
}

struct Resample {
    const CropArgs& args;
    Span rows, columns;  // of the output
    Axis vertical, horizontal;
};

// Output rows begin .. end-1 of those with image in them. False: out of memory.
bool resample(const Resample& job, int64_t begin, int64_t end) {
    const CropArgs& args = job.args;
    const Axis& horizontal = job.horizontal;
    const int64_t taps = smaller(2 * job.vertical.pairs, args.height);
    const int64_t row_bytes = 3 * args.width;
    const int64_t read = larger(row_bytes, 6 * horizontal.pairs) + 2;  // by the last taps of a row
    const int64_t last_byte = (args.height - 1) * args.row_stride + row_bytes;
    const int64_t length = 3 * horizontal.padded + kSlack;
    uint8_t* memory = static_cast<uint8_t*>(
        std::calloc(static_cast<size_t>(taps * length) * sizeof(int16_t) + static_cast<size_t>(read), 1));
    if (memory == nullptr) return false;
    const Ring ring = {reinterpret_cast<int16_t*>(memory), length, taps};
    uint8_t* const guarded = memory + taps * length * static_cast<int64_t>(sizeof(int16_t));
    int64_t next = 0;
    for (int64_t y = begin; y < end; ++y) {
        const int64_t start = job.vertical.start[y];
        for (next = larger(next, start); next < start + taps; ++next) {
            const uint8_t* row = args.source + next * args.row_stride;
            if (next * args.row_stride + read > last_byte) {  // would read behind the image
                std::memcpy(guarded, row, static_cast<size_t>(row_bytes));
                row = guarded;
            }
            int16_t* const to = ring.row(next);
            for (int64_t x = 0; x < horizontal.padded; x += kGroup) across(row, horizontal, x, to + 3 * x);
        }
        const int64_t width = args.right - args.left;
        uint8_t* const out = args.out + 3 * ((job.rows.begin + y) * width + job.columns.begin);
        down(ring, job.vertical, y, taps, 3 * horizontal.count, out);
    }
    std::free(memory);
    return true;
}

void pad_pixels(uint8_t* to, int64_t pixels, const uint8_t* pad) {
    for (int64_t i = 0; i < pixels; ++i)
        for (int c = 0; c < 3; ++c) to[3 * i + c] = pad[c];
}

void pad_around(const CropArgs& args, Span rows, Span columns) {
    const int64_t height = args.bottom - args.top;
    const int64_t width = args.right - args.left;
    if (rows.begin == 0 && rows.end == height && columns.begin == 0 && columns.end == width) return;
    for (int64_t y = 0; y < height; ++y) {
        uint8_t* const row = args.out + 3 * y * width;
        const bool empty = y < rows.begin || y >= rows.end;
        pad_pixels(row, empty ? width : columns.begin, args.pad);
        if (!empty) pad_pixels(row + 3 * columns.end, width - columns.end, args.pad);
    }
}

}  // namespace

namespace ISA {

bool augment_image(const CropArgs& args, int threads) {
    const int64_t width = args.right - args.left;
    const Span rows = inside(args.top, args.bottom, args.scaled_height);
    const Span from = inside(args.left, args.right, args.scaled_width);
    const Span columns = args.flip ? reversed(from, width) : from;
    pad_around(args, rows, columns);
    const int64_t height_inside = rows.end - rows.begin;
    const int64_t width_inside = from.end - from.begin;
    if (height_inside == 0 || width_inside == 0) return true;
    if (!args.flip && args.height == args.scaled_height && args.width == args.scaled_width) {
        for (int64_t y = rows.begin; y < rows.end; ++y)
            std::memcpy(args.out + 3 * (y * width + columns.begin),
                        args.source + (args.top + y) * args.row_stride + 3 * (args.left + from.begin),
                        static_cast<size_t>(3 * width_inside));
        return true;
    }
    Resample job = {args, rows, columns, {}, {}};
    bool done = make_axis(args.height, args.scaled_height, args.top + rows.begin, height_inside, false,
                          &job.vertical) &&
                make_axis(args.width, args.scaled_width, args.left + from.begin, width_inside, args.flip,
                          &job.horizontal);
    if (done) {
        const int teams = teams_for(height_inside, height_inside * width_inside, threads);
        bool short_of_memory = false;
        // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) reduction(|| : short_of_memory) if (teams > 1)
        for (int team = 0; team < teams; ++team)
            if (!resample(job, height_inside * team / teams, height_inside * (team + 1) / teams))
                short_of_memory = true;
        done = !short_of_memory;
    }
    std::free(job.vertical.start);
    std::free(job.vertical.weight);
    std::free(job.horizontal.start);
    std::free(job.horizontal.weight);
    return done;
}

bool augment_image_mask(const CropArgs& args, int threads) {
    const int64_t height = args.bottom - args.top;
    const int64_t width = args.right - args.left;
    const Span rows = inside(args.top, args.bottom, args.scaled_height);
    const Span from = inside(args.left, args.right, args.scaled_width);
    const Span columns = args.flip ? reversed(from, width) : from;
    int32_t* column = static_cast<int32_t*>(std::malloc(sizeof(int32_t) * static_cast<size_t>(width + 1)));
    if (column == nullptr) return false;
    for (int64_t x = from.begin; x < from.end; ++x)
        column[args.flip ? width - 1 - x : x] =
            static_cast<int32_t>(nearest(args.left + x, args.width, args.scaled_width));
    const int teams = teams_for(height, height * width, threads);
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        const int64_t begin = height * team / teams;
        int64_t before = -1;
        for (int64_t y = begin; y < height * (team + 1) / teams; ++y) {
            uint8_t* const out = args.out + y * width;
            if (y < rows.begin || y >= rows.end) {
                std::memset(out, args.pad[0], static_cast<size_t>(width));
                continue;
            }
            const int64_t r = nearest(args.top + y, args.height, args.scaled_height);
            if (r == before) {  // an enlarged row
                std::memcpy(out, out - width, static_cast<size_t>(width));
                continue;
            }
            before = r;
            const uint8_t* const row = args.source + r * args.row_stride;
            std::memset(out, args.pad[0], static_cast<size_t>(columns.begin));
            for (int64_t x = columns.begin; x < columns.end; ++x) out[x] = row[column[x]];
            std::memset(out + columns.end, args.pad[0], static_cast<size_t>(width - columns.end));
        }
    }
    std::free(column);
    return true;
}

}  // namespace ISA

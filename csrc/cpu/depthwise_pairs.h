// 3x3 in bf16 at stride 1 with vdpbf16ps, which multiplies and adds two taps at once: for 32 outputs 6
// unpackings, 8 of these and 2 multiply-adds, where widened inputs take 6 widenings and 18 multiply-adds.
//
// Weights stay bf16, as the products are exact in fp32; scale and shift follow the sum. Denormals count as
// zero.
#pragma once

#include "depthwise_conv.h"
#include "depthwise_tile.h"

namespace {

#ifdef __AVX512BF16__

constexpr bool kHasPairsOfTaps = true;

// What `convolve_pairs` reads of each kPair channels, in units of kPair lanes.
constexpr int kUpperRows = 0;  // the left, the centre and the right taps of rows 0 and 1
constexpr int kLowerRows = 3;  // the same of rows 1 and 2
constexpr int kMiddleRow = 6;  // of row 1 the left and the centre tap, then the right one in fp32
constexpr int kBottomRow = 8;  // the same of row 2
constexpr int kAffine = 10;    // scale, shift
constexpr int kTapPairs = 12;

// kPair values in the order in which unpacklo and unpackhi leave channels: every second four of them.
struct Halves {
    Vec low, high;
};
struct TwoPixels {
    __m512i low, high;
};

inline Halves load_halves(const float* p) { return {load(p), load(p + kLanes)}; }
inline TwoPixels side_by_side(__m512i x, __m512i y) {
    return {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y)};
}
inline Vec add_products(__m512i x, Vec w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w.v))};
}
inline Halves add_products(TwoPixels x, Halves w, Halves sum) {
    return {add_products(x.low, w.low, sum.low), add_products(x.high, w.high, sum.high)};
}

// The first tap's weights turned to 0: it lies outside the image, where an infinite one would make NaN of 0.
inline Halves second_of(Halves w) {
    const __m512i kept = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    const auto second = [kept](Vec x) -> Vec {
        return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), kept))};
    };
    return {second(w.low), second(w.high)};
}

// packed: (pairs, kTapPairs, kPair)
void pack_tap_pairs(const DepthwiseArgs& args, float* packed) {
    const bf16* weight = static_cast<const bf16*>(args.weight);
    for (int64_t c = 0; c < (args.channels + kPair - 1) / kPair * kPair; ++c) {
        const int i = static_cast<int>(c % kPair);
        float* const to = packed + c / kPair * kTapPairs * kPair + i / 4 % 2 * kLanes + i / 8 * 4 + i % 4;
        const bool real = c < args.channels;
        bf16 tap[9] = {};
        if (real) std::memcpy(tap, weight + 9 * c, sizeof(tap));
        const auto put = [to](int where, bf16 x, bf16 y) {
            const bf16 both[2] = {x, y};
            std::memcpy(to + where * kPair, both, sizeof(both));
        };
        for (int k = 0; k < 3; ++k) {
            put(kUpperRows + k, tap[k], tap[3 + k]);
            put(kLowerRows + k, tap[3 + k], tap[6 + k]);
        }
        put(kMiddleRow, tap[3], tap[4]);
        put(kBottomRow, tap[6], tap[7]);
        to[(kMiddleRow + 1) * kPair] = to_float(tap[5]);
        to[(kBottomRow + 1) * kPair] = to_float(tap[8]);
        to[kAffine * kPair] = real && args.scale != nullptr ? args.scale[c] : 1.0f;
        to[(kAffine + 1) * kPair] = real && args.shift != nullptr ? args.shift[c] : 0.0f;
    }
}

// What it needs of the chain is copied: the compiler would read it again after every store.
template <bool kTail>
struct PairOutput {
    bf16* const y;
    const int64_t step, count;
    __m512i* const held;  // (kChain), where the chain is deferred, else null
    const bool past_cache;
    const __mmask32 real;
    const Halves scale, shift;
    const Vec bottom, top;
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);

    PairOutput(const Chain<bf16>& chain, __m512i* space)
        : y(chain.y),
          step(chain.step),
          count(chain.count),
          held(chain.deferred ? space : nullptr),
          past_cache(chain.past_cache),
          real(first_of_pair(chain.channels)),
          scale(load_halves(chain.weight + kAffine * kPair)),
          shift(load_halves(chain.weight + (kAffine + 1) * kPair)),
          bottom(set1(chain.low)),
          top(set1(chain.high)) {}

    __m512i read(const bf16* p) const {
        return kTail ? _mm512_maskz_loadu_epi16(real, p) : _mm512_loadu_si512(p);
    }
    void write(int64_t j, Halves x) const {
        x.low = min(top, max(bottom, fma(x.low, scale.low, shift.low)));
        x.high = min(top, max(bottom, fma(x.high, scale.high, shift.high)));
        const __m512i mixed = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.high.v, x.low.v));
        const __m512i both = _mm512_permutexvar_epi64(order, mixed);
        if (held != nullptr)
            held[j] = both;
        else
            put(j, both);
    }
    void put(int64_t j, __m512i both) const {
        bf16* const to = y + j * step;
        if (kTail)
            _mm512_mask_storeu_epi16(to, real, both);
        else if (past_cache)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
        else
            _mm512_storeu_si512(to, both);
    }
    void finish() const {
        for (int64_t j = 0; held != nullptr && j < count; ++j) put(j, held[j]);
    }
};

// chain.weight: (kTapPairs, kPair); first_tap: the row of taps that chain.row[0] is under. Two live rows are
// read side by side; the third, or the only one, is read with the next column beside it.
template <int kRows, bool kTail>
void convolve_pairs(const Chain<bf16>& chain, int first_tap) {
    constexpr bool kTwo = kRows > 1, kOne = kRows != 2;
    const float* const two = chain.weight + (first_tap == 0 ? kUpperRows : kLowerRows) * kPair;
    const float* const one = chain.weight + (kRows == 1 ? kMiddleRow : kBottomRow) * kPair;
    Halves w[3] = {}, w_left = {}, w_right = {};
#pragma GCC unroll 3
    for (int k = 0; kTwo && k < 3; ++k) w[k] = load_halves(two + k * kPair);
    if (kOne) {
        w_left = load_halves(one);
        w_right = load_halves(one + kPair);
    }
    __m512i held[kChain];
    const PairOutput<kTail> output(chain, held);
    const int64_t step = chain.step, count = chain.count, below = chain.below;
    const bool right = chain.right;
    const bf16 *const row0 = chain.row[0], *const row1 = chain.row[kTwo ? 1 : 0],
                      *const last = chain.row[kRows - 1];
    const auto column = [&](int64_t offset) {
        return side_by_side(output.read(row0 + offset), output.read(row1 + offset));
    };
    const __m512i nothing = _mm512_setzero_si512();
    const Halves none = {zero(), zero()};
    Halves previous = none, current = none, next = none;
    __m512i here = kOne ? output.read(last) : nothing;
    if (kTwo && chain.left) current = add_products(column(-step), w[0], current);
    if (kOne && chain.left)
        current = add_products(side_by_side(output.read(last - step), here), w_left, current);
    else if (kOne)
        current = add_products(side_by_side(nothing, here), second_of(w_left), current);
    for (int64_t j = 0; j < count; ++j) {
        const int64_t offset = j * step;
        next = none;
        if (kTwo) {
            const TwoPixels x = column(offset);
            previous = add_products(x, w[2], previous);
            current = add_products(x, w[1], current);
            next = add_products(x, w[0], next);
        }
        if (kOne) {
            const bool inside = j + 1 < count || right;
            const __m512i beside = inside ? output.read(last + offset + step) : nothing;
            next = add_products(side_by_side(here, beside), w_left, next);
            if (inside) {
                const TwoPixels x = side_by_side(nothing, beside);  // widened
                current.low = fma({_mm512_castsi512_ps(x.low)}, w_right.low, current.low);
                current.high = fma({_mm512_castsi512_ps(x.high)}, w_right.high, current.high);
            }
            here = beside;
        }
        prefetch<2>(last + offset + below);
        if (j > 0) output.write(j - 1, previous);
        previous = current;
        current = next;
    }
    if (kTwo && right) previous = add_products(column(count * step), w[2], previous);
    output.write(count - 1, previous);
    output.finish();
}

inline void convolve_pairs(const Chain<bf16>& chain, int rows, int first_tap, bool tail) {
    if (rows == 3)
        return tail ? convolve_pairs<3, true>(chain, first_tap) : convolve_pairs<3, false>(chain, first_tap);
    if (rows == 2)
        return tail ? convolve_pairs<2, true>(chain, first_tap) : convolve_pairs<2, false>(chain, first_tap);
    tail ? convolve_pairs<1, true>(chain, first_tap) : convolve_pairs<1, false>(chain, first_tap);
}

#else

constexpr bool kHasPairsOfTaps = false;
constexpr int kTapPairs = 0;
[[maybe_unused]] inline void pack_tap_pairs(const DepthwiseArgs&, float*) {}
[[maybe_unused]] inline void convolve_pairs(const Chain<bf16>&, int, int, bool) {}

#endif

// Nothing takes this path but bf16.
[[maybe_unused]] inline void convolve_pairs(const Chain<float>&, int, int, bool) {}

}  // namespace

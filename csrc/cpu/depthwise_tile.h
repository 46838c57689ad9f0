// Inner loops of the depthwise convolution: one pair of vectors of channels, a few output pixels of one row.
//
// Output columns that are `dilation` apart form a chain: the right tap of one is the left tap of the one
// after the next (stride 1) or of the next (stride 2). Along a chain every input vector is loaded and widened
// once for each live row, with the weights and the unfinished sums in registers. Taps outside the image are
// never read.
#pragma once

#include "prefetch.h"
#include "vec.h"

namespace {

constexpr int kPair = 2 * kLanes;

// kPair channels. Where bf16 is widened in registers, `a` holds the even ones and `b` the odd ones: a shift
// and a mask make both from one load. `packed_place` says where a channel is.
struct Pair {
    Vec a, b;
};

inline Pair set_pair(float x) { return {set1(x), set1(x)}; }
inline Pair load_packed(const float* p) { return {load(p), load(p + kLanes)}; }
inline void store_packed(float* p, Pair x) {
    store(p, x.a);
    store(p + kLanes, x.b);
}
inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
// NaN of x stays.
inline Pair clamp(Pair x, Vec low, Vec high) { return {min(high, max(low, x.a)), min(high, max(low, x.b))}; }

inline Pair load_pair(const float* p) { return load_packed(p); }
inline Pair load_pair(const float* p, int n) {
    if (n <= kLanes) return {load(p, n), zero()};
    return {load(p), load(p + kLanes, n - kLanes)};
}
// Stores, and returns what a reader will find there.
inline Pair store_pair(float* p, Pair x) {
    store_packed(p, x);
    return x;
}
inline Pair store_pair(float* p, Pair x, int n) {
    if (n <= kLanes) {
        store(p, x.a, n);
    } else {
        store(p, x.a);
        store(p + kLanes, x.b, n - kLanes);
    }
    return x;
}

#if defined(__AVX512F__)

constexpr bool kBf16Interleaved = true;
inline Pair widen(__m512i both) {
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, odd))}};
}
// To nearest, ties to even, on sixteen bits at once: a carry comes where the lower half, as a number, is
// above a half, or is a half and the upper half is odd. A quiet NaN stays one unless all its bits are set.
inline __m512i narrow(Pair x) {
    const __m512i a = _mm512_castps_si512(x.a.v), b = _mm512_castps_si512(x.b.v);
    const __m512i upper = _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), 0xaaaaaaaa, b);
    const __m512i lower = _mm512_mask_mov_epi16(_mm512_slli_epi32(b, 16), 0x55555555, a);
    // (upper & 1) ^ 0x8001
    const __m512i least =
        _mm512_ternarylogic_epi32(upper, _mm512_set1_epi16(1), _mm512_set1_epi16(-0x7fff), 0x6a);
    const __mmask32 carry = _mm512_cmpge_epu16_mask(lower, least);
    return _mm512_mask_sub_epi16(upper, carry, upper, _mm512_set1_epi16(-1));
}
inline __mmask32 first_of_pair(int n) { return n == 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
inline Pair load_pair(const bf16* p) { return widen(_mm512_loadu_si512(p)); }
inline Pair load_pair(const bf16* p, int n) { return widen(_mm512_maskz_loadu_epi16(first_of_pair(n), p)); }
inline Pair store_pair(bf16* p, Pair x) {
    const __m512i both = narrow(x);
    _mm512_storeu_si512(p, both);
    return widen(both);
}
inline Pair store_pair(bf16* p, Pair x, int n) {
    const __m512i both = narrow(x);
    _mm512_mask_storeu_epi16(p, first_of_pair(n), both);
    return widen(both);
}

#else

constexpr bool kBf16Interleaved = false;
inline Pair load_pair(const bf16* p) { return {load(p), load(p + kLanes)}; }
inline Pair load_pair(const bf16* p, int n) {
    if (n <= kLanes) return {load(p, n), zero()};
    return {load(p), load(p + kLanes, n - kLanes)};
}
inline Pair store_pair(bf16* p, Pair x) {
    store(p, x.a);
    store(p + kLanes, x.b);
    return load_pair(p);
}
inline Pair store_pair(bf16* p, Pair x, int n) {
    if (n <= kLanes) {
        store(p, x.a, n);
    } else {
        store(p, x.a);
        store(p + kLanes, x.b, n - kLanes);
    }
    return load_pair(p, n);
}

#endif

// Whether a pair is a whole line of the cache, so that writing around it does not read the line first.
template <class T>
constexpr bool kCanStream =
#ifdef __AVX2__
    sizeof(T) * kPair % 64 == 0;
#else
    false;
#endif

// store_pair around the cache, to an address that is a multiple of 64.
template <class T>
inline Pair stream_pair(T* p, Pair x) {
    return store_pair(p, x);
}
inline void finish_streams() {
#ifdef __AVX2__
    _mm_sfence();
#endif
}
#if defined(__AVX512F__)
inline Pair stream_pair(float* p, Pair x) {
    _mm512_stream_ps(p, x.a.v);
    _mm512_stream_ps(p + kLanes, x.b.v);
    return x;
}
inline Pair stream_pair(bf16* p, Pair x) {
    const __m512i both = narrow(x);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    return widen(both);
}
#elif defined(__AVX2__)
inline Pair stream_pair(float* p, Pair x) {
    _mm256_stream_ps(p, x.a.v);
    _mm256_stream_ps(p + kLanes, x.b.v);
    return x;
}
#endif

// Where in a packed pair of floats its channel `c` is, 0 <= c < kPair.
template <class T>
int packed_place(int c);
template <>
[[maybe_unused]] int packed_place<float>(int c) {
    return c;
}
template <>
[[maybe_unused]] int packed_place<bf16>(int c) {
    return kBf16Interleaved ? c % 2 * kLanes + c / 2 : c;
}

// What becomes of input and result.
enum class Form {
    affine,      // scale, shift and activation of the result
    statistics,  // its moments
    normalised,  // its moments, where the input is normalised and activated as it is loaded
};

// Deviations of the rounded result from a pivot, summed for each channel of a packed pair.
struct Moments {
    float* pivot;
    float* sum;
    float* square;
};

constexpr int64_t kChain = 16;  // outputs at most

// `count` outputs of a chain, from the first on: y[j] is made of the columns stride * j - 1, + 0 and + 1, in
// steps of the chain.
template <class T>
struct Chain {
    const T* row[3];      // the live rows at the centre of output 0
    const float* weight;  // the taps of those rows, then
    const float* shift;   // both packed, as
    const float *in_scale, *in_shift;
    T* y;
    int64_t step;  // elements from one column of the chain to the next, of x and of y
    int64_t count;
    int64_t below;  // elements from the last live row to the next that the piece below this one reads, or 0
    bool left, right;  // whether the first and the last tap of the chain are inside the image
    float low, high;   // bounds of the activation, of x where that is normalised
    bool past_cache;   // where `stream_pair` can, y goes straight to memory
    bool deferred;     // depthwise_pairs.h: y is written once all of the chain has been read
    Moments moments;
    int channels;  // of the pair, kPair but for the last
};

// Results with moments have no activation and no shift, which leaves registers to their sums.
template <class T, bool kTail, Form form>
struct Output {
    static constexpr bool kMoments = form != Form::affine;
    const Chain<T>& chain;
    const bool past_cache = kCanStream<T> && chain.past_cache;
    const Vec low = set1(chain.low), high = set1(chain.high);
    const Pair shift = kMoments ? set_pair(0.0f) : load_packed(chain.shift);
    Pair pivot, sum, square, in_scale, in_shift;

    explicit Output(const Chain<T>& of) : chain(of) {
        if (form == Form::normalised) {
            in_scale = load_packed(chain.in_scale);
            in_shift = load_packed(chain.in_shift);
        }
        if (!kMoments) return;
        pivot = load_packed(chain.moments.pivot);
        sum = square = set_pair(0.0f);
    }
    Pair read(const T* p) const {
        const Pair x = kTail ? load_pair(p, chain.channels) : load_pair(p);
        return form == Form::normalised ? clamp(fma(x, in_scale, in_shift), low, high) : x;
    }
    void write(int64_t j, Pair x) {
        if (!kMoments) x = clamp(x, low, high);
        T* const y = chain.y + j * chain.step;
        const Pair stored = kTail        ? store_pair(y, x, chain.channels)
                            : past_cache ? stream_pair(y, x)
                                         : store_pair(y, x);
        if (!kMoments) return;
        const Pair deviation = stored - pivot;
        sum = sum + deviation;
        square = fma(deviation, deviation, square);
    }
    void finish() const {
        if (!kMoments) return;
        const Moments& to = chain.moments;
        store_packed(to.sum, load_packed(to.sum) + sum);
        store_packed(to.square, load_packed(to.square) + square);
    }
};

// 3x3. kRows: how many of the three rows of taps are inside the image
template <class T, int kRows, int kStride, bool kTail, Form form>
void convolve_chain(const Chain<T>& chain) {
    Pair w[kRows][3];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) w[r][k] = load_packed(chain.weight + (3 * r + k) * kPair);
    const int64_t step = chain.step, count = chain.count;
    Output<T, kTail, form> output(chain);
    const Pair shift = output.shift;
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = chain.row[r];
    Pair previous = shift, current = shift, next;
    if (chain.left)
        for (int r = 0; r < kRows; ++r) current = fma(w[r][0], output.read(row[r] - step), current);
    if (kStride == 1) {
        for (int64_t j = 0; j < count - 1; ++j) {
            next = shift;
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r) {
                const Pair x = output.read(row[r] + j * step);
                previous = fma(w[r][2], x, previous);
                current = fma(w[r][1], x, current);
                next = fma(w[r][0], x, next);
            }
            // Not to the first-level cache, whose sets hold few lines that are a power of two apart.
            prefetch<2>(row[kRows - 1] + j * step + chain.below);
            if (j > 0) output.write(j - 1, previous);
            previous = current;
            current = next;
        }
        const int64_t last = count - 1;
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) {
            const Pair x = output.read(row[r] + last * step);
            previous = fma(w[r][2], x, previous);
            current = fma(w[r][1], x, current);
        }
        if (last > 0) output.write(last - 1, previous);
        if (chain.right)
            for (int r = 0; r < kRows; ++r)
                current = fma(w[r][2], output.read(row[r] + count * step), current);
        output.write(last, current);
    } else {
        for (int64_t j = 0; j < count; ++j) {
            next = shift;
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r)
                current = fma(w[r][1], output.read(row[r] + 2 * j * step), current);
            if (j + 1 < count || chain.right) {
#pragma GCC unroll 3
                for (int r = 0; r < kRows; ++r) {
                    const Pair x = output.read(row[r] + (2 * j + 1) * step);
                    current = fma(w[r][2], x, current);
                    next = fma(w[r][0], x, next);
                }
            }
            output.write(j, current);
            current = next;
        }
    }
    output.finish();
}

}  // namespace

// Bilinear resize written straight into the concatenation buffer.
//
// Output pixels of a row that lie between the same four pixels of x are a run: a channel vector of the four
// is read once and lerped vertically, and every pixel of the run takes one horizontal lerp from registers.

#include "upsample_concat.h"

#include "upsample_concat_backward.h"
#include "upsample_concat_taps.h"

namespace {

// Of the result: from there on stores go past the caches. Zen 5 with 32 MB of L3, two threads, the result
// read next: slower at 10 MB, equal at 20 MB, faster at 40 MB.
constexpr int64_t kStreamBytes = 1 << 24;

// Past the caches, to aligned memory: a copy of kLanes elements.
#if defined(__AVX512F__)
inline void stream_copy(float* p, const float* from) { stream(p, load(from)); }
inline void stream_copy(bf16* p, const bf16* from) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__AVX2__)
inline void stream_copy(float* p, const float* from) { stream(p, load(from)); }
inline void stream_copy(bf16* p, const bf16* from) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
template <class T>
inline void stream_copy(T* p, const T* from) {
    std::memcpy(p, from, sizeof(T) * kLanes);
}
#endif

template <bool streaming, class T>
inline void store_pair(T* p, Vec a, Vec b) {
    if (streaming) {
        stream(p, a);
        stream(p + kLanes, b);
    } else {
        store(p, a);
        store(p + kLanes, b);
    }
}

#ifdef __AVX512F__
// The upper halves are the results. Without vec.h's test for NaN: one that comes of widened bf16 has a lower
// half of zeros, from which rounding carries nothing.
inline __m512i round_to_bf16(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

template <bool streaming>
inline void store_pair(bf16* p, Vec a, Vec b) {
    const __m512i numbers =
        _mm512_set_epi32(0x1f001e, 0x1d001c, 0x1b001a, 0x190018, 0x170016, 0x150014, 0x130012, 0x110010,
                         0xf000e, 0xd000c, 0xb000a, 0x90008, 0x70006, 0x50004, 0x30002, 0x10000);
    const __m512i odd_words = _mm512_or_si512(_mm512_slli_epi16(numbers, 1), _mm512_set1_epi16(1));
    const __m512i both = _mm512_permutex2var_epi16(round_to_bf16(a), odd_words, round_to_bf16(b));
    if (streaming) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(both));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm512_extracti64x4_epi64(both, 1));
    } else {
        _mm512_storeu_si512(p, both);
    }
}
#endif

template <class T>
struct Corners {
    const T *top_left, *top_right, *bottom_left, *bottom_right;

    Corners operator+(int64_t c) const {
        return {top_left + c, top_right + c, bottom_left + c, bottom_right + c};
    }
};

// The lerp of torch, weight_low * a + weight_high * b: a + weight * (b - a) would make NaN of two infinities.
inline Vec lerp(Vec a, Vec b, Vec weight_a, Vec weight_b) { return fma(weight_b, b, weight_a * a); }

// A vector of channels of one run. rest: nothing, or how many of its channels there are.
template <class T, class... Rest>
void write_channels(const Corners<T>& from, const Tap& row, const Tap* columns, int64_t count, T* out,
                    int64_t stride, Rest... rest) {
    const Vec top = set1(row.weight_low), bottom = set1(row.weight_high);
    const Vec left = lerp(load(from.top_left, rest...), load(from.bottom_left, rest...), top, bottom);
    const Vec right = lerp(load(from.top_right, rest...), load(from.bottom_right, rest...), top, bottom);
    for (int64_t i = 0; i < count; ++i, out += stride)
        store(out, lerp(left, right, set1(columns[i].weight_low), set1(columns[i].weight_high)), rest...);
}

// out: the first of `count` pixels, `stride` elements apart; columns: their taps
template <bool streaming, class T>
void write_run(const Corners<T>& from, const Tap& row, const Tap* columns, int64_t count, int64_t channels,
               T* out, int64_t stride) {
    const Vec top = set1(row.weight_low), bottom = set1(row.weight_high);
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
        Vec left[2], right[2];
        for (int j = 0; j < 2; ++j) {
            const Corners<T> at = from + (c + j * kLanes);
            left[j] = lerp(load(at.top_left), load(at.bottom_left), top, bottom);
            right[j] = lerp(load(at.top_right), load(at.bottom_right), top, bottom);
        }
        T* to = out + c;
        for (int64_t i = 0; i < count; ++i, to += stride) {
            const Vec low = set1(columns[i].weight_low), high = set1(columns[i].weight_high);
            store_pair<streaming>(to, lerp(left[0], right[0], low, high), lerp(left[1], right[1], low, high));
        }
    }
    for (; c + kLanes <= channels; c += kLanes)
        write_channels(from + c, row, columns, count, out + c, stride);
    if (c < channels)
        write_channels(from + c, row, columns, count, out + c, stride, static_cast<int>(channels - c));
}

template <bool streaming, class T>
void copy_channels(T* to, const T* from, int64_t channels) {
    if (streaming)
        for (int64_t c = 0; c < channels; c += kLanes) stream_copy(to + c, from + c);
    else
        copy(to, from, channels * static_cast<int64_t>(sizeof(T)));
}

// index: of the row among those of all images
template <bool streaming, class T>
void write_row(const UpsampleConcatArgs& args, const Axis& rows, const Tap* columns, int64_t index) {
    const UpsampleConcatShape& s = args.shape;
    const int64_t image = index / s.out_height;
    const int64_t stride = s.channels + s.low_channels;
    const Tap row = rows.at(index - image * s.out_height);
    const T* x = static_cast<const T*>(args.x) + image * s.height * s.width * s.channels;
    const T* top = x + row.low * s.width * s.channels;
    const T* bottom = x + row.high * s.width * s.channels;
    const T* low_level = static_cast<const T*>(args.low_level) + index * s.out_width * s.low_channels;
    T* out = static_cast<T*>(args.out) + index * s.out_width * stride;
    for (int64_t begin = 0, end; begin < s.out_width; begin = end) {
        end = run_end(columns, begin, s.out_width);
        const int64_t left = columns[begin].low * s.channels, right = columns[begin].high * s.channels;
        const Corners<T> from = {top + left, top + right, bottom + left, bottom + right};
        write_run<streaming>(from, row, columns + begin, end - begin, s.channels, out + begin * stride,
                             stride);
        for (int64_t i = begin; i < end; ++i)
            copy_channels<streaming>(out + i * stride + s.channels, low_level + i * s.low_channels,
                                     s.low_channels);
    }
    if (streaming) finish_streaming();
}

template <class T>
bool forward(const UpsampleConcatArgs& args, int threads) {
    const UpsampleConcatShape& s = args.shape;
    const int64_t total = s.images * s.out_height;
    if (total == 0) return true;
    const Axis rows(s.height, s.out_height, s.align_corners);
    Tap* columns = Axis(s.width, s.out_width, s.align_corners).table();
    if (columns == nullptr) return false;
    const int64_t row_bytes = s.out_width * (s.channels + s.low_channels) * static_cast<int64_t>(sizeof(T));
    const bool aligned = s.channels % (2 * kLanes) == 0 && s.low_channels % kLanes == 0 &&
                         reinterpret_cast<uintptr_t>(args.out) % (kLanes * sizeof(T)) == 0;
    const bool streaming = aligned && total * row_bytes >= kStreamBytes;
    const auto write = streaming ? write_row<true, T> : write_row<false, T>;
    const int teams = teams_for(total, total * row_bytes, threads);
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int64_t index = 0; index < total; ++index) write(args, rows, columns, index);
    std::free(columns);
    return true;
}

}  // namespace

namespace ISA {

bool upsample_concat(const UpsampleConcatArgs& args, int threads) {
    return args.shape.dtype == DType::f32 ? forward<float>(args, threads) : forward<bf16>(args, threads);
}

bool upsample_concat_backward(const UpsampleConcatBackwardArgs& args, int threads) {
    return args.shape.dtype == DType::f32 ? backward<float>(args, threads) : backward<bf16>(args, threads);
}

}  // namespace ISA

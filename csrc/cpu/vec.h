// Vectors of floats, one width per instruction set: kernels are written once over `Vec` and compiled for
// each.
//
// Storage is fp32 or bf16, arithmetic is fp32. In an unnamed namespace: a function with external linkage
// would be merged across the objects of different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the operands that its own AVX-512 intrinsics leave undefined for mistakes of the caller (bug
// 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "../types.h"

#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

[[maybe_unused]] inline float to_float(float x) { return x; }
[[maybe_unused]] inline float to_float(uint8_t x) { return static_cast<float>(x); }
[[maybe_unused]] inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
[[maybe_unused]] inline void from_float(float x, float* to) { *to = x; }
[[maybe_unused]] inline void from_float(float x, bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    to->bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vec {
    __m512 v;
};
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load(const bf16* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// One instruction for eight; unlike the other instruction sets it flushes what is below 1.2e-38 to zero.
inline __m256i narrow_to_bf16(Vec x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_to_bf16(x)); }
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline void store(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_to_bf16(x)); }
// Past the caches, to memory aligned to the vector stored; finish_streaming() before another thread reads it.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
inline void stream(bf16* p, Vec x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_to_bf16(x)); }
inline void finish_streaming() { _mm_sfence(); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// Where one is NaN the result is b: max(set1(0), x) keeps a NaN of x.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// x where a > b, else 0
inline Vec where_greater(Vec a, Vec b, Vec x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline Vec load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load(const uint8_t* p, int n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
struct Vec {
    __m256 v;
};
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline __m128i narrow_to_bf16(Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_to_bf16(x)); }
inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
inline Vec load(const bf16* p, int n) {
    bf16 part[kLanes] = {};
    std::memcpy(part, p, sizeof(bf16) * static_cast<size_t>(n));
    return load(part);
}
inline void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first(n), x.v); }
inline void store(bf16* p, Vec x, int n) {
    bf16 part[kLanes];
    store(part, x);
    std::memcpy(p, part, sizeof(bf16) * static_cast<size_t>(n));
}
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x.v); }
inline void stream(bf16* p, Vec x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_to_bf16(x)); }
inline void finish_streaming() { _mm_sfence(); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec where_greater(Vec a, Vec b, Vec x) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline Vec load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load(const uint8_t* p, int n) {
    uint8_t part[kLanes] = {};
    std::memcpy(part, p, static_cast<size_t>(n));
    return load(part);
}

#else

// Four lanes: the compiler makes them one register wherever there are vectors at all.
constexpr int kLanes = 4;
struct Vec {
    float v[kLanes];
};
#define FOR_LANES for (int i = 0; i < kLanes; ++i)
inline Vec set1(float x) { return {{x, x, x, x}}; }
template <class T>
inline Vec load(const T* p, int n = kLanes) {
    Vec r = {};
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
}
template <class T>
inline void store(T* p, Vec x, int n = kLanes) {
    for (int i = 0; i < n; ++i) from_float(x.v[i], p + i);
}
template <class T>
inline void stream(T* p, Vec x) {
    store(p, x);
}
inline void finish_streaming() {}
inline Vec operator+(Vec a, Vec b) {
    FOR_LANES a.v[i] += b.v[i];
    return a;
}
inline Vec operator-(Vec a, Vec b) {
    FOR_LANES a.v[i] -= b.v[i];
    return a;
}
inline Vec operator*(Vec a, Vec b) {
    FOR_LANES a.v[i] *= b.v[i];
    return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
    FOR_LANES c.v[i] += a.v[i] * b.v[i];
    return c;
}
inline Vec max(Vec a, Vec b) {
    FOR_LANES b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
}
inline Vec min(Vec a, Vec b) {
    FOR_LANES b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
}
inline Vec where_greater(Vec a, Vec b, Vec x) {
    FOR_LANES x.v[i] = a.v[i] > b.v[i] ? x.v[i] : 0.0f;
    return x;
}
#undef FOR_LANES

#endif

inline Vec zero() { return set1(0.0f); }

// NaN passes through, as in torch.
template <Activation activation>
inline Vec activate(Vec x) {
    if (activation == Activation::none) return x;
    x = max(zero(), x);
    return activation == Activation::relu6 ? min(set1(6.0f), x) : x;
}

// grad where the activation let `y`, its output, pass, else 0: y > 0, and y < 6 for relu6.
template <Activation activation>
inline Vec activate_backward(Vec y, Vec grad) {
    if (activation == Activation::none) return grad;
    grad = where_greater(y, zero(), grad);
    return activation == Activation::relu6 ? where_greater(set1(6.0f), y, grad) : grad;
}

}  // namespace

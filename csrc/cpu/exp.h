// Exponential, logarithm and quotient over `Vec`.
//
// Polynomials of Cephes (expf, logf) after Cody and Waite's reduction; error below 2 ulp on their domains.
#pragma once

#include "vec.h"

namespace {

#if defined(__AVX512F__)

inline Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec nearest(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
// x * 2^n, n a whole number in -127 .. 127; 2^-127 counts as 0 in the other instruction sets.
inline Vec times_power_of_two(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// x = mantissa * 2^exponent with the mantissa in [0.75, 1.5), for positive normal x
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
    mantissa->v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __m512 power = _mm512_div_ps(x.v, mantissa->v);
    exponent->v = _mm512_getexp_ps(power);
}

#elif defined(__AVX2__)

inline Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec nearest(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec times_power_of_two(Vec x, Vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
    // Counted from 0.75: the exponent of x / 0.75, and x without it.
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000));
    const __m256i power = _mm256_srai_epi32(above, 23);
    exponent->v = _mm256_cvtepi32_ps(power);
    mantissa->v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
}

#else

inline Vec divide(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] /= b.v[i];
    return a;
}
inline Vec nearest(Vec x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: nothing is left of the fraction
    for (int i = 0; i < kLanes; ++i) {
        volatile float shifted = x.v[i] + kShift;
        x.v[i] = shifted - kShift;
    }
    return x;
}
inline Vec times_power_of_two(Vec x, Vec n) {
    for (int i = 0; i < kLanes; ++i) {
        // Neither a NaN nor what no integer holds may be converted: the maximum of classes behind a NaN is
        // not that of all, and nothing bounds x. The sum is NaN then as well.
        const bool small = n.v[i] >= -127.0f && n.v[i] <= 127.0f;
        const int32_t power = small ? static_cast<int32_t>(n.v[i]) : 0;
        const uint32_t bits = static_cast<uint32_t>(power + 127) << 23;
        float scale;
        std::memcpy(&scale, &bits, sizeof(scale));
        x.v[i] *= scale;
    }
    return x;
}
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
    for (int i = 0; i < kLanes; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &x.v[i], sizeof(bits));
        const int32_t power = static_cast<int32_t>(bits - 0x3f400000u) >> 23;
        bits -= static_cast<uint32_t>(power) << 23;
        exponent->v[i] = static_cast<float>(power);
        std::memcpy(&mantissa->v[i], &bits, sizeof(bits));
    }
}

#endif

// e^x for x <= 88; below -87.3, where it is not normal, 0 or at most 2^-126. NaN stays NaN.
inline Vec exp(Vec x) {
    x = max(set1(-87.9f), x);
    const Vec n = nearest(x * set1(1.44269504f));
    const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return times_power_of_two(fma(p, r * r, r) + set1(1.0f), n);
}

// ln x for positive normal x; whatever else is kept finite or NaN as it comes, NaN stays NaN.
inline Vec log(Vec x) {
    Vec mantissa, n;
    split(x, &mantissa, &n);
    const Vec r = mantissa - set1(1.0f);
    const Vec square = r * r;
    Vec p = set1(7.0376836292e-2f);
    p = fma(p, r, set1(-1.1514610310e-1f));
    p = fma(p, r, set1(1.1676998740e-1f));
    p = fma(p, r, set1(-1.2420140846e-1f));
    p = fma(p, r, set1(1.4249322787e-1f));
    p = fma(p, r, set1(-1.6668057665e-1f));
    p = fma(p, r, set1(2.0000714765e-1f));
    p = fma(p, r, set1(-2.4999993993e-1f));
    p = fma(p, r, set1(3.3333331174e-1f));
    const Vec low = fma(n, set1(-2.12194440e-4f), fma(square, set1(-0.5f), p * square * r));
    return fma(n, set1(0.693359375f), r + low) + (x - x);
}

}  // namespace

// What label_rows.h needs of each instruction set: values picked by index, the race of classes, labels
// stored.
#pragma once

#include <cstdint>

#include "vec.h"

namespace {

#if defined(__AVX512F__)

struct Index {
    __m512i v;
};
inline Index load_index(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
// row[index]; near: indices below kLanes of what `load_near(row)` gave
inline Vec load_near(const float* row) {
    Vec x = load(row);
#ifdef __GNUC__
    // Else GCC loads once for each permutation, and most of these loads cross a cache line.
    __asm__("" : "+v"(x.v));
#endif
    return x;
}
inline Vec pick(Vec near, Index index) { return {_mm512_permutexvar_ps(index.v, near.v)}; }
inline Vec pick(const float* row, Index index) {
    return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, index.v, row, 4)};
}
// The first of the largest; NaN is above all numbers, and seen only where kWild.
template <bool kWild>
inline void challenge(Vec x, Vec label, Vec* best, Vec* winner) {
    __mmask16 larger = _mm512_cmp_ps_mask(x.v, best->v, kWild ? _CMP_NLE_UQ : _CMP_GT_OQ);
    if (kWild) larger &= _mm512_cmp_ps_mask(best->v, best->v, _CMP_ORD_Q);
    best->v = kWild ? _mm512_mask_mov_ps(best->v, larger, x.v) : _mm512_max_ps(x.v, best->v);
    winner->v = _mm512_mask_mov_ps(winner->v, larger, label.v);
}
inline void store_labels(int32_t* to, Vec winner) { _mm512_storeu_si512(to, _mm512_cvttps_epi32(winner.v)); }
inline void store_labels(uint8_t* to, Vec winner) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(winner.v)));
}

#elif defined(__AVX2__)

struct Index {
    __m256i v;
};
inline Index load_index(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Vec load_near(const float* row) { return load(row); }
inline Vec pick(Vec near, Index index) { return {_mm256_permutevar8x32_ps(near.v, index.v)}; }
inline Vec pick(const float* row, Index index) { return {_mm256_i32gather_ps(row, index.v, 4)}; }
template <bool kWild>
inline void challenge(Vec x, Vec label, Vec* best, Vec* winner) {
    __m256 larger = _mm256_cmp_ps(x.v, best->v, kWild ? _CMP_NLE_UQ : _CMP_GT_OQ);
    if (kWild) larger = _mm256_and_ps(larger, _mm256_cmp_ps(best->v, best->v, _CMP_ORD_Q));
    best->v = _mm256_blendv_ps(best->v, x.v, larger);
    winner->v = _mm256_blendv_ps(winner->v, label.v, larger);
}

#else

struct Index {
    const int32_t* v;
};
inline Index load_index(const int32_t* p) { return {p}; }
inline const float* load_near(const float* row) { return row; }
inline Vec pick(const float* row, Index index) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = row[index.v[i]];
    return r;
}
template <bool kWild>
inline void challenge(Vec x, Vec label, Vec* best, Vec* winner) {
    for (int i = 0; i < kLanes; ++i) {
        const bool larger = kWild ? !(x.v[i] <= best->v[i]) && best->v[i] == best->v[i] : x.v[i] > best->v[i];
        best->v[i] = larger ? x.v[i] : best->v[i];
        winner->v[i] = larger ? label.v[i] : winner->v[i];
    }
}

#endif

#ifndef __AVX512F__
template <class Label>
inline void store_labels(Label* to, Vec winner) {
    float labels[kLanes];
    store(labels, winner);
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<Label>(labels[i]);
}
#endif

}  // namespace

// Counting two label maps into private tables: what confusion_matrix and upsample_confusion_matrix share.
//
// Label maps are made of runs, so a block whose pixels are all alike costs one addition. In a mixed block the
// bins are computed with vector instructions and counted one by one in turn over several tables: one table
// alone would stall on its own last store wherever neighbours are equal. A count is a store to an address of
// its own, of which a Zen 4 core does one a cycle (.27 ns measured): what is left to save is all around it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../confusion_matrix.h"
#include "prefetch.h"
#include "vec.h"

namespace {

constexpr int kBlock = 64;        // pixels
constexpr int64_t kAhead = 4096;  // bytes
constexpr int kTables = 4;
constexpr int kFewRuns = 20;  // in a block: from there on single pixels are faster

// The counting of a mixed block fills the reorder buffer, so that no load of the next one would start early.
template <class T>
void prefetch_block(const T* block) {
    for (size_t i = 0; i < kBlock * sizeof(T); i += 64) prefetch(block, kAhead + static_cast<int64_t>(i));
}

template <class P, class T>
bool uniform(const P* prediction, const T* target) {
    const P p = prediction[0];
    const T t = target[0];
    P other_p = 0;
    T other_t = 0;
    for (int i = 0; i < kBlock; ++i) {
        other_p = static_cast<P>(other_p | (prediction[i] ^ p));
        other_t = static_cast<T>(other_t | (target[i] ^ t));
    }
    return other_p == 0 && other_t == 0;
}

#ifdef __AVX2__
// Bit j is set where a run ends: where bin[j + 1] differs, and always at the last pixel. Neighbours are
// brought together in registers: a load that spans two fresh stores would wait until all stores before it,
// the counts of the last block, have left the store queue.
uint64_t run_ends(const uint32_t* bin) {
    uint64_t ends = 0;
#ifdef __AVX512F__
    __m512i here = _mm512_loadu_si512(bin);
    for (int j = 0; j < kBlock; j += 16) {
        const __m512i next = j + 16 < kBlock ? _mm512_loadu_si512(bin + j + 16) : here;
        const __m512i shifted = _mm512_maskz_alignr_epi32(0xffff, next, here, 1);
        ends |= static_cast<uint64_t>(_mm512_cmpneq_epi32_mask(here, shifted)) << j;
        here = next;
    }
#else
    const __m256i rotation = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0);
    __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bin));
    __m256i rotated = _mm256_permutevar8x32_epi32(here, rotation);
    for (int j = 0; j < kBlock; j += 8) {
        const int ahead = j + 8 < kBlock ? j + 8 : j;
        const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bin + ahead));
        const __m256i next_rotated = _mm256_permutevar8x32_epi32(next, rotation);
        const __m256i shifted = _mm256_blend_epi32(rotated, next_rotated, 0x80);
        const int equal = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(here, shifted)));
        ends |= static_cast<uint64_t>(static_cast<uint8_t>(~equal)) << j;
        here = next;
        rotated = next_rotated;
    }
#endif
    return ends | uint64_t{1} << (kBlock - 1);
}
#endif

#ifdef __AVX512F__
// Labels as unsigned 16-bit numbers, 32 of them. Those that do not fit turn into the largest; negative ones
// turn into numbers above 255.
inline __m512i load_labels(const uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i load_labels(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i load_labels(const int16_t* p) { return _mm512_loadu_si512(p); }
inline __m256i load_half(const int32_t* p) { return _mm512_cvtusepi32_epi16(_mm512_loadu_si512(p)); }
inline __m256i load_half(const int64_t* p) {
    const __m128i low = _mm512_cvtusepi64_epi16(_mm512_loadu_si512(p));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm512_cvtusepi64_epi16(_mm512_loadu_si512(p + 8)), 1);
}
template <class T>
inline __m512i load_labels(const T* p) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_half(p)), load_half(p + 16), 1);
}

// Whether all bins fit into 16 bits and no other label becomes what the one to ignore becomes.
template <class T>
bool fits_short_bins(uint32_t classes, bool has_ignore, T ignore) {
    return classes <= 255 && (!has_ignore || sizeof(T) <= 2 || (ignore >= 0 && ignore < UINT16_MAX));
}

// confusion_bin of kBlock pixels
template <class P, class T>
void find_bins(const P* prediction, const T* target, uint32_t classes, bool has_ignore, T ignore,
               uint16_t* bin) {
    const __m512i k = _mm512_set1_epi16(static_cast<short>(classes));
    const __m512i out = _mm512_set1_epi16(static_cast<short>(classes * classes));
    const __m512i skipped = _mm512_set1_epi16(static_cast<short>(classes * classes + 1));
    const __m512i skip = _mm512_set1_epi16(static_cast<short>(ignore));
    const __mmask32 may_skip = has_ignore ? ~__mmask32{0} : __mmask32{0};
    for (int j = 0; j < kBlock; j += 32) {
        const __m512i p = load_labels(prediction + j), t = load_labels(target + j);
        const __mmask32 inside = _mm512_cmplt_epu16_mask(_mm512_max_epu16(p, t), k);
        const __m512i counted = _mm512_mask_add_epi16(out, inside, _mm512_mullo_epi16(t, k), p);
        const __mmask32 ignored = _mm512_mask_cmpeq_epu16_mask(may_skip, t, skip);
        _mm512_storeu_si512(bin + j, _mm512_mask_mov_epi16(counted, ignored, skipped));
    }
}

uint64_t run_ends(const uint16_t* bin) {
    const __m512i low = _mm512_loadu_si512(bin), high = _mm512_loadu_si512(bin + 32);
    const auto ends = [](__m512i here, __m512i next) -> uint64_t {
        // The first word of the next 128 bits is the last neighbour in each of them.
        const __m512i shifted = _mm512_alignr_epi8(_mm512_alignr_epi64(next, here, 2), here, 2);
        return _mm512_cmpneq_epu16_mask(here, shifted);
    };
    return ends(low, high) | ends(high, high) << 32 | uint64_t{1} << (kBlock - 1);
}
#endif

// bin: (kBlock)
template <class Bin>
void count_mixed(const Bin* bin, int64_t* const* table) {
#ifdef __AVX2__
    uint64_t ends = run_ends(bin);
    if (__builtin_popcountll(ends) < kFewRuns) {
        for (int begin = 0; ends != 0; ends &= ends - 1) {
            const int last = __builtin_ctzll(ends);
            table[0][bin[last]] += last + 1 - begin;
            begin = last + 1;
        }
        return;
    }
#endif
    for (int j = 0; j < kBlock; j += kTables)
        for (int i = 0; i < kTables; ++i) ++table[i][bin[j + i]];
}

// table: kTables of (K*K + 2), which may be one and the same
template <class P, class T>
void count_pixels(const P* prediction, const T* target, int64_t pixels, uint32_t classes, bool has_ignore,
                  T ignore, int64_t* const* table) {
#ifdef __AVX512F__
    const bool few = fits_short_bins(classes, has_ignore, ignore);
#endif
    int64_t i = 0;
    for (; i + kBlock <= pixels; i += kBlock) {
        const int64_t last = i + kBlock - 1;
        if (prediction[i] == prediction[last] && target[i] == target[last] &&
            uniform(prediction + i, target + i)) {
            table[0][confusion_bin(prediction[i], target[i], classes, has_ignore, ignore)] += kBlock;
            continue;
        }
        prefetch_block(prediction + i);
        prefetch_block(target + i);
#ifdef __AVX512F__
        if (few) {
            uint16_t bin[kBlock];
            find_bins(prediction + i, target + i, classes, has_ignore, ignore, bin);
            count_mixed(bin, table);
            continue;
        }
#endif
        uint32_t bin[kBlock];
        for (int j = 0; j < kBlock; ++j)
            bin[j] = confusion_bin(prediction[i + j], target[i + j], classes, has_ignore, ignore);
        count_mixed(bin, table);
    }
    for (; i < pixels; ++i) ++table[0][confusion_bin(prediction[i], target[i], classes, has_ignore, ignore)];
}

}  // namespace

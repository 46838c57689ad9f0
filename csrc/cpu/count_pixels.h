// Counting two label maps into private tables: what confusion_matrix and upsample_confusion_matrix share.
//
// Label maps are made of runs, so a block whose pixels are all alike costs one addition. In a mixed block the
// bins are computed with vector instructions and counted one by one in turn over several tables: one table
// alone would stall on its own last store wherever neighbours are equal.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../confusion_matrix.h"
#include "vec.h"

namespace {

constexpr int kBlock = 64;  // pixels
constexpr int kAhead = 4 * kBlock;
constexpr int kTables = 4;
constexpr int kFewRuns = 20;  // in a block: from there on single pixels are faster

// The counting of a mixed block fills the reorder buffer, so that no load of the next one would start early.
template <class T>
void prefetch(const T* block) {
#ifdef __GNUC__
    const char* line = reinterpret_cast<const char*>(block);
    for (size_t i = 0; i < kBlock * sizeof(T); i += 64) __builtin_prefetch(line + i);
#endif
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

// bin: (kBlock)
void count_mixed(const uint32_t* bin, int64_t* const* table) {
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
    int64_t i = 0;
    for (; i + kBlock <= pixels; i += kBlock) {
        const int64_t last = i + kBlock - 1;
        if (prediction[i] == prediction[last] && target[i] == target[last] &&
            uniform(prediction + i, target + i)) {
            table[0][confusion_bin(prediction[i], target[i], classes, has_ignore, ignore)] += kBlock;
            continue;
        }
        prefetch(prediction + i + kAhead);
        prefetch(target + i + kAhead);
        uint32_t bin[kBlock];
        for (int j = 0; j < kBlock; ++j)
            bin[j] = confusion_bin(prediction[i + j], target[i + j], classes, has_ignore, ignore);
        count_mixed(bin, table);
    }
    for (; i < pixels; ++i) ++table[0][confusion_bin(prediction[i], target[i], classes, has_ignore, ignore)];
}

}  // namespace

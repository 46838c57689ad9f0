// Confusion matrix of two label maps: one reading of both, private tables per thread where they are small.
//
// Label maps are made of runs, so a block whose pixels are all alike costs one addition. In a mixed block the
// bins are computed with vector instructions and counted one by one in turn over several tables: one table
// alone would stall on its own last store wherever neighbours are equal.
//
// Compiled once per instruction set into the namespace ISA. Everything else has internal linkage and no
// inline function of the standard library is used: the linker would keep one copy for all instruction sets.

#include <cstdlib>

#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kBlock = 64;                     // pixels
constexpr int64_t kPixelsPerThread = 1 << 15;  // less is not worth waking a thread
constexpr int kAhead = 4 * kBlock;
constexpr int kTables = 4;
constexpr int kFewRuns = 20;                 // in a block: from there on single pixels are faster
constexpr int64_t kLargestTables = 1 << 18;  // bytes: more than that leaves the second-level cache
constexpr int64_t kPrivateTables = 1 << 26;  // bytes, of all threads together

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
// Bit j is set where a run ends: where bin[j + 1] differs, and always at the last pixel.
uint64_t run_ends(const uint32_t* bin) {
    uint64_t ends = 0;
#ifdef __AVX512F__
    for (int j = 0; j < kBlock; j += 16) {
        const __mmask16 differs =
            _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(bin + j), _mm512_loadu_si512(bin + j + 1));
        ends |= static_cast<uint64_t>(differs) << j;
    }
#else
    for (int j = 0; j < kBlock; j += 8) {
        const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bin + j));
        const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bin + j + 1));
        const int equal = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(here, next)));
        ends |= static_cast<uint64_t>(static_cast<uint8_t>(~equal)) << j;
    }
#endif
    return ends | uint64_t{1} << (kBlock - 1);
}
#endif

// bin: (kBlock + 1), of which the last only has to be readable
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

// One pixel after another into (K, K) counts that have no bins for pixels out of range or ignored.
template <class P, class T>
void count_straight(const ConfusionArgs& args, int64_t begin, int64_t end, uint32_t classes, bool has_ignore,
                    T ignore) {
    const P* prediction = static_cast<const P*>(args.prediction.data);
    const T* target = static_cast<const T*>(args.target.data);
    const uint32_t out = classes * classes;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t bin = confusion_bin(prediction[i], target[i], classes, has_ignore, ignore);
        if (bin < out)
            ++args.counts[bin];
        else if (bin == out)
            ++*args.out_of_range;
    }
}

// tables: (count, K*K + 2), or null: straight into args
template <class P, class T>
void count(const ConfusionArgs& args, int64_t begin, int64_t end, int64_t* tables, int table_count) {
    const P* prediction = static_cast<const P*>(args.prediction.data);
    const T* target = static_cast<const T*>(args.target.data);
    const uint32_t classes = static_cast<uint32_t>(args.num_classes);
    const int64_t bins = int64_t{classes} * classes + 2;
    const bool has_ignore = args.has_ignore && holds<T>(args.ignore_index);
    const T ignore = static_cast<T>(args.ignore_index);
    if (tables == nullptr) return count_straight<P, T>(args, begin, end, classes, has_ignore, ignore);
    int64_t* table[kTables];
    for (int i = 0; i < kTables; ++i) table[i] = tables + (i % table_count) * bins;

    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) {
        const int64_t last = i + kBlock - 1;
        if (prediction[i] == prediction[last] && target[i] == target[last] &&
            uniform(prediction + i, target + i)) {
            table[0][confusion_bin(prediction[i], target[i], classes, has_ignore, ignore)] += kBlock;
            continue;
        }
        prefetch(prediction + i + kAhead);
        prefetch(target + i + kAhead);
        uint32_t bin[kBlock + 1];
        bin[kBlock] = 0;
        for (int j = 0; j < kBlock; ++j)
            bin[j] = confusion_bin(prediction[i + j], target[i + j], classes, has_ignore, ignore);
        count_mixed(bin, table);
    }
    for (; i < end; ++i) ++table[0][confusion_bin(prediction[i], target[i], classes, has_ignore, ignore)];
}

using Count = void(const ConfusionArgs&, int64_t, int64_t, int64_t*, int);

template <class P>
Count* for_target(LabelType target) {
    switch (target) {
        case LabelType::u8:
            return count<P, uint8_t>;
        case LabelType::i8:
            return count<P, int8_t>;
        case LabelType::i16:
            return count<P, int16_t>;
        case LabelType::i32:
            return count<P, int32_t>;
        case LabelType::i64:
            return count<P, int64_t>;
    }
    return nullptr;
}

Count* for_types(LabelType prediction, LabelType target) {
    switch (prediction) {
        case LabelType::u8:
            return for_target<uint8_t>(target);
        case LabelType::i8:
            return for_target<int8_t>(target);
        case LabelType::i16:
            return for_target<int16_t>(target);
        case LabelType::i32:
            return for_target<int32_t>(target);
        case LabelType::i64:
            return for_target<int64_t>(target);
    }
    return nullptr;
}

}  // namespace

namespace ISA {

bool confusion_matrix(const ConfusionArgs& args, int threads) {
    const int64_t classes = args.num_classes;
    const int64_t bins = classes * classes + 2;
    Count* const run = for_types(args.prediction.type, args.target.type);
    // Several tables pay only where they stay in cache and there are pixels enough to fill them.
    const bool several = bins * kTables * 8 <= kLargestTables && bins * kTables <= args.pixels;
    const int table_count = several ? kTables : 1;
    const int64_t size = bins * table_count;
    const int64_t affordable = kPrivateTables / (size * 8);
    if (affordable < 2) {
        run(args, 0, args.pixels, nullptr, 0);
        return true;
    }
    const int64_t useful = args.pixels / kPixelsPerThread + 1;
    const int64_t most = useful < affordable ? useful : affordable;
    const int teams = static_cast<int>(threads < most ? threads : most);
    int64_t* tables = static_cast<int64_t*>(std::calloc(static_cast<size_t>(size * teams), sizeof(int64_t)));
    if (tables == nullptr) return false;
        // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        const int64_t begin = args.pixels * team / teams / kBlock * kBlock;
        const int64_t end =
            team + 1 == teams ? args.pixels : args.pixels * (team + 1) / teams / kBlock * kBlock;
        run(args, begin, end, tables + size * team, table_count);
    }
    for (int table = 0; table < table_count * teams; ++table) {
        const int64_t* from = tables + bins * table;
        for (int64_t bin = 0; bin < bins - 2; ++bin) args.counts[bin] += from[bin];
        *args.out_of_range += from[bins - 2];
    }
    std::free(tables);
    return true;
}

}  // namespace ISA

// Confusion matrix of two label maps: one reading of both, private tables per thread where they are small.
//
// Compiled once per instruction set into the namespace ISA. Everything else has internal linkage and no
// inline function of the standard library is used: the linker would keep one copy for all instruction sets.

#include "confusion_matrix.h"

#include <cstdlib>

#include "count_pixels.h"

namespace {

constexpr int64_t kPixelsPerThread = 1 << 15;  // less is not worth waking a thread
constexpr int64_t kLargestTables = 1 << 18;    // bytes: more than that leaves the second-level cache
constexpr int64_t kPrivateTables = 1 << 26;    // bytes, of all threads together

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

    count_pixels(prediction + begin, target + begin, end - begin, classes, has_ignore, ignore, table);
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

// The k-th largest of some floats in three readings of them, each by private tables of counts.
//
// The bins of a block are computed with vector instructions and counted one by one in turn over several
// tables: one table alone would stall on its own last store wherever neighbours are alike, as ignored pixels
// are. After the first reading most blocks hold no value that is still in question.

#include "kth_largest.h"

#include <cstdlib>
#include <cstring>

namespace {

constexpr int kBlock = 64;  // values
constexpr int kTables = 4;
constexpr int64_t kTable = kBins + 1;          // the last bin: values that are out of the question
constexpr int64_t kValuesPerThread = 1 << 15;  // less is not worth waking a thread

struct Digit {
    int shift;
    uint32_t before, prefix;
};

// Returns whether any of the values is still in question.
inline bool find_bins(const float* x, int count, const Digit& digit, uint32_t* bin) {
    uint32_t least = kBins;
    for (int i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        bin[i] = digit_bin(ordered(bits), digit.shift, digit.before, digit.prefix);
        least = bin[i] < least ? bin[i] : least;
    }
    return least < kBins;
}

// tables: (kTables, kTable)
void count_digit(const float* x, int64_t size, const Digit& digit, int64_t* tables) {
    uint32_t bin[kBlock];
    for (; size >= kBlock; x += kBlock, size -= kBlock) {
        if (!find_bins(x, kBlock, digit, bin)) continue;
        for (int i = 0; i < kBlock; i += kTables)
            for (int table = 0; table < kTables; ++table) ++tables[table * kTable + bin[i + table]];
    }
    find_bins(x, static_cast<int>(size), digit, bin);
    for (int i = 0; i < size; ++i) ++tables[bin[i]];
}

// Adds to `place` the digit that follows from counts (kBins).
void descend(const int64_t* counts, int digit, Place* place) {
    if (digit == 0 && counts[kBins - 1] > 0) place->rank = 1;  // the NaN
    uint32_t bin = kBins - 1;
    while (counts[bin] < place->rank) place->rank -= counts[bin--];
    place->prefix |= bin << shift_of(digit);
}

}  // namespace

namespace ISA {

bool kth_largest(const KthLargestArgs& args, int threads) {
    const int64_t useful = args.size / kValuesPerThread + 1;
    const int teams = static_cast<int>(threads < useful ? threads : useful);
    const size_t bytes = static_cast<size_t>(kTables * kTable * teams) * sizeof(int64_t);
    int64_t* const tables = static_cast<int64_t*>(std::malloc(bytes));
    if (tables == nullptr) return false;
    Place place = {0, args.k};
    for (int i = 0; i < kDigits; ++i) {
        const Digit digit = {shift_of(i), bits_before(i), place.prefix};
        std::memset(tables, 0, bytes);
        // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
        for (int team = 0; team < teams; ++team) {
            const int64_t begin = args.size * team / teams, end = args.size * (team + 1) / teams;
            count_digit(args.x + begin, end - begin, digit, tables + kTables * kTable * team);
        }
        for (int table = 1; table < kTables * teams; ++table)
            for (int bin = 0; bin < kBins; ++bin) tables[bin] += tables[table * kTable + bin];
        descend(tables, i, &place);
    }
    std::free(tables);
    const uint32_t bits = float_bits(place.prefix);
    std::memcpy(args.value, &bits, sizeof(bits));
    return true;
}

}  // namespace ISA

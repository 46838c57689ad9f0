// Confusion matrix of bilinearly upsampled logits: label_rows.h with each row counted while it is in cache.
//
// Compiled once per instruction set into the namespace ISA; see confusion_matrix.cpp.

#include "upsample_confusion_matrix.h"

#include "count_pixels.h"
#include "label_rows.h"

namespace {

constexpr int64_t kLargestTables = 1 << 18;  // bytes: more than that leaves the second-level cache
constexpr int64_t kPrivateTables = 1 << 26;  // bytes, of all threads together

// One row of the target at `pixel`; labels: (width).
template <class Target>
void count_row(const UpsampleConfusionArgs& args, const int32_t* labels, int64_t pixel,
               int64_t* const* tables) {
    const Target* target = static_cast<const Target*>(args.target.data) + pixel;
    const bool has_ignore = args.has_ignore && holds<Target>(args.ignore_index);
    count_pixels(labels, target, args.upsample.width, static_cast<uint32_t>(args.upsample.logits.classes),
                 has_ignore, static_cast<Target>(args.ignore_index), tables);
}

using CountRow = void(const UpsampleConfusionArgs&, const int32_t*, int64_t, int64_t* const*);

CountRow* for_target(LabelType target) {
    switch (target) {
        case LabelType::u8:
            return count_row<uint8_t>;
        case LabelType::i8:
            return count_row<int8_t>;
        case LabelType::i16:
            return count_row<int16_t>;
        case LabelType::i32:
            return count_row<int32_t>;
        case LabelType::i64:
            return count_row<int64_t>;
    }
    return nullptr;
}

// What all threads work in; whether it could be had shows in `there`.
struct Workspace {
    Taps* taps;
    float* rows;      // zero
    int32_t* labels;  // (width) for each thread
    int64_t* tables;  // zero
    bool there;
};

Workspace allocate(int64_t taps, int64_t rows, int64_t labels, int64_t tables) {
    Workspace space;
    space.taps = static_cast<Taps*>(std::malloc(sizeof(Taps) * static_cast<size_t>(taps)));
    space.rows = static_cast<float*>(std::calloc(static_cast<size_t>(rows), sizeof(float)));
    space.labels = static_cast<int32_t*>(std::malloc(sizeof(int32_t) * static_cast<size_t>(labels)));
    space.tables = static_cast<int64_t*>(std::calloc(static_cast<size_t>(tables), sizeof(int64_t)));
    space.there =
        space.taps != nullptr && space.rows != nullptr && space.labels != nullptr && space.tables != nullptr;
    return space;
}

void release(const Workspace& space) {
    std::free(space.tables);
    std::free(space.labels);
    std::free(space.rows);
    std::free(space.taps);
}

void add_up(const UpsampleConfusionArgs& args, const int64_t* tables, int64_t count, int64_t bins) {
    for (int64_t table = 0; table < count; ++table, tables += bins) {
        for (int64_t bin = 0; bin < bins - 2; ++bin) args.counts[bin] += tables[bin];
        *args.out_of_range += tables[bins - 2];
    }
}

template <class T>
bool run(const UpsampleConfusionArgs& args, int threads) {
    using Rows = LabelRows<T, int32_t>;
    const UpsampleArgmaxArgs& upsample = args.upsample;
    const int64_t bins = upsample.logits.classes * upsample.logits.classes + 2;
    const int table_count = bins * kTables * 8 <= kLargestTables ? kTables : 1;
    const int64_t affordable = kPrivateTables / (bins * table_count * 8);
    int teams = useful_teams(upsample, threads);
    if (teams > affordable) teams = affordable > 1 ? static_cast<int>(affordable) : 1;

    const int64_t floats = Rows::floats(upsample);
    const int64_t width = upsample.width;
    const Workspace space =
        allocate(Rows::groups(upsample), floats * teams, width * teams, bins * table_count * teams);
    if (space.there) {
        const bool near = column_taps(upsample, space.taps);
        const int64_t rows = upsample.logits.batch * upsample.height;
        CountRow* const count = for_target(args.target.type);
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
        for (int team = 0; team < teams; ++team) {
            Rows source(upsample, space.taps, near, space.rows + floats * team);
            int32_t* const labels = space.labels + width * team;
            int64_t* tables[kTables];
            for (int t = 0; t < kTables; ++t)
                tables[t] = space.tables + bins * (int64_t{table_count} * team + t % table_count);
            for (int64_t row = rows * team / teams; row < rows * (team + 1) / teams; ++row) {
                source.row(row / upsample.height, row % upsample.height, labels);
                count(args, labels, row * width, tables);
            }
        }
        add_up(args, space.tables, int64_t{table_count} * teams, bins);
    }
    release(space);
    return space.there;
}

}  // namespace

namespace ISA {

bool upsample_confusion_matrix(const UpsampleConfusionArgs& args, int threads) {
    return args.upsample.logits.type == DType::bf16 ? run<bf16>(args, threads) : run<float>(args, threads);
}

}  // namespace ISA

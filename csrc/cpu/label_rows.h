// Rows of the label map of bilinearly upsampled logits, one after another: what upsample_argmax writes and
// upsample_confusion_matrix counts.
//
// The two source rows of an output row are kept transposed to (classes, columns) in fp32, so that
// neighbouring output columns are neighbouring lanes: per class a load, two permutations by indices that are
// the same for all rows, a lerp and a compare.
//
// Where one class wins at every source pixel that `kLanes` output pixels are made of, it wins at each of them
// and nothing is computed: the weights are positive and rounding is monotone, so no other class can be
// rounded above it. (It can be rounded to the same value; the class returned is then the one that wins in
// exact arithmetic.) Pixels that hold NaN, Inf or values near overflow are `wild`: never skipped, and
// compared as torch.argmax does.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../bilinear.h"
#include "label_lanes.h"
#include "transpose.h"
#include "upsample_argmax.h"
#include "vec.h"

namespace {

constexpr int64_t kLineFloats = 16;

// Where kLanes neighbouring output columns come from.
struct Taps {
    int64_t first, last;                // source columns
    int32_t low[kLanes], high[kLanes];  // from `first`
    float low_weight[kLanes], high_weight[kLanes];
};

// taps: (ceil(width / kLanes)). Whether each group reads no more than kLanes source columns.
[[maybe_unused]] bool column_taps(const UpsampleArgmaxArgs& args, Taps* taps) {
    const int64_t source = args.logits.width;
    const float scale = bilinear_scale(source, args.width, args.align_corners);
    bool near = true;
    for (int64_t begin = 0; begin < args.width; begin += kLanes, ++taps) {
        for (int i = 0; i < kLanes; ++i) {
            const int64_t column = begin + i < args.width ? begin + i : args.width - 1;
            const BilinearTap tap = bilinear_tap(column, source, args.width, scale, args.align_corners);
            if (i == 0) taps->first = tap.low;
            taps->last = tap.high;
            taps->low[i] = static_cast<int32_t>(tap.low - taps->first);
            taps->high[i] = static_cast<int32_t>(tap.high - taps->first);
            taps->low_weight[i] = 1.0f - tap.weight;
            taps->high_weight[i] = tap.weight;
        }
        near &= taps->last - taps->first < kLanes;
    }
    return near;
}

// One source row as (classes, step) fp32, and the class that wins at each of its pixels, NaN where wild.
struct SourceRow {
    int64_t image, row;
    float* values;
    float* winners;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats from one class to the next: room for a vector from any column on, and an odd number of cache lines,
// so that the classes of one column do not all fall into the same few sets of the cache.
inline int64_t class_step(int64_t width) {
    const int64_t lines = round_up(width, kLineFloats) / kLineFloats + 1;
    return (lines + 1 - lines % 2) * kLineFloats;
}

// (width, classes) to (classes, step)
template <class T>
void read_interleaved(const T* from, const LogitsMap& logits, int64_t step, float* to) {
    for (int64_t column = 0; column < logits.width; column += 16) {
        const int64_t left = logits.width - column;
        const int columns = static_cast<int>(left < 16 ? left : 16);
        const T* pixels = from + column * logits.column_step;
        for (int64_t k = 0; k < logits.classes; k += 16) {
            const int64_t classes_left = logits.classes - k;
            const int classes = static_cast<int>(classes_left < 16 ? classes_left : 16);
            float* out = to + k * step + column;
#ifdef __AVX512F__
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                const T* pixel = pixels + i * logits.column_step + k;
                r[i] = i < columns ? _mm512_castps_si512(load(pixel, classes).v) : _mm512_setzero_si512();
            }
            transpose(r);
            for (int j = 0; j < classes; ++j) _mm512_storeu_si512(out + j * step, r[j]);
#else
            for (int j = 0; j < classes; ++j)
                for (int i = 0; i < columns; ++i)
                    out[j * step + i] = to_float(pixels[i * logits.column_step + k + j]);
#endif
        }
    }
}

// (classes, width) to (classes, step)
template <class T>
void read_planar(const T* from, const LogitsMap& logits, int64_t step, float* to) {
    for (int64_t k = 0; k < logits.classes; ++k, from += logits.class_step, to += step) {
        int64_t column = 0;
        for (; column + kLanes <= logits.width; column += kLanes) store(to + column, load(from + column));
        if (column < logits.width)
            store(to + column, load(from + column, static_cast<int>(logits.width - column)));
    }
}

[[maybe_unused]] void find_winners(const SourceRow& source, int64_t classes, int64_t width, int64_t step) {
    const Vec large = set1(256.0f);
    const Vec one = set1(1.0f);
    for (int64_t column = 0; column < width; column += kLanes) {
        const float* values = source.values + column;
        Vec best = load(values);
        Vec winner = zero();
        Vec label = zero();
        Vec wild = fma(best * large, zero(), zero());  // Inf * 0 is NaN
        for (int64_t k = 1; k < classes; ++k) {
            values += step;
            label = label + one;
            const Vec x = load(values);
            wild = fma(x * large, zero(), wild);
            challenge<false>(x, label, &best, &winner);
        }
        store(source.winners + column, winner + wild);
    }
}

// kLanes upsampled values of one class; row: at taps.first
struct RowLerp {
    explicit RowLerp(const Taps& taps)
        : low(load_index(taps.low)),
          high(load_index(taps.high)),
          low_weight(load(taps.low_weight)),
          high_weight(load(taps.high_weight)) {}

    template <bool kNear>
    Vec at(const float* row) const {
        if (kNear) return lerp(load_near(row));
        return lerp(row);
    }

    template <class Row>
    Vec lerp(Row row) const {
        return fma(high_weight, pick(row, high), low_weight * pick(row, low));
    }

    Index low, high;
    Vec low_weight, high_weight;
};

// The first class of the largest upsampled value for kLanes columns; row: (classes, step), at taps.first
template <bool kNear, bool kWild>
Vec winner(const float* row, const Taps& taps, int64_t classes, int64_t step) {
    const RowLerp upsampled(taps);
    const Vec one = set1(1.0f);
    Vec best = upsampled.at<kNear>(row);
    Vec first = zero();
    Vec label = zero();
    for (int64_t k = 1; k < classes; ++k) {
        row += step;
        label = label + one;
        challenge<kWild>(upsampled.at<kNear>(row), label, &best, &first);
    }
    return first;
}

// One thread's rows, in order: a source row is read once while the output rows that need it go by.
template <class T, class Label>
class LabelRows {
  public:
    static int64_t floats(const UpsampleArgmaxArgs& args) {
        const int64_t step = class_step(args.logits.width);
        return 3 * args.logits.classes * step + 2 * step + groups(args);
    }
    static int64_t groups(const UpsampleArgmaxArgs& args) { return (args.width + kLanes - 1) / kLanes; }

    // workspace: (floats(args)), zero
    LabelRows(const UpsampleArgmaxArgs& args, const Taps* taps, bool near, float* workspace)
        : args_(args), taps_(taps), near_(near), step_(class_step(args.logits.width)) {
        const int64_t row = args.logits.classes * step_;
        for (int i = 0; i < 2; ++i)
            source_[i] = {-1, -1, workspace + i * row, workspace + 3 * row + i * step_};
        mixed_ = workspace + 2 * row;
        verdicts_ = workspace + 3 * row + 2 * step_;
        scale_ = bilinear_scale(args.logits.height, args.height, args.align_corners);
    }

    // out: (width)
    void row(int64_t image, int64_t y, Label* out) {
        const BilinearTap tap =
            bilinear_tap(y, args_.logits.height, args_.height, scale_, args_.align_corners);
        const bool fresh = read(image, tap.low) | read(image, tap.high);
        const SourceRow& upper = source_[tap.low & 1];
        const SourceRow& lower = source_[tap.high & 1];
        if (fresh || tap.low != low_ || tap.high != high_) judge(upper, lower);
        low_ = tap.low;
        high_ = tap.high;
        int64_t mixed = 0;  // columns from here on are not mixed yet
        for (int64_t group = 0, column = 0; column < args_.width; ++group, column += kLanes) {
            const bool whole = column + kLanes <= args_.width;
            Label part[kLanes];
            Label* to = whole ? out + column : part;
            if (verdicts_[group] >= 0.0f) {
                const Label label = static_cast<Label>(verdicts_[group]);
                for (int i = 0; i < kLanes; ++i) to[i] = label;
            } else {
                const Taps& taps = taps_[group];
                const int64_t needed = taps.first / kLanes * kLanes;
                mixed =
                    mix(upper.values, lower.values, tap.weight, mixed > needed ? mixed : needed, taps.last);
                store_labels(to, compete(taps, verdicts_[group] == kWildGroup));
            }
            if (!whole)
                std::memcpy(out + column, part, sizeof(Label) * static_cast<size_t>(args_.width - column));
        }
    }

  private:
    static constexpr float kMixedGroup = -1.0f;
    static constexpr float kWildGroup = -2.0f;

    // Whether the row had to be read.
    bool read(int64_t image, int64_t row) {
        SourceRow& source = source_[row & 1];
        if (source.image == image && source.row == row) return false;
        source.image = image;
        source.row = row;
        const LogitsMap& logits = args_.logits;
        const T* from =
            static_cast<const T*>(logits.data) + image * logits.image_step + row * logits.row_step;
        if (logits.column_step == 1)
            read_planar(from, logits, step_, source.values);
        else
            read_interleaved(from, logits, step_, source.values);
        find_winners(source, logits.classes, logits.width, step_);
        return true;
    }

    // verdicts: for each group the class that wins everywhere in it, or what has to be computed
    void judge(const SourceRow& upper, const SourceRow& lower) {
        const int64_t count = groups(args_);
        for (int64_t group = 0; group < count; ++group) {
            const float label = upper.winners[taps_[group].first];
            bool same = true;
            bool wild = false;
            for (int64_t c = taps_[group].first; c <= taps_[group].last; ++c) {
                const float a = upper.winners[c];
                const float b = lower.winners[c];
                same &= (a == label) & (b == label);
                wild |= (a != a) | (b != b);
            }
            verdicts_[group] = wild ? kWildGroup : same ? label : kMixedGroup;
        }
    }

    // Lerps vectors of columns between the source rows, from `begin` until `last` is there. Where that ends.
    int64_t mix(const float* upper, const float* lower, float weight, int64_t begin, int64_t last) {
        const Vec upper_weight = set1(1.0f - weight);
        const Vec lower_weight = set1(weight);
        for (; begin <= last; begin += kLanes)
            for (int64_t k = 0, at = begin; k < args_.logits.classes; ++k, at += step_)
                store(mixed_ + at, fma(lower_weight, load(lower + at), upper_weight * load(upper + at)));
        return begin;
    }

    Vec compete(const Taps& taps, bool wild) const {
        const float* row = mixed_ + taps.first;
        const int64_t classes = args_.logits.classes;
        if (near_)
            return wild ? winner<true, true>(row, taps, classes, step_)
                        : winner<true, false>(row, taps, classes, step_);
        return wild ? winner<false, true>(row, taps, classes, step_)
                    : winner<false, false>(row, taps, classes, step_);
    }

    const UpsampleArgmaxArgs& args_;
    const Taps* taps_;
    bool near_;
    int64_t step_;
    float scale_;
    SourceRow source_[2];  // by the parity of the row
    float* mixed_;         // (classes, step): the row between the two
    float* verdicts_;      // (groups)
    int64_t low_ = -1, high_ = -1;
};

constexpr int64_t kValuesPerThread = 1 << 17;  // upsampled ones: less is not worth waking a thread

// Threads worth having for this result.
[[maybe_unused]] int useful_teams(const UpsampleArgmaxArgs& args, int threads) {
    const int64_t rows = args.logits.batch * args.height;
    int64_t most = rows * args.width * args.logits.classes / kValuesPerThread + 1;
    if (most > rows) most = rows;
    if (most < 1) most = 1;
    return static_cast<int>(threads < most ? threads : most);
}

}  // namespace

// What the two directions of upsample_concat share: the taps of an axis, the copy and the number of threads.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../bilinear.h"
#include "upsample_concat.h"
#include "vec.h"

namespace {

constexpr int64_t kBytesPerThread = 1 << 16;  // of the result: less is not worth waking a thread

// The weights of the columns (or rows) `low` and `high` of x in one column (or row) of the result.
struct Tap {
    int64_t low, high;
    float weight_low, weight_high;
};

class Axis {
  public:
    Axis(int64_t source, int64_t output, bool align_corners)
        : source_(source),
          output_(output),
          scale_(bilinear_scale(source, output, align_corners)),
          align_corners_(align_corners) {}

    Tap at(int64_t position) const {
        const BilinearTap tap = bilinear_tap(position, source_, output_, scale_, align_corners_);
        return {tap.low, tap.high, 1.0f - tap.weight, tap.weight};
    }

    // (output) taps to be freed by the caller, or null
    Tap* table() const {
        Tap* taps = static_cast<Tap*>(std::malloc(sizeof(Tap) * static_cast<size_t>(output_)));
        for (int64_t i = 0; taps != nullptr && i < output_; ++i) taps[i] = at(i);
        return taps;
    }

    // The first position whose tap reads `row` or a later one.
    int64_t first_reading(int64_t row) const {
        int64_t begin = 0, end = output_;
        while (begin < end) {
            const int64_t middle = begin + (end - begin) / 2;
            if (at(middle).high >= row)
                end = middle;
            else
                begin = middle + 1;
        }
        return begin;
    }

  private:
    int64_t source_, output_;
    float scale_;
    bool align_corners_;
};

int64_t run_end(const Tap* taps, int64_t begin, int64_t size) {
    int64_t end = begin + 1;
    while (end < size && taps[end].low == taps[begin].low) ++end;
    return end;
}

int teams_for(int64_t items, int64_t bytes, int threads) {
    const int64_t useful = bytes / kBytesPerThread + 1;
    int64_t teams = threads < useful ? threads : useful;
    if (teams > items) teams = items;
    return teams < 1 ? 1 : static_cast<int>(teams);
}

// Constant sizes, which become vector moves: a call of memcpy costs more than a pixel's few channels.
void copy(void* to, const void* from, int64_t bytes) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) std::memcpy(out + i, in + i, 64);
    for (; i + 16 <= bytes; i += 16) std::memcpy(out + i, in + i, 16);
    for (; i + 2 <= bytes; i += 2) std::memcpy(out + i, in + i, 2);
}

}  // namespace

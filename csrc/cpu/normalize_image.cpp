// uint8 pixels to the network's input: jitter, blur and normalisation from one reading.
//
// Jitter is a 3 x 3 matrix and an offset for each image, which holds the image's mean grey; that mean takes a
// reading of its own, of integer sums. On interleaved pixels a 3 x 3 matrix is five taps whose weights repeat
// every three lanes, hence every three vectors. The blur is separable: a ring of jittered rows, their
// weighted sum as one row with its border repeated, and the weighted sum of that row shifted by whole pixels.

#include "normalize_image.h"

#include <cstdlib>

#include "vec.h"

namespace {

constexpr int64_t kPixelsPerThread = 1 << 14;  // less is not worth waking a thread
constexpr float kNoWeight = 1e-9f;             // 255 times that is nothing, even 200 times over
constexpr int kPeriod = 3 * kLanes;            // of weights that repeat every three lanes

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A value for each channel, laid out for three vectors of interleaved pixels.
struct Pattern {
    float lane[kPeriod];
};

Pattern repeat(const float* channels) {
    Pattern pattern;
    for (int i = 0; i < kPeriod; ++i) pattern.lane[i] = channels[i % 3];
    return pattern;
}

// What turns a source pixel into a jittered one: matrix row by row as taps at -2 .. 2, and the offset.
struct Jitter {
    bool any;
    Pattern tap[5];
    Pattern offset;
};

Jitter make_jitter(const NormalizeArgs& args, int64_t n, const int64_t* sums) {
    Jitter jitter;
    const float* factors = args.colour == nullptr ? nullptr : args.colour + 3 * n;
    jitter.any = factors != nullptr && (factors[0] != 1.0f || factors[1] != 1.0f || factors[2] != 1.0f);
    if (!jitter.any) return jitter;
    const float brightness = factors[0];
    const float contrast = factors[1];
    const float saturation = factors[2];
    double mean = 0.0;
    if (contrast != 1.0f) {
        for (int c = 0; c < 3; ++c)
            mean += static_cast<double>(args.grey[c]) * static_cast<double>(sums[3 * n + c]);
        mean /= static_cast<double>(args.height) * static_cast<double>(args.width);
    }
    for (int d = -2; d <= 2; ++d) {
        float weights[3];
        for (int c = 0; c < 3; ++c) {
            const int from = c + d;
            weights[c] = 0.0f;
            if (from < 0 || from > 2) continue;
            weights[c] = brightness * contrast * (1.0f - saturation) * args.grey[from];
            if (d == 0) weights[c] += brightness * contrast * saturation;
        }
        jitter.tap[d + 2] = repeat(weights);
    }
    const float offset = brightness * (1.0f - contrast) * static_cast<float>(mean);
    const float offsets[3] = {offset, offset, offset};
    jitter.offset = repeat(offsets);
    return jitter;
}

// Rows are worked on three vectors at a time; what is left, in parts of three.
template <class Body>
[[gnu::always_inline]] inline void for_vectors(int64_t length, const Body& body) {
    int64_t i = 0;
    for (; i + kPeriod <= length; i += kPeriod) {
        body(i, 0, kLanes);
        body(i + kLanes, kLanes, kLanes);
        body(i + 2 * kLanes, 2 * kLanes, kLanes);
    }
    for (int phase = 0; i < length; phase += kLanes, i += kLanes)
        body(i, phase, static_cast<int>(smaller(kLanes, length - i)));
}

template <class T>
inline Vec load_part(const T* from, int lanes) {
    return lanes == kLanes ? load(from) : load(from, lanes);
}

template <class T>
inline void store_part(T* to, Vec x, int lanes) {
    if (lanes == kLanes)
        store(to, x);
    else
        store(to, x, lanes);
}

void widen(const uint8_t* from, int64_t length, float* to) {
    for_vectors(length,
                [=](int64_t i, int, int lanes) { store_part(to + i, load_part(from + i, lanes), lanes); });
}

// x may be read from two floats before it to a vector behind it.
inline Vec jittered(const Jitter& jitter, const float* x, int phase) {
    Vec sum = load(jitter.offset.lane + phase);
    for (int d = 0; d < 5; ++d) sum = fma(load(jitter.tap[d].lane + phase), load(x + d - 2), sum);
    return min(set1(255.0f), max(zero(), sum));
}

void jitter_row(const Jitter& jitter, const float* x, int64_t length, float* to) {
    for_vectors(length, [&](int64_t i, int phase, int lanes) {
        store_part(to + i, jittered(jitter, x + i, phase), lanes);
    });
}

struct Normalisation {
    Pattern factor, bias;
};

template <class T>
void normalise_row(const Normalisation& by, const uint8_t* pixels, int64_t length, T* out) {
    for_vectors(length, [&](int64_t i, int phase, int lanes) {
        const Vec pixel = load_part(pixels + i, lanes);
        store_part(out + i, fma(load(by.factor.lane + phase), pixel, load(by.bias.lane + phase)), lanes);
    });
}

template <class T>
void normalise_jittered_row(const Normalisation& by, const Jitter& jitter, const float* x, int64_t length,
                            T* out) {
    for_vectors(length, [&](int64_t i, int phase, int lanes) {
        const Vec pixel = jittered(jitter, x + i, phase);
        store_part(out + i, fma(load(by.factor.lane + phase), pixel, load(by.bias.lane + phase)), lanes);
    });
}

// Symmetric taps; centre is that of the middle one.
struct Blur {
    const float* centre;
    int64_t radius;
};

Blur make_blur(const NormalizeArgs& args, int64_t n) {
    if (args.taps == nullptr) return {nullptr, 0};
    const float* taps = args.taps + n * (2 * args.radius + 1);
    if (taps[args.radius] == 0.0f) return {nullptr, 0};
    Blur blur = {taps + args.radius, args.radius};
    while (blur.radius > 0 && blur.centre[blur.radius] < kNoWeight) --blur.radius;
    return blur;
}

// (rows, length) of jittered source rows, row r at r % rows.
struct Ring {
    float* memory;
    int64_t rows, length;

    float* row(int64_t r) const { return memory + r % rows * length; }
};

int64_t clamp(int64_t row, int64_t height) { return row < 0 ? 0 : row >= height ? height - 1 : row; }

void blur_down(const Blur& blur, const Ring& ring, int64_t y, int64_t height, int64_t length, float* to) {
    const float* middle = ring.row(y);
    for (int64_t i = 0; i < length; i += kLanes) store(to + i, set1(blur.centre[0]) * load(middle + i));
    for (int64_t k = 1; k <= blur.radius; ++k) {
        const float* above = ring.row(clamp(y - k, height));
        const float* below = ring.row(clamp(y + k, height));
        const Vec weight = set1(blur.centre[k]);
        for (int64_t i = 0; i < length; i += kLanes)
            store(to + i, fma(weight, load(above + i) + load(below + i), load(to + i)));
    }
}

void repeat_border(float* row, int64_t length, int64_t radius) {
    for (int64_t i = 0; i < 3 * radius; ++i) row[length + i] = row[length - 3 + i % 3];
    for (int64_t i = 1; i <= 3 * radius; ++i) row[-i] = row[(3 - i % 3) % 3];
}

template <class T>
void blur_across(const Blur& blur, const Normalisation& by, const float* x, int64_t length, T* out) {
    for_vectors(length, [&](int64_t i, int phase, int lanes) {
        Vec sum = set1(blur.centre[0]) * load(x + i);
        for (int64_t k = 1; k <= blur.radius; ++k)
            sum = fma(set1(blur.centre[k]), load(x + i - 3 * k) + load(x + i + 3 * k), sum);
        store_part(out + i, fma(load(by.factor.lane + phase), sum, load(by.bias.lane + phase)), lanes);
    });
}

// Floats of a row with room on both sides for the border and for whole vectors.
int64_t row_floats(const NormalizeArgs& args) { return 3 * (args.width + 2 * args.radius) + 4 * kPeriod; }

// Rows begin .. end-1 of image n. memory: (2 radius + 3) rows
template <class T>
void normalise_rows(const NormalizeArgs& args, const Normalisation& by, const int64_t* sums, int64_t n,
                    int64_t begin, int64_t end, float* memory) {
    const Jitter jitter = make_jitter(args, n, sums);
    const Blur blur = make_blur(args, n);
    const int64_t length = 3 * args.width;
    const int64_t row = row_floats(args);
    const uint8_t* image = args.images + n * args.image_stride;
    T* const out = static_cast<T*>(args.out) + n * args.height * length;
    float* const wide = memory + kPeriod + 3 * args.radius;
    if (blur.centre == nullptr) {
        for (int64_t y = begin; y < end; ++y) {
            const uint8_t* const pixels = image + y * args.row_stride;
            if (!jitter.any) {
                normalise_row(by, pixels, length, out + y * length);
                continue;
            }
            widen(pixels, length, wide);
            normalise_jittered_row(by, jitter, wide, length, out + y * length);
        }
        return;
    }
    float* const mixed = wide + row;
    const Ring ring = {memory + 2 * row, 2 * blur.radius + 1, row};
    int64_t next = clamp(begin - blur.radius, args.height);
    for (int64_t y = begin; y < end; ++y) {
        for (; next <= clamp(y + blur.radius, args.height); ++next) {
            float* const to = jitter.any ? wide : ring.row(next);
            widen(image + next * args.row_stride, length, to);
            if (jitter.any) jitter_row(jitter, wide, length, ring.row(next));
        }
        blur_down(blur, ring, y, args.height, length, mixed);
        repeat_border(mixed, length, blur.radius);
        blur_across(blur, by, mixed, length, out + y * length);
    }
}

void add_sums(const uint8_t* row, int64_t length, int64_t* sums) {
    constexpr int kStep = 192;  // bytes: whole pixels and whole vectors
    int64_t i = 0;
    while (i + kStep <= length) {
        uint16_t part[kStep] = {};
        for (int block = 0; block < 256 && i + kStep <= length; ++block, i += kStep)
            for (int j = 0; j < kStep; ++j) part[j] = static_cast<uint16_t>(part[j] + row[i + j]);
        uint32_t channel[3] = {};
        for (int j = 0; j < kStep; j += 3)
            for (int c = 0; c < 3; ++c) channel[c] += part[j + c];
        for (int c = 0; c < 3; ++c) sums[c] += channel[c];
    }
    for (; i < length; ++i) sums[i % 3] += row[i];
}

// Whether the jitter of image n asks for its mean grey.
bool wants_mean(const NormalizeArgs& args, int64_t n) {
    return args.colour != nullptr && args.colour[3 * n + 1] != 1.0f;
}

// sums (batch, 3): of each channel, over rows begin .. end-1 of all images one below the other
void sum_rows(const NormalizeArgs& args, int64_t begin, int64_t end, int64_t* sums) {
    for (int64_t y = begin; y < end; ++y) {
        const int64_t n = y / args.height;
        if (!wants_mean(args, n)) continue;
        add_sums(args.images + n * args.image_stride + y % args.height * args.row_stride, 3 * args.width,
                 sums + 3 * n);
    }
}

}  // namespace

namespace ISA {

bool normalize_image(const NormalizeArgs& args, int threads) {
    const int64_t rows = args.batch * args.height;
    const int64_t most = smaller(rows, rows * args.width / kPixelsPerThread + 1);
    const int teams = static_cast<int>(threads < most ? threads : most);
    if (rows == 0 || args.width == 0) return true;
    const int64_t row = row_floats(args);
    const int64_t memory_floats = (args.taps == nullptr ? 1 : 2 * args.radius + 3) * row;
    float* memory =
        static_cast<float*>(std::calloc(static_cast<size_t>(teams * memory_floats), sizeof(float)));
    int64_t* sums =
        static_cast<int64_t*>(std::calloc(static_cast<size_t>(teams * args.batch * 3), sizeof(int64_t)));
    if (memory == nullptr || sums == nullptr) {
        std::free(memory);
        std::free(sums);
        return false;
    }
    bool any_mean = false;
    for (int64_t n = 0; n < args.batch; ++n) any_mean = any_mean || wants_mean(args, n);
    if (any_mean) {
        // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
        for (int team = 0; team < teams; ++team)
            sum_rows(args, rows * team / teams, rows * (team + 1) / teams, sums + team * args.batch * 3);
        for (int team = 1; team < teams; ++team)
            for (int64_t i = 0; i < args.batch * 3; ++i) sums[i] += sums[team * args.batch * 3 + i];
    }
    const Normalisation by = {repeat(args.factor), repeat(args.bias)};
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        const int64_t end = rows * (team + 1) / teams;
        for (int64_t y = rows * team / teams; y < end;) {
            const int64_t n = y / args.height;
            const int64_t stop = smaller(end, (n + 1) * args.height);
            float* const own = memory + team * memory_floats;
            const int64_t first = y - n * args.height;
            const int64_t last = stop - n * args.height;
            if (args.out_type == DType::f32)
                normalise_rows<float>(args, by, sums, n, first, last, own);
            else
                normalise_rows<bf16>(args, by, sums, n, first, last, own);
            y = stop;
        }
    }
    std::free(memory);
    std::free(sums);
    return true;
}

}  // namespace ISA

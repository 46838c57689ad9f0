// Batch norm, residual addition and activation in one pass, its statistics, and the two passes of its
// gradient.
//
// Pixels are taken together into wide rows of `width` = k * channels numbers, so that few or odd channels
// still fill vectors; what is per channel is repeated k times. The pixels left over are one shorter row at
// the end. A pass that follows a reduction of the same tensor walks backwards: its first tiles are still in
// the cache.

#include "batch_norm_act.h"

#include <math.h>

#include <cstdlib>

#include "vec.h"

namespace {

constexpr int64_t kWidest = 4096;               // numbers in a wide row that is not one pixel
constexpr int64_t kNarrowest = 128;             // the loop over a row must be worth its start
constexpr int64_t kTileBytes = 1 << 17;         // of one tensor: sums in fp32 are this long
constexpr int64_t kNumbersPerThread = 1 << 15;  // less is not worth waking a thread
constexpr int kRows = 4;                        // share one loading of what is per channel
constexpr int64_t kFarthest = 1 << 13;     // bytes: the next rows are fetched ahead if they start that near
constexpr int64_t kAhead = 1 << 10;        // bytes: else what follows in the row
constexpr int64_t kStreamBytes = 1 << 24;  // of a result: from there on it goes past the caches

struct Full {};
struct Part {
    int n;
};
template <class T>
inline Vec get(const T* p, Full) {
    return load(p);
}
template <class T>
inline Vec get(const T* p, Part part) {
    return load(p, part.n);
}
template <class T>
inline void put(T* p, Vec x, Full) {
    store(p, x);
}
template <class T>
inline void put(T* p, Vec x, Part part) {
    store(p, x, part.n);
}

template <class T>
inline void put_past_caches(T* p, Vec x, Full) {
    stream(p, x);
}
template <class T>
inline void put_past_caches(T* p, Vec x, Part part) {
    store(p, x, part.n);
}

// Four rows at a time are too short a run for the processor to see where the next reading is. In elements:
template <class T>
inline int64_t distance_ahead(int64_t stride) {
    const int64_t next = kRows * stride, size = static_cast<int64_t>(sizeof(T));
    return next * size <= kFarthest ? next : kAhead / size;
}
template <class T>
inline void fetch(const T* p) {
#ifdef __GNUC__
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

// Bodies capture by value: a vector's store may alias anything, so that what is captured by reference would
// be read again after each.
template <class Body>
inline void across(int64_t width, Body body) {
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) body(c, Full{});
    if (c < width) body(c, Part{static_cast<int>(width - c)});
}

template <int n>
struct Count {
    static constexpr int value = n;
};

template <class Body>
inline void down(int64_t begin, int64_t end, Body body) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) body(row, Count<kRows>{});
    for (; row < end; ++row) body(row, Count<1>{});
}

struct Plan {
    int64_t repeat, width, rows, rest;  // rest: numbers in the shorter row after the last
    int64_t tile;                       // rows
    int teams;
    bool past_caches;  // results are large, and rows of them aligned
};

Plan plan_for(const BatchNormActArgs& args, int threads) {
    const int64_t channels = args.channels;
    const int64_t power = channels & -channels;
    int64_t repeat = power < kLanes ? kLanes / power : 1;
    if (repeat * channels > kWidest) repeat = 1;
    while (repeat * channels < kNarrowest) repeat *= 2;
    const int64_t width = repeat * channels, rows = args.pixels / repeat;
    const int64_t tile = kTileBytes / (width * (args.dtype == DType::f32 ? 4 : 2)) / kRows * kRows;
    const int64_t useful = args.pixels * channels / kNumbersPerThread + 1;
    const int teams = static_cast<int>(threads < useful ? threads : useful);
    const int64_t size = args.dtype == DType::f32 ? 4 : 2;
    const uint64_t places = reinterpret_cast<uintptr_t>(args.result) |
                            reinterpret_cast<uintptr_t>(args.masked) | static_cast<uint64_t>(width * size);
    const bool past_caches = args.pixels * channels * size >= kStreamBytes && places % 64 == 0;
    return {repeat, width,      rows, (args.pixels - rows * repeat) * channels, tile < kRows ? kRows : tile,
            teams,  past_caches};
}

// run(begin, end, width, team) for every tile; the last team also gets the shorter row.
template <class Run>
void each_tile(const Plan& plan, bool backwards, Run run) {
    // A team of one runs in the caller: an OpenMP team in a forked loader process would hang.
    const int teams = plan.teams;
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
    for (int team = 0; team < teams; ++team) {
        const int64_t begin = plan.rows * team / teams, end = plan.rows * (team + 1) / teams;
        const int64_t tiles = (end - begin + plan.tile - 1) / plan.tile;
        if (team + 1 == teams && plan.rest > 0) run(plan.rows, plan.rows + 1, plan.rest, team);
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t from = begin + plan.tile * (backwards ? tiles - 1 - i : i);
            const int64_t to = from + plan.tile < end ? from + plan.tile : end;
            run(from, to, plan.width, team);
        }
        if (plan.past_caches) finish_streaming();
    }
}

// --- statistics: sums over a tile of the distance to its first row and of its square, merged by Chan's
// formula ---

struct Moments {  // of one team: count, mean and squared deviations of each number of a wide row
    double *count, *mean, *squares;
    float *pivot, *sum, *square;
};

void merge(const Moments& to, int64_t rows, int64_t width) {
    const double n = static_cast<double>(rows), over = 1.0 / n;
    for (int64_t c = 0; c < width; ++c) {
        const double sum = static_cast<double>(to.sum[c]);
        const double squares = static_cast<double>(to.square[c]) - sum * sum * over;
        const double total = to.count[c] + n, share = n / total;
        const double delta = static_cast<double>(to.pivot[c]) + sum * over - to.mean[c];
        to.mean[c] += delta * share;
        to.squares[c] += (squares < 0.0 ? 0.0 : squares) + delta * delta * (to.count[c] * share);
        to.count[c] = total;
    }
}

// Where the deviations are taken from: what is known of the mean, or the mean of this first tile.
template <class T>
void choose_pivot(const T* x, int64_t begin, int64_t end, int64_t stride, int64_t width, const Moments& to) {
    if (to.count[width - 1] > 0.0) {  // a shorter row may have counted the first
        for (int64_t c = 0; c < width; ++c) to.pivot[c] = static_cast<float>(to.mean[c]);
        return;
    }
    for (int64_t c = 0; c < width; ++c) to.pivot[c] = 0.0f;
    down(begin, end, [&](int64_t row, auto count) {
        across(width, [=](int64_t c, auto part) {
            Vec sum = get(to.pivot + c, part);
            for (int r = 0; r < count.value; ++r) sum = sum + get(x + (row + r) * stride + c, part);
            put(to.pivot + c, sum, part);
        });
    });
    const float over = 1.0f / static_cast<float>(end - begin);
    for (int64_t c = 0; c < width; ++c) to.pivot[c] *= over;
}

template <class T>
void moments_of_tile(const T* x, int64_t begin, int64_t end, int64_t stride, int64_t width,
                     const Moments& to) {
    const int64_t ahead = distance_ahead<T>(stride);
    choose_pivot(x, begin, end, stride, width, to);
    for (int64_t c = 0; c < width; ++c) to.sum[c] = to.square[c] = 0.0f;
    down(begin, end, [&](int64_t row, auto count) {
        const T* from = x + row * stride;
        across(width, [=](int64_t c, auto part) {
            const Vec pivot = get(to.pivot + c, part);
            Vec sum = get(to.sum + c, part), square = get(to.square + c, part);
            for (int r = 0; r < count.value; ++r) {
                fetch(from + r * stride + c + ahead);
                const Vec d = get(from + r * stride + c, part) - pivot;
                sum = sum + d;
                square = fma(d, d, square);
            }
            put(to.sum + c, sum, part);
            put(to.square + c, square, part);
        });
    });
    merge(to, end - begin, width);
}

// --- per channel values, repeated over a wide row ---

struct Tables {
    float *mean, *scale, *shift;  // z = (x - mean) * scale + shift
    float *slope, *offset;        // grad_x = scale * grad + slope * (x - mean) + offset
};

bool make_tables(const BatchNormActArgs& args, int64_t width, Tables* tables) {
    float* memory = static_cast<float*>(std::malloc(static_cast<size_t>(width) * 5 * sizeof(float)));
    if (memory == nullptr) return false;
    *tables = {memory, memory + width, memory + 2 * width, memory + 3 * width, memory + 4 * width};
    const float over = args.count > 0 ? 1.0f / static_cast<float>(args.count) : 0.0f;
    for (int64_t i = 0; i < width; ++i) {
        if (i >= args.channels) {
            for (int table = 0; table < 5; ++table)
                memory[table * width + i] = memory[table * width + i - args.channels];
            continue;
        }
        const int64_t c = i;
        const float rstd = args.mean ? 1.0f / sqrtf(args.var[c] + args.eps) : 1.0f;
        tables->mean[i] = args.mean ? args.mean[c] : 0.0f;
        tables->scale[i] = args.weight[c] * rstd;
        tables->shift[i] = args.bias ? args.bias[c] : 0.0f;
        const float scale = tables->scale[i];
        tables->slope[i] = args.sum_grad ? -scale * rstd * (args.sum_grad_xhat[c] * over) : 0.0f;
        tables->offset[i] = args.sum_grad ? -scale * (args.sum_grad[c] * over) : 0.0f;
    }
    return true;
}

template <class T, Activation activation, bool past_caches>
void forward(const BatchNormActArgs& args, const Tables& t, int64_t begin, int64_t end, int64_t stride,
             int64_t width) {
    const int64_t ahead = distance_ahead<T>(stride);
    down(begin, end, [&](int64_t row, auto count) {
        const T* x = static_cast<const T*>(args.x) + row * stride;
        const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * stride : nullptr;
        T* y = static_cast<T*>(args.result) + row * stride;
        across(width, [=](int64_t c, auto part) {
            const Vec mean = get(t.mean + c, part), scale = get(t.scale + c, part),
                      shift = get(t.shift + c, part);
            for (int r = 0; r < count.value; ++r) {
                const int64_t i = r * stride + c;
                fetch(x + i + ahead);
                Vec z = fma(get(x + i, part) - mean, scale, shift);
                if (residual != nullptr) {
                    fetch(residual + i + ahead);
                    z = z + get(residual + i, part);
                }
                if (past_caches)
                    put_past_caches(y + i, activate<activation>(z), part);
                else
                    put(y + i, activate<activation>(z), part);
            }
        });
    });
}

// The gradient where the activation let it pass: by y where it was kept, else by z computed again from x.
template <class T, Activation activation, bool from_y, class P>
inline Vec masked(Vec grad, Vec deviation, Vec scale, Vec shift, const T* y, P part) {
    if (activation == Activation::none) return grad;
    if (from_y) return activate_backward<activation>(get(y, part), grad);
    return activate_backward<activation>(fma(deviation, scale, shift), grad);
}

template <class T, Activation activation, bool from_y>
void reduce(const BatchNormActArgs& args, const Tables& t, int64_t begin, int64_t end, int64_t stride,
            int64_t width, float* sum, float* product) {
    const int64_t ahead = distance_ahead<T>(stride);
    down(begin, end, [&](int64_t row, auto count) {
        const T* x = static_cast<const T*>(args.x) + row * stride;
        const T* y = from_y ? static_cast<const T*>(args.y) + row * stride : nullptr;
        const T* grad = static_cast<const T*>(args.grad) + row * stride;
        across(width, [=](int64_t c, auto part) {
            const Vec mean = get(t.mean + c, part), scale = get(t.scale + c, part),
                      shift = get(t.shift + c, part);
            Vec s = get(sum + c, part), p = get(product + c, part);
            for (int r = 0; r < count.value; ++r) {
                const int64_t i = r * stride + c;
                fetch(x + i + ahead);
                fetch(grad + i + ahead);
                const Vec d = get(x + i, part) - mean;
                const Vec g = masked<T, activation, from_y>(get(grad + i, part), d, scale, shift,
                                                            y + (from_y ? i : 0), part);
                s = s + g;
                p = fma(g, d, p);
            }
            put(sum + c, s, part);
            put(product + c, p, part);
        });
    });
}

template <class T, Activation activation, bool from_y, bool frozen, bool past_caches>
void apply(const BatchNormActArgs& args, const Tables& t, int64_t begin, int64_t end, int64_t stride,
           int64_t width) {
    const int64_t ahead = distance_ahead<T>(stride);
    down(begin, end, [&](int64_t row, auto count) {
        const int64_t first_number = row * stride;
        const T* x = frozen ? nullptr : static_cast<const T*>(args.x) + first_number;
        const T* y = from_y ? static_cast<const T*>(args.y) + first_number : nullptr;
        const T* grad = static_cast<const T*>(args.grad) + first_number;
        T* result = static_cast<T*>(args.result) + first_number;
        T* passed = args.masked ? static_cast<T*>(args.masked) + first_number : nullptr;
        across(width, [=](int64_t c, auto part) {
            const Vec mean = get(t.mean + c, part), scale = get(t.scale + c, part),
                      shift = get(t.shift + c, part);
            const Vec slope = get(t.slope + c, part), offset = get(t.offset + c, part);
            for (int r = 0; r < count.value; ++r) {
                const int64_t i = r * stride + c;
                const Vec d = frozen ? zero() : get(x + (frozen ? 0 : i), part) - mean;
                const Vec g = masked<T, activation, from_y>(get(grad + i, part), d, scale, shift,
                                                            y + (from_y ? i : 0), part);
                const Vec grad_x = frozen ? scale * g : fma(scale, g, fma(slope, d, offset));
                if (!frozen) fetch(x + i + ahead);
                fetch(grad + i + ahead);
                if (past_caches)
                    put_past_caches(result + i, grad_x, part);
                else
                    put(result + i, grad_x, part);
                if (passed == nullptr) continue;
                if (past_caches)
                    put_past_caches(passed + i, g, part);
                else
                    put(passed + i, g, part);
            }
        });
    });
}

// --- from run-time types to the functions above ---

template <class Use>
void for_types(const BatchNormActArgs& args, Use use) {
    const auto for_activation = [&](auto type) {
        if (args.activation == Activation::relu) return use(type, Count<1>{});
        if (args.activation == Activation::relu6) return use(type, Count<2>{});
        return use(type, Count<0>{});
    };
    if (args.dtype == DType::bf16) return for_activation(bf16{});
    return for_activation(float{});
}

// Adds the tables of all teams, and the repetitions of a channel within each.
double folded(const double* tables, const Plan& plan, int64_t stride, int64_t channels, int64_t channel) {
    double sum = 0.0;
    for (int team = 0; team < plan.teams; ++team)
        for (int64_t i = channel; i < plan.width; i += channels) sum += tables[team * stride + i];
    return sum;
}

}  // namespace

namespace ISA {

bool batch_norm_act_statistics(const BatchNormActArgs& args, int threads) {
    const Plan plan = plan_for(args, threads);
    const int64_t width = plan.width, size = 5 * width;  // doubles a team: three tables, and three of floats
    double* memory =
        static_cast<double*>(std::calloc(static_cast<size_t>(size * plan.teams), sizeof(double)));
    if (memory == nullptr) return false;
    each_tile(plan, false, [&](int64_t begin, int64_t end, int64_t numbers, int team) {
        double* own = memory + size * team;
        float* floats = reinterpret_cast<float*>(own + 3 * width);
        const Moments to = {own, own + width, own + 2 * width, floats, floats + width, floats + 2 * width};
        if (args.dtype == DType::bf16)
            moments_of_tile(static_cast<const bf16*>(args.x), begin, end, width, numbers, to);
        else
            moments_of_tile(static_cast<const float*>(args.x), begin, end, width, numbers, to);
    });
    for (int64_t c = 0; c < args.channels; ++c) {
        double count = 0.0, mean = 0.0, squares = 0.0;
        for (int team = 0; team < plan.teams; ++team)
            for (int64_t i = c; i < width; i += args.channels) {
                const double* own = memory + size * team + i;
                if (own[0] == 0.0) continue;
                const double total = count + own[0], delta = own[width] - mean;
                mean += delta * (own[0] / total);
                squares += own[2 * width] + delta * delta * (count * own[0] / total);
                count = total;
            }
        args.first[c] = static_cast<float>(count > 0.0 ? mean : 0.0 / count);
        args.second[c] = static_cast<float>(squares / count);
    }
    std::free(memory);
    return true;
}

bool batch_norm_act_forward(const BatchNormActArgs& args, int threads) {
    const Plan plan = plan_for(args, threads);
    Tables tables;
    if (!make_tables(args, plan.width, &tables)) return false;
    each_tile(plan, true, [&](int64_t begin, int64_t end, int64_t numbers, int) {
        for_types(args, [&](auto type, auto activation) {
            constexpr auto kActivation = static_cast<Activation>(decltype(activation)::value);
            if (plan.past_caches)
                forward<decltype(type), kActivation, true>(args, tables, begin, end, plan.width, numbers);
            else
                forward<decltype(type), kActivation, false>(args, tables, begin, end, plan.width, numbers);
        });
    });
    std::free(tables.mean);
    return true;
}

bool batch_norm_act_reduce(const BatchNormActArgs& args, int threads) {
    const Plan plan = plan_for(args, threads);
    const int64_t width = plan.width, size = 3 * width;  // doubles a team: two tables, and two of floats
    Tables tables;
    if (!make_tables(args, width, &tables)) return false;
    double* memory =
        static_cast<double*>(std::calloc(static_cast<size_t>(size * plan.teams), sizeof(double)));
    if (memory == nullptr) {
        std::free(tables.mean);
        return false;
    }
    each_tile(plan, false, [&](int64_t begin, int64_t end, int64_t numbers, int team) {
        double* own = memory + size * team;
        float* floats = reinterpret_cast<float*>(own + 2 * width);
        for (int64_t i = 0; i < 2 * width; ++i) floats[i] = 0.0f;
        for_types(args, [&](auto type, auto activation) {
            using T = decltype(type);
            constexpr auto kActivation = static_cast<Activation>(decltype(activation)::value);
            if (args.y)
                reduce<T, kActivation, true>(args, tables, begin, end, width, numbers, floats,
                                             floats + width);
            else
                reduce<T, kActivation, false>(args, tables, begin, end, width, numbers, floats,
                                              floats + width);
        });
        for (int64_t i = 0; i < 2 * width; ++i) own[i] += static_cast<double>(floats[i]);
    });
    for (int64_t c = 0; c < args.channels; ++c) {
        const double rstd = 1.0 / sqrt(static_cast<double>(args.var[c]) + static_cast<double>(args.eps));
        args.first[c] = static_cast<float>(folded(memory, plan, size, args.channels, c));
        args.second[c] = static_cast<float>(rstd * folded(memory + width, plan, size, args.channels, c));
    }
    std::free(memory);
    std::free(tables.mean);
    return true;
}

bool batch_norm_act_apply(const BatchNormActArgs& args, int threads) {
    const Plan plan = plan_for(args, threads);
    Tables tables;
    if (!make_tables(args, plan.width, &tables)) return false;
    each_tile(plan, true, [&](int64_t begin, int64_t end, int64_t numbers, int) {
        for_types(args, [&](auto type, auto activation) {
            using T = decltype(type);
            constexpr auto kActivation = static_cast<Activation>(decltype(activation)::value);
            const auto where = [&](auto past_caches) {
                constexpr bool kPast = decltype(past_caches)::value;
                constexpr bool kMask = kActivation != Activation::none;
                if (args.mean == nullptr)  // without y there is no activation
                    apply<T, kActivation, kMask, true, kPast>(args, tables, begin, end, plan.width, numbers);
                else if (args.y)
                    apply<T, kActivation, true, false, kPast>(args, tables, begin, end, plan.width, numbers);
                else
                    apply<T, kActivation, false, false, kPast>(args, tables, begin, end, plan.width, numbers);
            };
            if (plan.past_caches) return where(Count<1>{});
            where(Count<0>{});
        });
    });
    std::free(tables.mean);
    return true;
}

}  // namespace ISA

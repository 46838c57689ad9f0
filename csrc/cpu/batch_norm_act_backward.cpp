// The two passes of batch norm's gradient, and the one of its frozen form. Wide rows and tiles as in
// batch_norm_act.cpp: what follows a reduction walks backwards.

#include <math.h>

#include <cstdlib>

#include "batch_norm_act.h"
#include "batch_norm_tables.h"

namespace {

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
                prefetch(x + i, ahead);
                prefetch(grad + i, ahead);
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
                if (!frozen) prefetch(x + i, ahead);
                prefetch(grad + i, ahead);
                put<past_caches>(result + i, grad_x, part);
                if (passed == nullptr) continue;
                put<past_caches>(passed + i, g, part);
            }
        });
    });
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
        const double var = args.pixels == 0 ? 0.0 : static_cast<double>(args.var[c]);  // NaN of no pixels
        const double rstd = 1.0 / sqrt(var + static_cast<double>(args.eps));
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

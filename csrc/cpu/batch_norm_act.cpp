// Batch norm, residual addition and activation in one pass, and its statistics.
//
// Pixels are taken together into wide rows of `width` = k * channels numbers, so that few or odd channels
// still fill vectors; what is per channel is repeated k times. The pixels left over are one shorter row at
// the end. A pass that follows a reduction of the same tensor walks backwards: its first tiles are still in
// the cache.

#include "batch_norm_act.h"

#include <cstdlib>

#include "batch_norm_statistics.h"
#include "batch_norm_tables.h"

namespace {

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
                prefetch(x + i, ahead);
                Vec z = fma(get(x + i, part) - mean, scale, shift);
                if (residual != nullptr) {
                    prefetch(residual + i, ahead);
                    z = z + get(residual + i, part);
                }
                put<past_caches>(y + i, activate<activation>(z), part);
            }
        });
    });
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

}  // namespace ISA

#include "../cpu/batch_norm_act.h"

#include "bind.h"

namespace {

template <class Pick>
void define(py::module_& m, const char* name, Pick pick) {
    m.def(name, [pick](int dtype, int activation, int64_t pixels, int64_t channels, uintptr_t x, uintptr_t y,
                       uintptr_t grad, uintptr_t residual, uintptr_t mean, uintptr_t var, uintptr_t weight,
                       uintptr_t bias, float eps, uintptr_t sum_grad, uintptr_t sum_grad_xhat, int64_t count,
                       uintptr_t result, uintptr_t masked, uintptr_t first, uintptr_t second, int threads) {
        const BatchNormActArgs args = {static_cast<DType>(dtype),
                                       static_cast<Activation>(activation),
                                       pixels,
                                       channels,
                                       pointer<const void>(x),
                                       pointer<const void>(y),
                                       pointer<const void>(grad),
                                       pointer<const void>(residual),
                                       pointer<const float>(mean),
                                       pointer<const float>(var),
                                       pointer<const float>(weight),
                                       pointer<const float>(bias),
                                       eps,
                                       pointer<const float>(sum_grad),
                                       pointer<const float>(sum_grad_xhat),
                                       count,
                                       pointer<void>(result),
                                       pointer<void>(masked),
                                       pointer<float>(first),
                                       pointer<float>(second)};
        const py::gil_scoped_release release;
        if (!pick(args, threads)) throw std::bad_alloc();
    });
}

}  // namespace

void bind_batch_norm_act(py::module_& m) {
    using Args = const BatchNormActArgs&;
    define(m, "batch_norm_act_statistics_cpu",
           [](Args args, int threads) { return CPU_KERNEL(batch_norm_act_statistics)(args, threads); });
    define(m, "batch_norm_act_forward_cpu",
           [](Args args, int threads) { return CPU_KERNEL(batch_norm_act_forward)(args, threads); });
    define(m, "batch_norm_act_reduce_cpu",
           [](Args args, int threads) { return CPU_KERNEL(batch_norm_act_reduce)(args, threads); });
    define(m, "batch_norm_act_apply_cpu",
           [](Args args, int threads) { return CPU_KERNEL(batch_norm_act_apply)(args, threads); });
}

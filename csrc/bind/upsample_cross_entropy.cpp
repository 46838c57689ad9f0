#include "../cpu/upsample_cross_entropy.h"

#include "bind.h"

namespace {

void upsample_cross_entropy_cpu(uintptr_t logits, int dtype, uintptr_t target, bool wide_target,
                                uintptr_t weight, uintptr_t grad_loss, int64_t batch, int64_t classes,
                                int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                int64_t ignore_index, float label_smoothing, bool align_corners,
                                uintptr_t losses, uintptr_t grad, uintptr_t loss, uintptr_t weight_sum,
                                uintptr_t out_of_range, int threads) {
    const CrossEntropyArgs args = {pointer<const void>(logits),
                                   static_cast<DType>(dtype),
                                   pointer<const void>(target),
                                   wide_target,
                                   pointer<const float>(weight),
                                   pointer<const float>(grad_loss),
                                   batch,
                                   classes,
                                   height,
                                   width,
                                   out_height,
                                   out_width,
                                   ignore_index,
                                   label_smoothing,
                                   align_corners,
                                   pointer<float>(losses),
                                   pointer<float>(grad),
                                   pointer<float>(loss),
                                   pointer<float>(weight_sum),
                                   pointer<int64_t>(out_of_range)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(upsample_cross_entropy)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_upsample_cross_entropy(py::module_& m) {
    m.def("upsample_cross_entropy_cpu", &upsample_cross_entropy_cpu);
}

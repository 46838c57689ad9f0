#include "../cpu/upsample_concat.h"

#include <array>

#include "bind.h"

namespace {

// sizes: images, channels, low_channels, height, width, out_height, out_width
UpsampleConcatShape shape_of(int dtype, const std::array<int64_t, 7>& sizes, bool align_corners) {
    return {static_cast<DType>(dtype),
            sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            sizes[5],
            sizes[6],
            align_corners};
}

void upsample_concat_cpu(int dtype, const std::array<int64_t, 7>& sizes, bool align_corners, uintptr_t x,
                         uintptr_t low_level, uintptr_t out, int threads) {
    const UpsampleConcatArgs args = {shape_of(dtype, sizes, align_corners), pointer<const void>(x),
                                     pointer<const void>(low_level), pointer<void>(out)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(upsample_concat)(args, threads)) throw std::bad_alloc();
}

// grad_x, grad_low: 0 where not wanted
void upsample_concat_backward_cpu(int dtype, const std::array<int64_t, 7>& sizes, bool align_corners,
                                  uintptr_t grad, uintptr_t grad_x, uintptr_t grad_low, int threads) {
    const UpsampleConcatBackwardArgs args = {shape_of(dtype, sizes, align_corners), pointer<const void>(grad),
                                             pointer<void>(grad_x), pointer<void>(grad_low)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(upsample_concat_backward)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_upsample_concat(py::module_& m) {
    m.def("upsample_concat_cpu", &upsample_concat_cpu);
    m.def("upsample_concat_backward_cpu", &upsample_concat_backward_cpu);
}

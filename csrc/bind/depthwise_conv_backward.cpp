#include "../cpu/depthwise_conv_backward.h"

#include <array>

#include "bind.h"

namespace {

// sizes: batch, channels, height, width, out_height, out_width; window: kernel, stride, dilation
void depthwise_conv_backward_cpu(uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t grad_x,
                                 uintptr_t grad_weight, int dtype, int weight_dtype,
                                 const std::array<int64_t, 6>& sizes, const std::array<int64_t, 3>& window,
                                 const std::array<uintptr_t, 4>& norm, float eps, int activation,
                                 const std::array<uintptr_t, 2>& sums, int threads) {
    const DepthwiseBackwardArgs args = {
        pointer<const void>(grad_y),
        pointer<const void>(x),
        pointer<const void>(weight),
        pointer<void>(grad_x),
        pointer<void>(grad_weight),
        static_cast<DType>(dtype),
        static_cast<DType>(weight_dtype),
        sizes[0],
        sizes[1],
        sizes[2],
        sizes[3],
        sizes[4],
        sizes[5],
        window[0],
        window[1],
        window[2],
        {pointer<const float>(norm[0]), pointer<const float>(norm[1]), pointer<const float>(norm[2]),
         pointer<const float>(norm[3]), eps, static_cast<Activation>(activation)},
        pointer<float>(sums[0]),
        pointer<float>(sums[1])};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(depthwise_conv_backward)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_depthwise_conv_backward(py::module_& m) {
    m.def("depthwise_conv_backward_cpu", &depthwise_conv_backward_cpu);
}

#include "../cpu/depthwise_conv.h"

#include "bind.h"

namespace {

void depthwise_conv_cpu(uintptr_t x, uintptr_t y, uintptr_t weight, uintptr_t scale, uintptr_t shift,
                        int type, int64_t batch, int64_t height, int64_t width, int64_t channels,
                        int64_t kernel, int64_t stride, int64_t dilation, int activation, uintptr_t mean,
                        uintptr_t variance, int threads) {
    const DepthwiseArgs args = {pointer<const void>(x),
                                pointer<void>(y),
                                pointer<const void>(weight),
                                pointer<const float>(scale),
                                pointer<const float>(shift),
                                static_cast<DType>(type),
                                batch,
                                height,
                                width,
                                channels,
                                kernel,
                                stride,
                                dilation,
                                static_cast<Activation>(activation),
                                pointer<float>(mean),
                                pointer<float>(variance)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(depthwise_conv)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_depthwise_conv(py::module_& m) { m.def("depthwise_conv_cpu", &depthwise_conv_cpu); }

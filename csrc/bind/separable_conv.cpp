#include "../cpu/separable_conv.h"

#include <tuple>

#include "bind.h"

namespace {

// shape: N, C, H, W of x; out_shape: M and the height and width of y
void separable_conv_cpu(int type, uintptr_t x, uintptr_t depthwise, uintptr_t pointwise,
                        uintptr_t depthwise_scale, uintptr_t depthwise_shift, int depthwise_activation,
                        uintptr_t scale, uintptr_t shift, int activation, uintptr_t y, int64_t y_pixel,
                        std::tuple<int64_t, int64_t, int64_t, int64_t> shape,
                        std::tuple<int64_t, int64_t, int64_t> out_shape, int64_t stride, int64_t dilation,
                        int threads) {
    SeparableConvArgs args = {};
    args.type = static_cast<DType>(type);
    args.x = pointer<const void>(x);
    args.depthwise = pointer<const void>(depthwise);
    args.pointwise = pointer<const void>(pointwise);
    args.depthwise_scale = pointer<const float>(depthwise_scale);
    args.depthwise_shift = pointer<const float>(depthwise_shift);
    args.depthwise_activation = static_cast<Activation>(depthwise_activation);
    args.scale = pointer<const float>(scale);
    args.shift = pointer<const float>(shift);
    args.activation = static_cast<Activation>(activation);
    args.y = pointer<void>(y);
    args.y_pixel = y_pixel;
    std::tie(args.images, args.channels, args.height, args.width) = shape;
    std::tie(args.out_channels, args.out_height, args.out_width) = out_shape;
    args.stride = stride;
    args.dilation = dilation;
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(separable_conv)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_separable_conv(py::module_& m) { m.def("separable_conv_cpu", &separable_conv_cpu); }

#include "../cpu/depthwise_conv.h"

#include <tuple>
#include <vector>

#include "bind.h"

namespace {

// y, weight, scale or 0, shift or 0, dilation
using Rate = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;

void depthwise_conv_cpu(uintptr_t x, int type, int64_t batch, int64_t height, int64_t width, int64_t channels,
                        int64_t kernel, int64_t stride, int activation, const std::vector<Rate>& given,
                        uintptr_t mean, uintptr_t variance, int threads) {
    std::vector<DepthwiseRate> rates;
    for (const auto& [y, weight, scale, shift, dilation] : given)
        rates.push_back({pointer<void>(y), pointer<const void>(weight), pointer<const float>(scale),
                         pointer<const float>(shift), dilation});
    const DepthwiseArgs args = {pointer<const void>(x),
                                static_cast<DType>(type),
                                batch,
                                height,
                                width,
                                channels,
                                kernel,
                                stride,
                                static_cast<Activation>(activation),
                                rates.data(),
                                static_cast<int>(rates.size()),
                                pointer<float>(mean),
                                pointer<float>(variance)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(depthwise_conv)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_depthwise_conv(py::module_& m) { m.def("depthwise_conv_cpu", &depthwise_conv_cpu); }

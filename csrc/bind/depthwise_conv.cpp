#include "../cpu/depthwise_conv.h"

#include <array>
#include <vector>

#include "bind.h"
#ifdef WITH_CUDA
#include "../cuda/kernels.h"
#endif

namespace {

void depthwise_conv_cpu(uintptr_t x, uintptr_t y, uintptr_t weight, uintptr_t scale, uintptr_t shift,
                        int type, int64_t batch, int64_t height, int64_t width, int64_t channels,
                        int64_t kernel, int64_t stride, int64_t dilation, int activation, uintptr_t mean,
                        uintptr_t variance, std::array<uintptr_t, 4> norm, float eps, int in_activation,
                        int threads) {
    const DepthwiseArgs args = {
        pointer<const void>(x),
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
        pointer<float>(variance),
        {pointer<const float>(norm[0]), pointer<const float>(norm[1]), pointer<const float>(norm[2]),
         pointer<const float>(norm[3]), eps, static_cast<Activation>(in_activation)}};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(depthwise_conv)(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
// Weight, scale, shift, result and dilation.
using Rate = std::array<uintptr_t, 5>;

DepthwiseCudaArgs depthwise_args(uintptr_t x, int type, std::array<int64_t, 4> shape, int64_t kernel,
                                 int64_t stride, int activation, const std::vector<Rate>& rates) {
    if (rates.empty() || rates.size() > kMostRates) throw py::value_error("expected 1 to 3 rates");
    DepthwiseCudaArgs args{};
    args.x = pointer<const void>(x);
    args.type = static_cast<DType>(type);
    args.batch = shape[0];
    args.channels = shape[1];
    args.height = shape[2];
    args.width = shape[3];
    args.kernel = kernel;
    args.stride = stride;
    args.activation = static_cast<Activation>(activation);
    for (const auto& [weight, scale, shift, y, dilation] : rates)
        args.rate[args.rates++] = {pointer<const void>(weight), pointer<const float>(scale),
                                   pointer<const float>(shift), pointer<void>(y),
                                   static_cast<int64_t>(dilation)};
    return args;
}

// statistics: mean, variance, and the counts, means and sums of squares of depthwise_conv_cuda_parts parts;
// or zeros
void depthwise_conv_cuda(uintptr_t x, int type, std::array<int64_t, 4> shape, int64_t kernel, int64_t stride,
                         int activation, const std::vector<Rate>& rates, std::array<uintptr_t, 5> statistics,
                         int device, uintptr_t stream) {
    DepthwiseCudaArgs args = depthwise_args(x, type, shape, kernel, stride, activation, rates);
    float** const to[] = {&args.mean, &args.variance, &args.counts, &args.means, &args.squares};
    for (int i = 0; i < 5; ++i) *to[i] = pointer<float>(statistics[i]);
    const py::gil_scoped_release release;
    cuda::depthwise_conv(args, device, pointer<void>(stream));
}

int64_t depthwise_conv_cuda_parts(uintptr_t x, int type, std::array<int64_t, 4> shape, int64_t kernel,
                                  int64_t stride, int activation, const std::vector<Rate>& rates,
                                  int device) {
    return cuda::depthwise_conv_parts(depthwise_args(x, type, shape, kernel, stride, activation, rates),
                                      device);
}
#endif

}  // namespace

void bind_depthwise_conv(py::module_& m) {
    m.def("depthwise_conv_cpu", &depthwise_conv_cpu);
#ifdef WITH_CUDA
    m.def("depthwise_conv_cuda", &depthwise_conv_cuda);
    m.def("depthwise_conv_cuda_parts", &depthwise_conv_cuda_parts);
#endif
}

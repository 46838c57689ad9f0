#include "../cpu/upsample_argmax.h"

#include <array>

#include "bind.h"
#ifdef WITH_CUDA
#include "../cuda/kernels.h"
#endif

namespace {

UpsampleArgmaxArgs upsample_args(uintptr_t logits, int type, std::array<int64_t, 4> shape,
                                 std::array<int64_t, 4> strides, std::array<int64_t, 2> size,
                                 bool align_corners, uintptr_t labels) {
    const auto [batch, classes, height, width] = shape;
    const auto [image_step, class_step, row_step, column_step] = strides;
    return {{pointer<const void>(logits), static_cast<DType>(type), batch, classes, height, width, image_step,
             class_step, row_step, column_step},
            size[0],
            size[1],
            align_corners,
            pointer<uint8_t>(labels)};
}

void upsample_argmax_cpu(uintptr_t logits, int type, std::array<int64_t, 4> shape,
                         std::array<int64_t, 4> strides, std::array<int64_t, 2> size, bool align_corners,
                         uintptr_t labels, int threads) {
    const UpsampleArgmaxArgs args = upsample_args(logits, type, shape, strides, size, align_corners, labels);
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(upsample_argmax)(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
void upsample_argmax_cuda(uintptr_t logits, int type, std::array<int64_t, 4> shape,
                          std::array<int64_t, 4> strides, std::array<int64_t, 2> size, bool align_corners,
                          uintptr_t labels, int device, uintptr_t stream) {
    const UpsampleArgmaxArgs args = upsample_args(logits, type, shape, strides, size, align_corners, labels);
    const py::gil_scoped_release release;
    cuda::upsample_argmax(args, device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_upsample_argmax(py::module_& m) {
    m.def("upsample_argmax_cpu", &upsample_argmax_cpu);
#ifdef WITH_CUDA
    m.def("upsample_argmax_cuda", &upsample_argmax_cuda);
#endif
}

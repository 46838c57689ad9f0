#include "../cpu/augment_image.h"

#include <array>

#include "bind.h"
#ifdef WITH_CUDA
#include "../cuda/kernels.h"
#endif

namespace {

using Size = std::array<int64_t, 2>;
using Window = std::array<int64_t, 4>;

CropArgs crop_args(uintptr_t source, int64_t row_stride, Size size, Size scaled, Window window, bool flip,
                   std::array<uint8_t, 3> pad, uintptr_t out) {
    return {pointer<const uint8_t>(source),
            row_stride,
            size[0],
            size[1],
            scaled[0],
            scaled[1],
            window[0],
            window[1],
            window[2],
            window[3],
            flip,
            {pad[0], pad[1], pad[2]},
            pointer<uint8_t>(out)};
}

void augment_image_cpu(uintptr_t source, int64_t row_stride, Size size, Size scaled, Window window, bool flip,
                       std::array<uint8_t, 3> pad, uintptr_t out, int threads) {
    const CropArgs args = crop_args(source, row_stride, size, scaled, window, flip, pad, out);
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(augment_image)(args, threads)) throw std::bad_alloc();
}

void augment_image_mask_cpu(uintptr_t source, int64_t row_stride, Size size, Size scaled, Window window,
                            bool flip, uint8_t ignore, uintptr_t out, int threads) {
    const CropArgs args = crop_args(source, row_stride, size, scaled, window, flip, {ignore, 0, 0}, out);
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(augment_image_mask)(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
void augment_image_cuda(uintptr_t source, int64_t row_stride, Size size, Size scaled, Window window,
                        bool flip, std::array<uint8_t, 3> pad, uintptr_t out, int device, uintptr_t stream) {
    const CropArgs args = crop_args(source, row_stride, size, scaled, window, flip, pad, out);
    const py::gil_scoped_release release;
    cuda::augment_image(args, device, pointer<void>(stream));
}

void augment_image_mask_cuda(uintptr_t source, int64_t row_stride, Size size, Size scaled, Window window,
                             bool flip, uint8_t ignore, uintptr_t out, int device, uintptr_t stream) {
    const CropArgs args = crop_args(source, row_stride, size, scaled, window, flip, {ignore, 0, 0}, out);
    const py::gil_scoped_release release;
    cuda::augment_image_mask(args, device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_augment_image(py::module_& m) {
    m.def("augment_image_cpu", &augment_image_cpu);
    m.def("augment_image_mask_cpu", &augment_image_mask_cpu);
#ifdef WITH_CUDA
    m.def("augment_image_cuda", &augment_image_cuda);
    m.def("augment_image_mask_cuda", &augment_image_mask_cuda);
#endif
}

#include "../cpu/normalize_image.h"

#include <array>

#include "bind.h"

namespace {

using Channels = std::array<float, 3>;

// images: (address, image stride, row stride); size: (batch, height, width)
void normalize_image_cpu(uintptr_t images, int64_t image_stride, int64_t row_stride,
                         std::array<int64_t, 3> size, uintptr_t colour, uintptr_t taps, int64_t radius,
                         Channels grey, Channels factor, Channels bias, uintptr_t out, int out_type,
                         int threads) {
    const NormalizeArgs args = {pointer<const uint8_t>(images),
                                image_stride,
                                row_stride,
                                size[0],
                                size[1],
                                size[2],
                                pointer<const float>(colour),
                                pointer<const float>(taps),
                                radius,
                                {grey[0], grey[1], grey[2]},
                                {factor[0], factor[1], factor[2]},
                                {bias[0], bias[1], bias[2]},
                                pointer<void>(out),
                                static_cast<DType>(out_type)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(normalize_image)(args, threads)) throw std::bad_alloc();
}

}  // namespace

void bind_normalize_image(py::module_& m) { m.def("normalize_image_cpu", &normalize_image_cpu); }

#include "../cpu/upsample_confusion_matrix.h"

#include <array>

#include "bind.h"
#ifdef WITH_CUDA
#include "../cuda/kernels.h"
#endif

namespace {

UpsampleConfusionArgs upsample_confusion_args(uintptr_t logits, int type, std::array<int64_t, 4> shape,
                                              std::array<int64_t, 4> strides, std::array<int64_t, 2> size,
                                              bool align_corners, uintptr_t target, int target_type,
                                              std::optional<int64_t> ignore_index, uintptr_t counts,
                                              uintptr_t out_of_range) {
    const auto [batch, classes, height, width] = shape;
    const auto [image_step, class_step, row_step, column_step] = strides;
    return {{{pointer<const void>(logits), static_cast<DType>(type), batch, classes, height, width,
              image_step, class_step, row_step, column_step},
             size[0],
             size[1],
             align_corners,
             nullptr},
            {pointer<const void>(target), static_cast<LabelType>(target_type)},
            ignore_index.has_value(),
            ignore_index.value_or(0),
            pointer<int64_t>(counts),
            pointer<int64_t>(out_of_range)};
}

void upsample_confusion_matrix_cpu(uintptr_t logits, int type, std::array<int64_t, 4> shape,
                                   std::array<int64_t, 4> strides, std::array<int64_t, 2> size,
                                   bool align_corners, uintptr_t target, int target_type,
                                   std::optional<int64_t> ignore_index, uintptr_t counts,
                                   uintptr_t out_of_range, int threads) {
    const UpsampleConfusionArgs args =
        upsample_confusion_args(logits, type, shape, strides, size, align_corners, target, target_type,
                                ignore_index, counts, out_of_range);
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(upsample_confusion_matrix)(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
void upsample_confusion_matrix_cuda(uintptr_t logits, int type, std::array<int64_t, 4> shape,
                                    std::array<int64_t, 4> strides, std::array<int64_t, 2> size,
                                    bool align_corners, uintptr_t target, int target_type,
                                    std::optional<int64_t> ignore_index, uintptr_t counts,
                                    uintptr_t out_of_range, int device, uintptr_t stream) {
    const UpsampleConfusionArgs args =
        upsample_confusion_args(logits, type, shape, strides, size, align_corners, target, target_type,
                                ignore_index, counts, out_of_range);
    const py::gil_scoped_release release;
    cuda::upsample_confusion_matrix(args, device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_upsample_confusion_matrix(py::module_& m) {
    m.def("upsample_confusion_matrix_cpu", &upsample_confusion_matrix_cpu);
#ifdef WITH_CUDA
    m.def("upsample_confusion_matrix_cuda", &upsample_confusion_matrix_cuda);
#endif
}

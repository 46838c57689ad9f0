#include "../cpu/confusion_matrix.h"

#include "bind.h"
#ifdef WITH_CUDA
#include "../cuda/kernels.h"
#endif

namespace {

ConfusionArgs confusion_args(uintptr_t prediction, int prediction_type, uintptr_t target, int target_type,
                             int64_t pixels, int num_classes, std::optional<int64_t> ignore_index,
                             uintptr_t counts, uintptr_t out_of_range) {
    return {{pointer<const void>(prediction), static_cast<LabelType>(prediction_type)},
            {pointer<const void>(target), static_cast<LabelType>(target_type)},
            pixels,
            num_classes,
            ignore_index.has_value(),
            ignore_index.value_or(0),
            pointer<int64_t>(counts),
            pointer<int64_t>(out_of_range)};
}

void confusion_matrix_cpu(uintptr_t prediction, int prediction_type, uintptr_t target, int target_type,
                          int64_t pixels, int num_classes, std::optional<int64_t> ignore_index,
                          uintptr_t counts, uintptr_t out_of_range, int threads) {
    const ConfusionArgs args = confusion_args(prediction, prediction_type, target, target_type, pixels,
                                              num_classes, ignore_index, counts, out_of_range);
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(confusion_matrix)(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
void confusion_matrix_cuda(uintptr_t prediction, int prediction_type, uintptr_t target, int target_type,
                           int64_t pixels, int num_classes, std::optional<int64_t> ignore_index,
                           uintptr_t counts, uintptr_t out_of_range, int device, uintptr_t stream) {
    const ConfusionArgs args = confusion_args(prediction, prediction_type, target, target_type, pixels,
                                              num_classes, ignore_index, counts, out_of_range);
    const py::gil_scoped_release release;
    cuda::confusion_matrix(args, device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_confusion_matrix(py::module_& m) {
    m.def("confusion_matrix_cpu", &confusion_matrix_cpu);
#ifdef WITH_CUDA
    m.def("confusion_matrix_cuda", &confusion_matrix_cuda);
#endif
}

// deeplab_fast._C: raw pointers, sizes and stream handles in, nothing of torch. Pointers travel as integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#ifdef WITH_CUDA
#include "checks.h"
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

struct CpuKernels {
    const char* name;
    ConfusionMatrixKernel* confusion_matrix;
};

// Best first: what was built and this processor has.
std::vector<CpuKernels> available() {
    std::vector<CpuKernels> sets;
#ifdef WITH_X86_KERNELS
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bf16"))
        sets.push_back({"avx512", avx512::confusion_matrix});
    if (has_avx2) sets.push_back({"avx2", avx2::confusion_matrix});
#endif
    sets.push_back({"portable", portable::confusion_matrix});
    return sets;
}

CpuKernels cpu = available().front();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const CpuKernels& set : available()) names.emplace_back(set.name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const CpuKernels& set : available()) {
        if (name == set.name) {
            cpu = set;
            return;
        }
    }
    throw py::value_error("no kernels for the instruction set " + name + " on this processor");
}

ConfusionArgs confusion_args(uintptr_t prediction, int prediction_type, uintptr_t target, int target_type,
                             int64_t pixels, int num_classes, std::optional<int64_t> ignore_index,
                             uintptr_t counts, uintptr_t out_of_range) {
    return {{reinterpret_cast<const void*>(prediction), static_cast<LabelType>(prediction_type)},
            {reinterpret_cast<const void*>(target), static_cast<LabelType>(target_type)},
            pixels,
            num_classes,
            ignore_index.has_value(),
            ignore_index.value_or(0),
            reinterpret_cast<int64_t*>(counts),
            reinterpret_cast<int64_t*>(out_of_range)};
}

void confusion_matrix_cpu(uintptr_t prediction, int prediction_type, uintptr_t target, int target_type,
                          int64_t pixels, int num_classes, std::optional<int64_t> ignore_index,
                          uintptr_t counts, uintptr_t out_of_range, int threads) {
    const ConfusionArgs args = confusion_args(prediction, prediction_type, target, target_type, pixels,
                                              num_classes, ignore_index, counts, out_of_range);
    const py::gil_scoped_release release;
    if (!cpu.confusion_matrix(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
void confusion_matrix_cuda(uintptr_t prediction, int prediction_type, uintptr_t target, int target_type,
                           int64_t pixels, int num_classes, std::optional<int64_t> ignore_index,
                           uintptr_t counts, uintptr_t out_of_range, int device, uintptr_t stream) {
    const ConfusionArgs args = confusion_args(prediction, prediction_type, target, target_type, pixels,
                                              num_classes, ignore_index, counts, out_of_range);
    const py::gil_scoped_release release;
    cuda::confusion_matrix(args, device, reinterpret_cast<CudaStream>(stream));
}

// None, or the driver's reason why no kernel can be launched.
std::optional<std::string> cuda_why_not() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess) return std::nullopt;
    return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of deeplab_fast over raw pointers; deeplab_fast.ops is the way in.";
    m.attr("compiler") = BUILD_COMPILER;
    m.attr("openmp") = static_cast<bool>(BUILD_OPENMP);
    m.attr("cuda") = BUILD_CUDA;                              // toolkit's version, or empty
    m.attr("cuda_architectures") = BUILD_CUDA_ARCHITECTURES;  // such as 80,86,90
    m.def("instruction_sets", &instruction_sets, "Those that this processor has kernels for, best first.");
    m.def("instruction_set", [] { return cpu.name; }, "The one in use.");
    m.def("use_instruction_set", &use_instruction_set, "Choose another: for tests.");
    m.def("confusion_matrix_cpu", &confusion_matrix_cpu);
#ifdef WITH_CUDA
    m.def("cuda_why_not", &cuda_why_not, "None, or the driver's reason why nothing can be launched.");
    m.def("confusion_matrix_cuda", &confusion_matrix_cuda);
#endif
}

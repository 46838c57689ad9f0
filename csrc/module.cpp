// deeplab_fast._C: raw pointers, sizes and stream handles in, nothing of torch. The launchers are in bind/.

#include <string>
#include <vector>

#include "bind/bind.h"
#include "cpu/kernels.h"
#ifdef WITH_CUDA
#include "checks.h"
#endif

namespace {

struct Named {
    const char* name;
    InstructionSet set;
};

// Best first: what was built and this processor has.
std::vector<Named> available() {
    std::vector<Named> sets;
#ifdef WITH_X86_KERNELS
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bf16"))
        sets.push_back({"avx512", InstructionSet::avx512});
    if (has_avx2) sets.push_back({"avx2", InstructionSet::avx2});
#endif
    sets.push_back({"portable", InstructionSet::portable});
    return sets;
}

Named in_use = available().front();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Named& set : available()) names.emplace_back(set.name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const Named& set : available()) {
        if (name == set.name) {
            in_use = set;
            return;
        }
    }
    throw py::value_error("no kernels for the instruction set " + name + " on this processor");
}

#ifdef WITH_CUDA
// None, or the driver's reason why no kernel can be launched.
std::optional<std::string> cuda_why_not() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess) return std::nullopt;
    return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}
#endif

}  // namespace

InstructionSet instruction_set() { return in_use.set; }

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of deeplab_fast over raw pointers; deeplab_fast.ops is the way in.";
    m.attr("compiler") = BUILD_COMPILER;
    m.attr("openmp") = static_cast<bool>(BUILD_OPENMP);
    m.attr("cuda") = BUILD_CUDA;                              // toolkit's version, or empty
    m.attr("cuda_architectures") = BUILD_CUDA_ARCHITECTURES;  // such as 80,86,90
    m.def("instruction_sets", &instruction_sets, "Those that this processor has kernels for, best first.");
    m.def("instruction_set", [] { return in_use.name; }, "The one in use.");
    m.def("use_instruction_set", &use_instruction_set, "Choose another: for tests.");
#ifdef WITH_CUDA
    m.def("cuda_why_not", &cuda_why_not, "None, or the driver's reason why nothing can be launched.");
#endif
    bind_augment_image(m);
    bind_batch_norm_act(m);
    bind_confusion_matrix(m);
    bind_depthwise_conv(m);
    bind_depthwise_conv_backward(m);
    bind_kth_largest(m);
    bind_normalize_image(m);
    bind_separable_conv(m);
    bind_upsample_argmax(m);
    bind_upsample_concat(m);
    bind_upsample_confusion_matrix(m);
    bind_upsample_cross_entropy(m);
}

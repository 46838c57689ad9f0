#include "../cpu/kth_largest.h"

#include "bind.h"
#ifdef WITH_CUDA
#include "../cuda/kernels.h"
#endif

namespace {

void kth_largest_cpu(uintptr_t x, int64_t size, int64_t k, uintptr_t value, int threads) {
    const KthLargestArgs args = {pointer<const float>(x), size, k, pointer<float>(value)};
    const py::gil_scoped_release release;
    if (!CPU_KERNEL(kth_largest)(args, threads)) throw std::bad_alloc();
}

#ifdef WITH_CUDA
// counts: zeros (3, 2048)
void kth_largest_cuda(uintptr_t x, int64_t size, int64_t k, uintptr_t value, uintptr_t counts, int device,
                      uintptr_t stream) {
    const KthLargestArgs args = {pointer<const float>(x), size, k, pointer<float>(value)};
    const py::gil_scoped_release release;
    cuda::kth_largest(args, pointer<int64_t>(counts), device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_kth_largest(py::module_& m) {
    m.def("kth_largest_cpu", &kth_largest_cpu);
#ifdef WITH_CUDA
    m.attr("kth_largest_counts") = kDigits * kBins;  // int64 zeros that the launcher is given
    m.def("kth_largest_cuda", &kth_largest_cuda);
#endif
}

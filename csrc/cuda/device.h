// What the launchers ask about a chip, and how they bring a kernel to it. Nothing here waits for the device.
#pragma once

#include "../checks.h"

namespace {

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

// Bytes of shared memory that one block can have, of which the first 48 KB need not be asked for.
[[maybe_unused]] int shared_limit(int device) {
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

constexpr int kSharedUnasked = 48 << 10;

// Lets `kernel` of the current device have this much dynamic shared memory. The limit is only ever raised: a
// launch of another thread that has asked for more must not find less.
template <class Kernel>
void allow_shared(Kernel* kernel, int bytes, int device) {
    if (bytes > kSharedUnasked)
        check_cuda(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit(device)),
            "cudaFuncSetAttribute");
}

// Blocks that fill the device, no more than are useful.
[[maybe_unused]] unsigned resident_blocks(int64_t useful, int of_multiprocessor, int device) {
    const int64_t most = int64_t{of_multiprocessor} * attribute(cudaDevAttrMultiProcessorCount, device);
    return static_cast<unsigned>(useful < most ? useful : most);
}

}  // namespace

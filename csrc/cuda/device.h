// What the launchers ask about a chip, and how they bring a kernel to it. Nothing here waits for the device.
//
// The driver is asked once for each device. What it said is kept in atomics, in which 0 is "not asked yet":
// threads that ask at the same time write the same.
#pragma once

#include <atomic>
#include <cstdint>

#include "../checks.h"

namespace {

constexpr int kDevices = 64;  // whose answers are kept; of others the driver is asked again

// The answer of `ask` about a device, whose entry in `answers` it is then.
template <class Answer, class Ask>
Answer asked_once(std::atomic<Answer> (&answers)[kDevices], int device, Ask ask) {
    if (device >= kDevices) return ask();
    Answer answer = answers[device].load(std::memory_order_relaxed);
    if (answer == Answer{}) {
        answer = ask();
        answers[device].store(answer, std::memory_order_relaxed);
    }
    return answer;
}

template <cudaDeviceAttr name>
int attribute(int device) {
    static std::atomic<int> answers[kDevices];
    return asked_once(answers, device, [&] {
        int value = 0;
        check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
        return value;
    });
}

// Bytes of shared memory that one block can have, of which the first 48 KB need not be asked for.
[[maybe_unused]] int shared_limit(int device) {
    return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
}

constexpr int kSharedUnasked = 48 << 10;

// Lets `kernel` of the current device have this much dynamic shared memory: the chip's limit, once, so that a
// launch of another thread that needs more does not find less.
template <auto* kernel>
void allow_shared(int bytes, int device) {
    static std::atomic<bool> allowed[kDevices];
    if (bytes <= kSharedUnasked) return;
    asked_once(allowed, device, [&] {
        check_cuda(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit(device)),
            "cudaFuncSetAttribute");
        return true;
    });
}

// Blocks of `kernel` that a multiprocessor of the current device holds at a time. The last answer is kept: it
// changes with the shape of the tensors only.
template <auto* kernel>
int fitting_blocks(int threads, int shared, int device) {
    static std::atomic<uint64_t> last[kDevices];  // shared memory, and blocks
    const uint64_t known = device < kDevices ? last[device].load(std::memory_order_relaxed) : 0;
    if (known != 0 && static_cast<int>(known >> 32) == shared) return static_cast<int>(known & UINT32_MAX);
    int blocks = 0;
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const uint64_t answer = static_cast<uint64_t>(shared) << 32 | static_cast<uint32_t>(blocks);
    if (device < kDevices) last[device].store(answer, std::memory_order_relaxed);
    return blocks;
}

// Blocks that fill the device, no more than are useful.
[[maybe_unused]] unsigned resident_blocks(int64_t useful, int of_multiprocessor, int device) {
    const int64_t most = int64_t{of_multiprocessor} * attribute<cudaDevAttrMultiProcessorCount>(device);
    return static_cast<unsigned>(useful < most ? useful : most);
}

}  // namespace

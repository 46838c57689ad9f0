// A CUDA runtime of one host thread, for the kernels of csrc/cuda: blocks run one after another, the threads of a
// block as fibers that change at barriers. tests/test_cuda_emulator.py compiles a .cu over it as C++.
//
// Emulated: grids and blocks in one dimension, dynamic shared memory (poisoned before each block, with guards on both
// sides), __syncthreads, __syncthreads_or, __syncwarp, integer atomics, asynchronous copies (__pipeline_...), the
// intrinsics below. A barrier that some threads never reach is an error. Threads run upwards or downwards between
// barriers, as `descending` says, so that most missing barriers give a wrong result in one of the two. Asynchronous
// copies arrive as late as they may, at the thread's wait, or (descending) at once.
// Not emulated: warp shuffles and votes, static shared memory, matrix instructions, textures, alignment faults but those
// of asynchronous copies, memory order. Nothing else of the runtime is there either: a launcher that allocated, copied or
// waited would not compile.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __CUDACC__
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "shared memory is dynamic in these kernels")

struct Dim3 {
    unsigned x, y, z;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct longlong2 {
    long long x, y;
};

namespace emulator {

constexpr size_t kGuard = 64;
constexpr size_t kStack = 96 << 10;
constexpr int kWarp = 32;

struct Settings {
    int shared_limit, multiprocessors;
    bool descending;
    unsigned first_block;  // those before it are left out
};
struct Launch {
    unsigned blocks, threads;
    size_t shared;
    void* stream;
    int device;
};

constexpr size_t kUnasked = 48 << 10;  // bytes of shared memory that a kernel has without asking

inline std::vector<std::pair<int, int>> devices;  // shared_limit and multiprocessors, which no device changes
inline Settings settings{227 << 10, 2, false, 0};  // of the device that is called next
inline Launch last{};
inline int launches = 0, questions = 0;  // questions: calls of the driver about a device or a kernel
inline int current_device = 7;
inline std::map<std::pair<const void*, int>, size_t> allowed;  // to a kernel of a device

// The number of a device with these settings: a new one where there is none yet.
inline int device_like(const Settings& wanted) {
    const std::pair<int, int> facts{wanted.shared_limit, wanted.multiprocessors};
    size_t i = 0;
    while (i < devices.size() && devices[i] != facts) ++i;
    if (i == devices.size()) devices.push_back(facts);
    return static_cast<int>(i);
}

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    int group;
};

struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it went away
    bool begun;
    std::vector<Copy> copies;  // on their way
    int groups;                // committed
    std::vector<char> stack;
    enum { ready, at_block, at_warp, done } state;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline unsigned running = 0;
inline const std::function<void()>* body = nullptr;
inline std::vector<unsigned char> memory;
inline int votes[2] = {0, 0};  // of this barrier of __syncthreads_or, and of the one before
inline const char* fault = nullptr;

inline unsigned char* shared() { return memory.data() + kGuard; }

// Jumps, where swapcontext() would ask the system for its mask of signals each time.
[[gnu::noinline]] inline void enter(Fiber* fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber->begun) _longjmp(fiber->place, 1);
    fiber->begun = true;
    setcontext(&fiber->context);
}

[[gnu::noinline]] inline void wait(decltype(Fiber::state) where) {
    fibers[running]->state = where;
    if (_setjmp(fibers[running]->place) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
    (*body)();
    wait(Fiber::done);
}

// Lets through the fibers of [begin, end) that all wait at `where`. Whether they did.
inline bool release(unsigned begin, unsigned end, decltype(Fiber::state) where) {
    for (unsigned i = begin; i < end; ++i)
        if (fibers[i]->state != where) return false;
    for (unsigned i = begin; i < end; ++i) fibers[i]->state = Fiber::ready;
    return true;
}

inline void run_block(unsigned threads);

}  // namespace emulator

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline void start(unsigned threads) {
    while (fibers.size() < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        fibers.back()->stack.resize(kStack);
    }
    for (unsigned i = 0; i < threads; ++i) {
        getcontext(&fibers[i]->context);
        fibers[i]->context.uc_stack.ss_sp = fibers[i]->stack.data();
        fibers[i]->context.uc_stack.ss_size = kStack;
        fibers[i]->context.uc_link = nullptr;
        makecontext(&fibers[i]->context, run_fiber, 0);
        fibers[i]->state = Fiber::ready;
        fibers[i]->begun = false;
        fibers[i]->copies.clear();
        fibers[i]->groups = 0;
    }
}

inline void run_block(unsigned threads) {
    start(threads);
    for (;;) {
        bool ran = false;
        for (unsigned n = 0; n < threads; ++n) {
            const unsigned i = settings.descending ? threads - 1 - n : n;
            if (fibers[i]->state != Fiber::ready) continue;
            running = i;
            threadIdx = {i, 0, 0};
            enter(fibers[i].get());
            if (fault != nullptr) throw std::runtime_error(fault);
            ran = true;
        }
        bool released = false;
        for (unsigned w = 0; w < threads; w += kWarp)
            released |= release(w, w + kWarp < threads ? w + kWarp : threads, Fiber::at_warp);
        if (!released && release(0, threads, Fiber::at_block)) {
            votes[1] = votes[0];
            votes[0] = 0;
            released = true;
        }
        if (release(0, threads, Fiber::done)) return;
        if (!ran && !released) throw std::runtime_error("a barrier that not all threads reach");
    }
}

// What `kernel<<<blocks, threads, shared, stream>>>(...)` is turned into.
inline void launch(const void* address, unsigned blocks, unsigned threads, size_t bytes, void* stream,
                   const std::function<void()>& kernel) {
    if (blocks == 0 || threads == 0 || threads > 1024) throw std::runtime_error("an empty or too large launch");
    const auto asked = allowed.find({address, current_device});
    const size_t most = asked == allowed.end() ? kUnasked : asked->second;
    if (bytes > most || bytes > static_cast<size_t>(settings.shared_limit))
        throw std::runtime_error("more shared memory than was asked for");
    last = {blocks, threads, bytes, stream, current_device};
    ++launches;
    body = &kernel;
    fault = nullptr;
    blockDim = {threads, 1, 1};
    gridDim = {blocks, 1, 1};
    for (unsigned block = settings.first_block; block < blocks; ++block) {
        memory.assign(bytes + 2 * kGuard, 0xff);  // NaN as a float, -1 as a number
        blockIdx = {block, 0, 0};
        run_block(threads);
        for (size_t i = 0; i < kGuard; ++i)
            if (memory[i] != 0xff || memory[kGuard + bytes + i] != 0xff)
                throw std::runtime_error("a write outside of shared memory");
    }
    body = nullptr;
}

}  // namespace emulator

// --- the device's functions ---

inline void __syncthreads() { emulator::wait(emulator::Fiber::at_block); }
inline void __syncwarp() { emulator::wait(emulator::Fiber::at_warp); }
inline int __syncthreads_or(int predicate) {
    emulator::votes[0] |= predicate != 0;
    __syncthreads();
    return emulator::votes[1];
}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0)
        emulator::fault = "an asynchronous copy that is not aligned";
    emulator::Fiber& fiber = *emulator::fibers[emulator::running];
    if (emulator::settings.descending)
        std::memcpy(to, from, bytes);
    else
        fiber.copies.push_back({to, from, bytes, fiber.groups});
}
inline void __pipeline_commit() { ++emulator::fibers[emulator::running]->groups; }
inline void __pipeline_wait_prior(int left) {
    emulator::Fiber& fiber = *emulator::fibers[emulator::running];
    std::vector<emulator::Copy> still;
    for (const emulator::Copy& copy : fiber.copies)
        if (copy.group < fiber.groups - left)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            still.push_back(copy);
    fiber.copies = still;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T, class V>
T atomicAdd(T* to, V value) {
    static_assert(!std::is_floating_point_v<T>, "atomics on floats are not repeatable");
    const T before = *to;
    *to = static_cast<T>(before + static_cast<T>(value));
    return before;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(x));
    return bits;
}
struct __half {
    uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half h) {
    _Float16 x;
    std::memcpy(&x, &h.bits, sizeof(x));
    return static_cast<float>(x);
}

// Pairs of 16 bits. max and min give a NaN where either is one.
inline float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float min_or_nan(float a, float b) { return a != a || a < b ? a : b; }
struct __half2 {
    _Float16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<_Float16>(x), static_cast<_Float16>(y)}; }
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return __floats2half2_rn(max_or_nan(a.x, b.x), max_or_nan(a.y, b.y)); }
inline __half2 __hmin2_nan(__half2 a, __half2 b) { return __floats2half2_rn(min_or_nan(a.x, b.x), min_or_nan(a.y, b.y)); }
struct __nv_bfloat162 {
    uint16_t x, y;
};
inline uint16_t bf16_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    return static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float of_bf16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {bf16_bits(x), bf16_bits(y)}; }
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __floats2bfloat162_rn(max_or_nan(of_bf16(a.x), of_bf16(b.x)), max_or_nan(of_bf16(a.y), of_bf16(b.y)));
}
inline __nv_bfloat162 __hmin2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __floats2bfloat162_rn(min_or_nan(of_bf16(a.x), of_bf16(b.x)), min_or_nan(of_bf16(a.y), of_bf16(b.y)));
}

// --- the runtime's ---

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = emulator::current_device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    emulator::current_device = device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
    ++emulator::questions;
    if (device < 0 || device >= static_cast<int>(emulator::devices.size())) return cudaErrorInvalidValue;
    const auto& [shared_limit, multiprocessors] = emulator::devices[static_cast<size_t>(device)];
    *value = name == cudaDevAttrMultiProcessorCount ? multiprocessors : shared_limit;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
    ++emulator::questions;
    if (value > emulator::settings.shared_limit) return cudaErrorInvalidValue;
    emulator::allowed[{reinterpret_cast<const void*>(kernel), emulator::current_device}] = static_cast<size_t>(value);
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    ++emulator::questions;
    *blocks = 2;
    return cudaSuccess;
}

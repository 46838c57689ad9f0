// Sixteen bytes of channels in registers: to fp32 and back, rounded to the nearest even, and the activations.
//
// Activations are intervals and come after the rounding, which is monotone and keeps 0 and 6: two channels of
// 16 bits then take one instruction for each bound. A NaN stays one, as in torch.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstring>

#include "../types.h"
#include "floats.h"

namespace {

// A value that is to stay in its register: else the compiler keeps it packed and unpacks it at each use.
__device__ void keep(float& x) {
#ifdef __CUDA_ARCH__
    asm("" : "+f"(x));
#else
    static_cast<void>(x);
#endif
}

// max and min of which a NaN comes out.
__device__ float max_nan(float a, float b) {
#ifdef __CUDA_ARCH__
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a < b ? b : a;
#endif
}
__device__ float min_nan(float a, float b) {
#ifdef __CUDA_ARCH__
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a > b ? b : a;
#endif
}

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    static constexpr int kCount = 4;
    using Bound = float;

    static __device__ Bound bound(float x) { return x; }
    static __device__ void unpack(const uint4& v, float (&x)[kCount]) {
        x[0] = __uint_as_float(v.x);
        x[1] = __uint_as_float(v.y);
        x[2] = __uint_as_float(v.z);
        x[3] = __uint_as_float(v.w);
    }
    static __device__ uint4 pack(const float (&x)[kCount], Bound low, Bound high) {
        uint32_t bits[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) bits[i] = __float_as_uint(min_nan(max_nan(x[i], low), high));
        return {bits[0], bits[1], bits[2], bits[3]};
    }
};

// Two numbers of 16 bits in a register, the first in the lower half.
struct Bf16Pair {
    using Pair = __nv_bfloat162;
    static __device__ Pair round(float low, float high) { return __floats2bfloat162_rn(low, high); }
    static __device__ float low(uint32_t bits) { return __uint_as_float(bits << 16); }
    static __device__ float high(uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }
};
struct Fp16Pair {
    using Pair = __half2;
    static __device__ Pair round(float low, float high) { return __floats2half2_rn(low, high); }
    static __device__ float low(uint32_t bits) { return to_float(Fp16{static_cast<uint16_t>(bits)}); }
    static __device__ float high(uint32_t bits) { return to_float(Fp16{static_cast<uint16_t>(bits >> 16)}); }
};

template <class Two>
struct HalfLanes {
    static constexpr int kCount = 8;
    using Bound = typename Two::Pair;

    static __device__ Bound bound(float x) { return Two::round(x, x); }
    static __device__ void unpack(const uint4& v, float (&x)[kCount]) {
        const uint32_t bits[] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            x[2 * i] = Two::low(bits[i]);
            x[2 * i + 1] = Two::high(bits[i]);
        }
    }
    static __device__ uint4 pack(const float (&x)[kCount], Bound low, Bound high) {
        uint32_t bits[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const typename Two::Pair y =
                __hmin2_nan(__hmax2_nan(Two::round(x[2 * i], x[2 * i + 1]), low), high);
            memcpy(&bits[i], &y, sizeof(y));
        }
        return {bits[0], bits[1], bits[2], bits[3]};
    }
};

template <>
struct Lanes<Bf16> : HalfLanes<Bf16Pair> {};
template <>
struct Lanes<Fp16> : HalfLanes<Fp16Pair> {};

// The interval of an activation's results; without one, all there is.
template <class T>
struct Bounds {
    typename Lanes<T>::Bound low, high;

    __device__ explicit Bounds(Activation activation)
        : low(Lanes<T>::bound(activation == Activation::none ? -HUGE_VALF : 0.0f)),
          high(Lanes<T>::bound(activation == Activation::relu6 ? 6.0f : HUGE_VALF)) {}
};

}  // namespace

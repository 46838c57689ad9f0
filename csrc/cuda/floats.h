// bf16 and fp16 as the bits that are stored, one at a time.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

[[maybe_unused]] __device__ float to_float(float x) { return x; }
[[maybe_unused]] __device__ float to_float(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
[[maybe_unused]] __device__ float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

}  // namespace

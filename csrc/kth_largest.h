// The k-th largest of some floats, digit by digit of their bits: what the CPU and the CUDA kernel share.
//
// All values are counted by the highest digit of an unsigned number that is in their order; the digit of the
// k-th largest follows from the counts, and the next digit is counted of the values that have this one.
#pragma once

#include <cstdint>

#include "host_device.h"

struct KthLargestArgs {
    const float* x;   // (size)
    int64_t size, k;  // 1 <= k <= size
    float* value;     // NaN where x holds one
};

constexpr int kDigits = 3;
constexpr int kBins = 1 << 11;  // of a digit

// The lowest bit of the digit in this place, the highest first. The last two share a bit: 3 times 11 are 33.
HOST_DEVICE static inline int shift_of(int place) { return place == 0 ? 21 : place == 1 ? 10 : 0; }

// The bits of the digits before this place's.
HOST_DEVICE static inline uint32_t bits_before(int place) {
    return place == 0 ? 0 : UINT32_MAX << shift_of(place - 1);
}

// An unsigned number in the order of the floats. NaN, whatever its sign, is above all and alone in its first
// bin.
HOST_DEVICE static inline uint32_t ordered(uint32_t bits) {
    const uint32_t number = bits ^ (bits >> 31 ? UINT32_MAX : uint32_t{1} << 31);
    return (bits & 0x7fffffff) > 0x7f800000 ? UINT32_MAX : number;
}

HOST_DEVICE static inline uint32_t float_bits(uint32_t number) {
    return number ^ (number >> 31 ? uint32_t{1} << 31 : UINT32_MAX);
}

// The bin of `number` for a digit: kBins where the digits before it are not those of `prefix`.
HOST_DEVICE static inline uint32_t digit_bin(uint32_t number, int shift, uint32_t before, uint32_t prefix) {
    return ((number ^ prefix) & before) == 0 ? number >> shift & (kBins - 1) : kBins;
}

struct Place {
    uint32_t prefix;  // the digits that are known; 0 below
    int64_t rank;     // among the values that have them, 1 for the largest
};

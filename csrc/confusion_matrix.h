// The bin of one pixel: index arithmetic that the CPU and the CUDA kernel share.
#pragma once

#include <cstdint>

#include "host_device.h"

// Element types of label maps, in the order of LABEL_DTYPES in deeplab_fast/ops/native.py.
enum class LabelType : int { u8, i8, i16, i32, i64 };

struct LabelMap {
    const void* data;  // contiguous
    LabelType type;
};

struct ConfusionArgs {
    LabelMap prediction;
    LabelMap target;
    int64_t pixels;
    int32_t num_classes;
    bool has_ignore;
    int64_t ignore_index;
    int64_t* counts;        // (K, K), rows are the truth; added to
    int64_t* out_of_range;  // scalar; added to
};

// Static throughout: an inline function with external linkage would be merged across the objects of different
// instruction sets.

// A label as an unsigned 32-bit number; one that does not fit turns into the largest, as a negative one turns
// into a number above every class. Vector units have twice the lanes for 32 bits.
HOST_DEVICE static inline uint32_t narrow(int32_t label) { return static_cast<uint32_t>(label); }
HOST_DEVICE static inline uint32_t narrow(int64_t label) {
    const uint64_t wide = static_cast<uint64_t>(label);
    return static_cast<uint32_t>(wide < UINT32_MAX ? wide : UINT32_MAX);
}

// Bins 0 .. K*K-1 are the matrix in row-major order, K*K counts labels out of range, K*K + 1 is never read.
template <class Prediction, class Target>
HOST_DEVICE static inline uint32_t confusion_bin(Prediction prediction, Target target, uint32_t num_classes,
                                                 bool has_ignore, Target ignore) {
    const uint32_t out = num_classes * num_classes;
    const uint32_t p = narrow(prediction);
    const uint32_t t = narrow(target);
    const uint32_t counted = (p < num_classes) & (t < num_classes) ? t * num_classes + p : out;
    return has_ignore & (target == ignore) ? out + 1 : counted;
}

// Whether a target of this type can hold the value to ignore at all: 255 is no int8.
template <class Target>
HOST_DEVICE static inline bool holds(int64_t value) {
    return static_cast<int64_t>(static_cast<Target>(value)) == value;
}

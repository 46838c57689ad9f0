// What the CPU and the CUDA kernel of upsample_confusion_matrix are given.
#pragma once

#include "confusion_matrix.h"
#include "upsample_argmax.h"

struct UpsampleConfusionArgs {
    UpsampleArgmaxArgs upsample;  // without `labels`
    LabelMap target;              // (batch, height, width)
    bool has_ignore;
    int64_t ignore_index;
    int64_t* counts;        // (K, K), rows are the truth; added to
    int64_t* out_of_range;  // scalar; added to
};

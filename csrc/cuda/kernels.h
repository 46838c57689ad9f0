// The launchers of the CUDA kernels. Each makes `device` current, enqueues on `stream` without waiting, and
// throws std::runtime_error with the runtime's words when the launch is refused.
#pragma once

#include "../augment_image.h"
#include "../confusion_matrix.h"
#include "../kth_largest.h"
#include "../upsample_argmax.h"
#include "../upsample_confusion_matrix.h"
#include "depthwise_plan.h"

using CudaStream = void*;  // cudaStream_t

namespace cuda {

void augment_image(const CropArgs& args, int device, CudaStream stream);
void augment_image_mask(const CropArgs& args, int device, CudaStream stream);
void confusion_matrix(const ConfusionArgs& args, int device, CudaStream stream);
void depthwise_conv(const DepthwiseCudaArgs& args, int device, CudaStream stream);
// Parts of the statistics for which `args` needs a place.
int64_t depthwise_conv_parts(const DepthwiseCudaArgs& args, int device);
// counts: zeros (kDigits, kBins)
void kth_largest(const KthLargestArgs& args, int64_t* counts, int device, CudaStream stream);
void upsample_argmax(const UpsampleArgmaxArgs& args, int device, CudaStream stream);
void upsample_confusion_matrix(const UpsampleConfusionArgs& args, int device, CudaStream stream);

}  // namespace cuda

// The launchers of the CUDA kernels. Each makes `device` current, enqueues on `stream` without waiting, and
// throws std::runtime_error with the runtime's words when the launch is refused.
#pragma once

#include "../confusion_matrix.h"

using CudaStream = void*;  // cudaStream_t

namespace cuda {

void confusion_matrix(const ConfusionArgs& args, int device, CudaStream stream);

}  // namespace cuda

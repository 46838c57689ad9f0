#pragma once

#include "../augment_image.h"
#include "kernels.h"

// 3 channels, bilinear, antialiased where it shrinks. False: out of memory.
DECLARE_CPU_KERNEL(augment_image, bool(const CropArgs& args, int threads))
// 1 channel, nearest. False: out of memory.
DECLARE_CPU_KERNEL(augment_image_mask, bool(const CropArgs& args, int threads))

// Numbers that Python passes for element types and activations, in the order of CUDA_FLOAT_DTYPES and
// ACTIVATIONS in deeplab_fast/ops/native.py. The CPU kernels know no f16.
#pragma once

enum class DType : int { f32, bf16, f16 };
enum class Activation : int { none, relu, relu6 };

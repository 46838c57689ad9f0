// Numbers that Python passes for element types and activations, in the order of FLOAT_DTYPES and ACTIVATIONS
// in deeplab_fast/ops/native.py.
#pragma once

enum class DType : int { f32, bf16 };
enum class Activation : int { none, relu, relu6 };

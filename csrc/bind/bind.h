// What csrc/bind/<op>.cpp are made of: each adds its op's launchers to the module. Pointers travel as
// integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <optional>

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_batch_norm_act(py::module_& m);
void bind_confusion_matrix(py::module_& m);
void bind_depthwise_conv(py::module_& m);
void bind_depthwise_conv_backward(py::module_& m);
void bind_augment_image(py::module_& m);
void bind_kth_largest(py::module_& m);
void bind_normalize_image(py::module_& m);
void bind_separable_conv(py::module_& m);
void bind_upsample_argmax(py::module_& m);
void bind_upsample_concat(py::module_& m);
void bind_upsample_confusion_matrix(py::module_& m);
void bind_upsample_cross_entropy(py::module_& m);

"""Gradients of a depthwise 3 x 3 convolution: torch channels-last and NCHW, against the backends."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEPTHWISE_BACKWARD
from deeplab_fast.ops import depthwise_conv_backward, dispatch
from deeplab_fast.ops.depthwise_conv_backward import depthwise_conv_backward_reference
from deeplab_fast.testing import assert_close

OP = "depthwise_conv_backward"


@functools.cache
def inputs(
    shape: tuple[int, ...], stride: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_y, x and weight; grad_y of the size that a loss averaged over the pixels gives, times a constant."""
    generator = torch.Generator().manual_seed(0)
    out = (*shape[:2], *((size - 1) // stride + 1 for size in shape[2:]))
    scale = (out[0] * out[2] * out[3]) ** -0.5
    grad_y, x = (torch.randn(s, generator=generator).to(device, dtype) for s in (out, shape))
    weight = torch.randn((shape[1], 1, 3, 3), generator=generator).to(device, dtype)
    return (grad_y * scale).contiguous(memory_format=layout), x.contiguous(memory_format=layout), weight


@functools.cache
def expected_gradients(
    shape: tuple[int, ...], stride: int, dilation: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    tensors = inputs(shape, stride, dtype, torch.channels_last, device)
    return depthwise_conv_backward_reference(*(t.float() for t in tensors), stride, dilation, True, True)


@pytest.mark.parametrize("variant", ["native", "triton", "reference", "eager", "eager_nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEPTHWISE_BACKWARD)
def bench_depthwise_conv_backward(timed, device, name, dtype, variant):
    shape, stride, dilation = DEPTHWISE_BACKWARD[name]
    layout = torch.contiguous_format if variant == "eager_nchw" else torch.channels_last
    grad_y, x, weight = tensors = inputs(shape, stride, dtype, layout, device)
    if variant.startswith("eager"):
        window = [stride] * 2, [dilation] * 2, [dilation] * 2, False, [0, 0], shape[1], [True, True, False]
        run = lambda: torch.ops.aten.convolution_backward(*tensors, None, *window)[:2]  # noqa: E731
    else:
        if reason := dispatch.explain(OP, *tensors, stride, dilation, True, True)[variant]:
            pytest.skip(reason)
        run = lambda: depthwise_conv_backward(*tensors, stride=stride, dilation=dilation, backend=variant)  # noqa: E731

    def check(results: tuple[Tensor, Tensor]) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        for result, expected in zip(results, expected_gradients(shape, stride, dilation, dtype, device), strict=True):
            if variant.startswith("eager"):  # its long sums are rounded more than a kernel's may be
                assert (result.double() - expected.double()).norm() <= 0.02 * expected.double().norm()
            else:
                assert_close(result, expected)

    # grad_y and x are read once, grad_x is written once; weights are nothing beside them.
    bytes_moved = (grad_y.numel() + 2 * x.numel()) * x.element_size()
    timed(f"{OP} {name} {str(dtype).removeprefix('torch.')}", variant, run, check, bytes_moved)

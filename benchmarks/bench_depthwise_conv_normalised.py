"""Batch norm, ReLU6, depthwise 3 x 3 and the statistics of the next norm in training, forward and backward.

"one_by_one" is batch_norm_act and depthwise_conv_statistics, with the activated tensor between them, on the CPU by what
`auto` takes and on a GPU by Triton.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import DEPTHWISE_NORMALISED
from deeplab_fast.ops import (
    batch_norm_act,
    batch_norm_statistics,
    depthwise_conv_normalised,
    depthwise_conv_statistics,
    dispatch,
)
from deeplab_fast.testing import tolerances

OP = "depthwise_conv_normalised"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def case(name: str, dtype: str, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, the convolution's weight, and the norm's weight and bias, all asking for a gradient; and that of y.

    No normalised x lies at a bend of ReLU6, where a statistic's last digits decide whether a gradient passes: torch's
    are off by 3e-6 in fp32, which 8 of 65,536 pixels turn into a gradient that is off by 1e-3.
    """
    shape, stride, _ = DEPTHWISE_NORMALISED[name]
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (*shape[:2], *((size - 1) // stride + 1 for size in shape[2:]))
    x, grad = (
        torch.randn(size, generator=generator).to(device, DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
        for size in sizes
    )
    conv_weight = torch.randn((shape[1], 1, 3, 3), generator=generator).to(device, DTYPES[dtype])
    weight, bias = (torch.rand(shape[1], generator=generator).to(device) + 0.5 for _ in range(2))
    z = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    x[(z.abs() < 1e-4) | ((z - 6).abs() < 1e-4)] += 0.05
    return [t.requires_grad_() for t in (x, conv_weight, weight, bias)], grad


def eager(x: Tensor, conv_weight: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
    z = F.relu6(F.batch_norm(x, None, None, weight, bias, training=True), inplace=True)
    y = F.conv2d(z, conv_weight, None, stride, dilation, dilation, groups=x.shape[1])
    torch.var_mean(y.detach(), (0, 2, 3), correction=0)
    return y


@functools.cache
def expected(name: str, dtype: str, device: torch.device) -> list[Tensor]:
    inputs, grad = case(name, dtype, device)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = eager(*wide, *DEPTHWISE_NORMALISED[name][1:])
    return [y.detach(), *torch.autograd.grad(y, wide, grad.double())]


@pytest.mark.parametrize("variant", ["native", "triton", "reference", "one_by_one", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEPTHWISE_NORMALISED)
def bench_depthwise_conv_normalised(timed, device, name, dtype, variant):
    shape, stride, dilation = DEPTHWISE_NORMALISED[name]
    inputs, grad = case(name, dtype, device)
    x, conv_weight, weight, bias = inputs
    window = {"stride": stride, "dilation": dilation}
    of_op = variant in dispatch.OPS[OP].backends
    if of_op and (reason := dispatch.OPS[OP].backends[variant].why_not(x, conv_weight)):
        pytest.skip(reason)

    ours = "triton" if device.type == "cuda" and variant != "reference" else "auto"  # kernels that the op is made up to

    def forward() -> Tensor:
        if variant == "eager":
            return eager(*inputs, stride, dilation)
        statistics = batch_norm_statistics(x, backend=ours)
        if of_op:
            given = (x, conv_weight, *statistics, weight, bias)
            return depthwise_conv_normalised(*given, activation="relu6", backend=variant, **window)[0]
        z = batch_norm_act(x, *statistics, weight, bias, activation="relu6", backend=ours)
        return depthwise_conv_statistics(z, conv_weight, **window, backend=ours)[0]

    def run() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    def check(results: list[Tensor]) -> None:
        if of_op:
            assert dispatch.last_backend(OP) == variant
        for result, exact in zip(results, expected(name, dtype, device), strict=True):
            assert (result.double() - exact).norm() <= 2 * tolerances(x.dtype)[0] * exact.norm()

    # Statistics read x; forward reads x and writes y; backward reads grad and x and writes a gradient, and once more.
    bytes_moved = (7 * x.numel() + 2 * grad.numel()) * x.element_size()
    timed(f"{OP} {name} {dtype}", variant, run, check, bytes_moved)

"""Depthwise convolution with affine and activation, three rates of one input, and convolution with statistics.

In bf16 at stride 1 AVX-512 takes for 32 outputs 8 vdpbf16ps and 4 multiply-adds, for which Zen 4, which halves these
vectors, needs 12 cycles: .22 ms for 2048 x 32 x 64 on two cores of 3.6 GHz. With 4 bounds, 8 unpackings and roundings
and 3 loads beside them it is 26 out of the second-level cache (.47 ms); the rest at 2048 channels, where pixels are
pages apart, is memory.

eager is conv2d, batch_norm and relu as a model has them; pad is the workaround for a large dilation, which gives
oneDNN a convolution without padding.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEPTHWISE, DEPTHWISE_RATES, TINY
from deeplab_fast.ops import depthwise_conv, depthwise_conv_rates, depthwise_conv_statistics, dispatch
from deeplab_fast.ops.depthwise_conv import depthwise_conv_reference, depthwise_conv_statistics_reference
from deeplab_fast.testing import assert_close

OP = "depthwise_conv"
ACTIVATION = "relu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def tensors(shape: tuple[int, ...], dtype: str, device: torch.device) -> list[Tensor]:
    """x, weight, and the mean, variance, gamma and beta of a batch norm."""
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    x = torch.randn(shape, generator=generator).to(device, DTYPES[dtype], memory_format=torch.channels_last)
    weight = torch.randn(c, 1, 3, 3, generator=generator).to(device, DTYPES[dtype])
    norm = [torch.rand(c, generator=generator).add(0.5).to(device) for _ in range(4)]
    return [x, weight, *norm]


def folded(mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    scale = gamma * (variance + 1e-5).rsqrt()
    return scale, beta - mean * scale


def eager(x: Tensor, weight: Tensor, *norm: Tensor, stride: int, dilation: int) -> Tensor:
    y = F.conv2d(x, weight, None, stride, dilation, dilation, groups=x.shape[1])
    return F.relu(F.batch_norm(y, *norm))


def pad(x: Tensor, weight: Tensor, *norm: Tensor, stride: int, dilation: int) -> Tensor:
    y = F.conv2d(F.pad(x, [dilation] * 4), weight, None, stride, 0, dilation, groups=x.shape[1])
    return F.relu(F.batch_norm(y, *norm))


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


@functools.cache
def expected(shape: tuple[int, ...], dtype: str, stride: int, dilation: int, device: torch.device) -> Tensor:
    x, weight, *norm = tensors(shape, dtype, device)
    return depthwise_conv_reference(x.float(), weight.float(), *folded(*norm), stride, dilation, ACTIVATION)


def skip_without_compiler(variant: str) -> None:
    if variant.endswith("compile") and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")


def layer(variant: str, given: list[Tensor], stride: int, dilation: int) -> Callable[[], Tensor]:
    x, weight, *norm = given
    if variant in dispatch.OPS[OP].backends:
        options = {"stride": stride, "dilation": dilation, "activation": ACTIVATION, "backend": variant}
        return functools.partial(depthwise_conv, x, weight, *folded(*norm), **options)
    function = pad if variant.startswith("pad") else eager
    if variant == "eager_nchw":
        x = x.contiguous()
    if variant.endswith("compile"):
        function = compiled(function)
    return functools.partial(function, x, weight, *norm, stride=stride, dilation=dilation)


@pytest.mark.parametrize("variant", ["native", "triton", "eager", "eager_nchw", "pad", "compile", "pad_compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEPTHWISE)
def bench_depthwise_conv(timed, device, name, dtype, variant):
    shape, stride, dilation = DEPTHWISE[name]
    skip_without_compiler(variant)
    if variant.startswith("pad") and dilation <= 6:
        pytest.skip("the workaround is one for a dilation above 6")
    given = tensors(shape, dtype, device)
    run = layer(variant, given, stride, dilation)
    backends = dispatch.explain(OP, *given[:4], stride, dilation, ACTIVATION)
    if reason := backends.get(variant):
        pytest.skip(reason)

    def check(y: Tensor) -> None:
        if variant in backends:
            assert dispatch.last_backend(OP) == variant
            assert_close(y, expected(shape, dtype, stride, dilation, device))
        else:
            close_to_eager(y, expected(shape, dtype, stride, dilation, device))

    # x is read once and y written once; weight, scale and shift are nothing beside them.
    bytes_moved = given[0].nbytes * (1 + 1 / stride**2)
    with torch.no_grad():
        timed(f"{OP} {name} {dtype}", variant, run, check, int(bytes_moved))


def close_to_eager(y: Tensor, truth: Tensor) -> None:
    """Eager rounds each of three steps."""
    for _ in range(2 if y.dtype == torch.bfloat16 else 0):
        y, truth = y / 2, truth / 2
    assert_close(y, truth)


@pytest.mark.parametrize("variant", ["native", "single_calls", "triton", "triton_single_calls", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEPTHWISE_RATES)
def bench_depthwise_conv_rates(timed, device, name, dtype, variant):
    shape, dilations = DEPTHWISE_RATES[name]
    given = tensors(shape, dtype, device)
    x, weight, *norm = given
    scale, shift = folded(*norm)
    three = [[tensor] * len(dilations) for tensor in (weight, scale, shift)]
    backends = dispatch.explain(f"{OP}_rates", x, *three, dilations, ACTIVATION)
    backend = "native" if variant == "single_calls" else variant.removesuffix("_single_calls")
    if reason := backends.get(backend):
        pytest.skip(reason)
    if variant in backends:
        options = {"dilations": dilations, "activation": ACTIVATION, "backend": variant}
        run = functools.partial(depthwise_conv_rates, x, *three, **options)
    else:
        calls = [layer(backend, given, 1, dilation) for dilation in dilations]
        run = lambda: [call() for call in calls]  # noqa: E731

    def check(results: list[Tensor]) -> None:
        for y, dilation in zip(results, dilations, strict=True):
            truth = expected(shape, dtype, 1, dilation, device)
            close_to_eager(y, truth) if variant == "eager" else assert_close(y, truth)

    # x is read once and each result written once
    with torch.no_grad():
        timed(f"{OP}_rates {name} {dtype}", variant, run, check, x.nbytes * (1 + len(dilations)))


def eager_statistics(x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, ...]:
    y = F.conv2d(x, weight, None, stride, dilation, dilation, groups=x.shape[1])
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    return y, mean, variance


@pytest.mark.parametrize("variant", ["native", "triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in DEPTHWISE if "train" in name or TINY])
def bench_depthwise_conv_statistics(timed, device, name, dtype, variant):
    shape, stride, dilation = DEPTHWISE[name]
    x, weight, *_ = tensors(shape, dtype, device)
    backends = dispatch.explain(f"{OP}_statistics", x, weight, stride, dilation)
    if reason := backends.get(variant):
        pytest.skip(reason)
    run: Callable[[], Any] = functools.partial(eager_statistics, x, weight, stride, dilation)
    if variant in backends:
        options = {"stride": stride, "dilation": dilation, "backend": variant}
        run = functools.partial(depthwise_conv_statistics, x, weight, **options)
    truth = depthwise_conv_statistics_reference(x, weight, stride, dilation)

    def check(results: tuple[Tensor, ...]) -> None:
        for a, e in zip(results, truth, strict=True):
            assert_close(a.to(x.dtype), e)

    # x is read once and y written once
    with torch.no_grad():
        timed(f"{OP}_statistics {name} {dtype}", variant, run, check, int(x.nbytes * (1 + 1 / stride**2)))

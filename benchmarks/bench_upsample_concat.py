"""Upsample and concatenate, as decoders have it: F.interpolate and torch.cat against the backends."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DECODERS, DECODERS_TRAINED, TINY
from deeplab_fast.ops import dispatch, upsample_concat
from deeplab_fast.ops.upsample_concat import upsample_concat_reference
from deeplab_fast.testing import assert_close

OP = "upsample_concat"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = ["native", "triton", "reference", "eager", "eager_nchw", "compile"]


def eager(x: Tensor, low_level: Tensor) -> Tensor:
    resized = F.interpolate(x, size=low_level.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat((resized, low_level), 1)


compiled = torch.compile(eager, dynamic=False)


def autocast(x: Tensor, low_level: Tensor) -> Tensor:
    """Upsampled and concatenated in fp32, as a GPU's autocast has it; the layer after it takes its own dtype."""
    with torch.autocast(x.device.type, x.dtype):
        return eager(x, low_level).to(x.dtype)


@functools.cache
def inputs(shape: tuple, low_shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, low_level and the gradient of the result, channels-last."""
    generator = torch.Generator().manual_seed(0)
    batch, channels = shape[:2]
    shapes = (shape, (batch, *low_shape), (batch, channels + low_shape[0], *low_shape[1:]))
    tensors = [torch.randn(size, generator=generator) for size in shapes]
    return tuple(t.to(device, dtype, memory_format=torch.channels_last) for t in tensors)


@functools.cache
def expected(shape: tuple, low_shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The result and both gradients, in fp64."""
    x, low_level, grad = (t.double() for t in inputs(shape, low_shape, dtype, device))
    pair = x.requires_grad_(), low_level.requires_grad_()
    result = upsample_concat_reference(*pair, False)
    return (result.detach(), *torch.autograd.grad(result, pair, grad))


def forward_of(variant: str, x: Tensor, low_level: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Skips what cannot run here."""
    if variant == "compile":
        if shutil.which("g++") is None:
            pytest.skip("torch.compile needs g++")
        if TINY and x.dtype == torch.bfloat16:
            pytest.skip("one compilation is enough to show that it works")
        return compiled
    if variant == "autocast":
        if x.device.type == "cpu" or x.dtype == torch.float32:
            pytest.skip("autocast leaves this as it is")
        return autocast
    if variant.startswith("eager"):
        return eager
    if reason := dispatch.explain(OP, x, low_level, False)[variant]:
        pytest.skip(reason)
    return functools.partial(upsample_concat, backend=variant)


@pytest.mark.parametrize("variant", [*VARIANTS, "autocast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def bench_forward(timed, device, name, dtype, variant):
    case = (*DECODERS[name], DTYPES[dtype], device)
    x, low_level, grad = inputs(*case)
    forward = forward_of(variant, x, low_level)
    if variant == "eager_nchw":
        x, low_level = x.contiguous(), low_level.contiguous()

    def run() -> Tensor:
        with torch.no_grad():
            return forward(x, low_level)

    def check(result: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        assert_close(result, expected(*case)[0])

    # Both inputs are read and the result is written, once.
    bytes_moved = sum(t.numel() for t in (x, low_level, grad)) * x.element_size()
    timed(f"{OP} {name} {dtype}", variant, run, check, bytes_moved)


@pytest.mark.parametrize("variant", [*VARIANTS, "autocast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS_TRAINED)
def bench_forward_and_backward(timed, device, name, dtype, variant):
    case = (*DECODERS_TRAINED[name], DTYPES[dtype], device)
    x, low_level, grad = inputs(*case)
    forward = forward_of(variant, x, low_level)
    memory_format = torch.contiguous_format if variant == "eager_nchw" else torch.channels_last
    pair = [t.detach().clone(memory_format=memory_format).requires_grad_() for t in (x, low_level)]
    grad = grad.contiguous(memory_format=memory_format)

    def run() -> tuple[Tensor, ...]:
        result = forward(*pair)
        return (result.detach(), *torch.autograd.grad(result, pair, grad))

    def check(results: tuple[Tensor, ...]) -> None:
        if variant in ("native", "triton"):
            assert dispatch.last_backend(f"{OP}_backward") == variant
        for mine, true in zip(results, expected(*case), strict=True):
            assert_close(mine, true)

    # Forward as above; backward reads the result's gradient and writes both inputs'.
    bytes_moved = 2 * sum(t.numel() for t in (*pair, grad)) * x.element_size()
    timed(f"{OP} training {name} {dtype}", variant, run, check, bytes_moved)

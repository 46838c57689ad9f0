"""Separable convolution with folded norms: layers as users write them, and the bare pointwise product, against ours."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import SEPARABLE, TINY
from deeplab_fast.ops import dispatch, separable_conv, separable_conv_concat
from deeplab_fast.ops.separable_conv import separable_conv_reference
from deeplab_fast.testing import assert_close

OP = "separable_conv"
EPS = 2.0**-20  # plus the variance that is given, exactly 1; torch 2.11 does not take 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILED = {"compile": ("aspp", "decoder", "tiny"), "pad_compile": ("aspp",)}  # and the shapes they run at
VARIANTS = ["native", "triton", "eager", "eager_nchw", "pad", *COMPILED, "product", "product_conv"]
if TINY:
    VARIANTS.append("reference")  # fp32 arithmetic of eager layers: slow at real sizes, and nothing new


@functools.cache
def inputs(name: str, dtype: str, device: torch.device) -> tuple[Tensor, ...]:
    """x in channels-last memory, both weights, and scale and shift of each norm, in fp32."""
    (n, c, h, w), m, _ = SEPARABLE[name]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=random)
    depthwise = torch.randn(c, 1, 3, 3, generator=random) / 3
    pointwise = torch.randn(m, c, 1, 1, generator=random) / c**0.5
    norms = [f(k, generator=random) for k in (c, m) for f in (torch.rand, torch.randn)]
    low = (t.to(device, DTYPES[dtype]) for t in (x, depthwise, pointwise))
    x, depthwise, pointwise = (t.contiguous(memory_format=torch.channels_last) for t in low)
    return x, depthwise, pointwise, *(t.to(device) for t in norms)


@functools.cache
def expected(name: str, dtype: str, device: torch.device, *, bare: bool) -> Tensor:
    """Of the whole op, or of the pointwise product alone, in fp32."""
    x, depthwise, pointwise, *norms = (t.float() for t in inputs(name, dtype, device))
    if bare:
        return torch.einsum("nchw,mc->nmhw", x, pointwise.flatten(1))
    return separable_conv_reference(
        x, depthwise, pointwise.flatten(1), *norms[:2], "relu", *norms[2:], "relu", SEPARABLE[name][2]
    )


def layers(x: Tensor, depthwise: Tensor, pointwise: Tensor, *norms: Tensor, dilation: int, pad: bool) -> Tensor:
    """Two convolutions, two batch norms and two activations; `pad`: the padding is written out first."""
    padding = 0 if pad else dilation
    y = F.pad(x, (dilation,) * 4) if pad else x
    for weight, scale, shift in ((depthwise, *norms[:2]), (pointwise, *norms[2:])):
        groups = x.shape[1] if weight is depthwise else 1
        y = F.conv2d(y, weight, None, 1, padding, dilation if weight is depthwise else 1, groups)
        mean, var = torch.zeros_like(scale), torch.full_like(scale, 1 - EPS)
        y = F.relu(F.batch_norm(y, mean, var, scale, shift, eps=EPS))
        padding = 0
    return y


def runner(name: str, dtype: str, variant: str, device: torch.device) -> Callable[[], Tensor]:
    tensors = inputs(name, dtype, device)
    x, depthwise, pointwise, *norms = tensors
    dilation = SEPARABLE[name][2]
    if variant == "product":
        pixels, weight = x.permute(0, 2, 3, 1), pointwise.flatten(1).t().contiguous()
        return lambda: (pixels @ weight).permute(0, 3, 1, 2)
    if variant == "product_conv":
        return lambda: F.conv2d(x, pointwise)
    if variant in dispatch.OPS[OP].backends:
        options = {"depthwise_activation": "relu", "activation": "relu", "dilation": dilation, "backend": variant}
        options |= dict(zip(("depthwise_scale", "depthwise_shift", "scale", "shift"), norms, strict=True))
        return lambda: separable_conv(x, depthwise, pointwise, **options)
    if variant == "eager_nchw":
        tensors = tuple(t.contiguous() for t in tensors)
    run = torch.compile(layers, dynamic=False) if variant in COMPILED else layers
    return lambda: run(*tensors, dilation=dilation, pad=variant.startswith("pad"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEPARABLE)
def bench_separable_conv(timed, device, name, dtype, variant):
    if variant in COMPILED and not shutil.which("g++"):
        pytest.skip("torch.compile needs g++")
    if variant in COMPILED and (name not in COMPILED[variant] or (TINY and dtype == "bf16")):
        pytest.skip("compiling takes longer than all measurements: for some shapes only")
    x, _, pointwise, *norms = inputs(name, dtype, device)
    if variant in dispatch.OPS[OP].backends:
        rest = (*norms[:2], "relu", *norms[2:], "relu", SEPARABLE[name][2], 1)
        if reason := dispatch.explain(OP, x, inputs(name, dtype, device)[1], pointwise.flatten(1), *rest)[variant]:
            pytest.skip(reason)

    def check(y: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        assert_close(y, expected(name, dtype, device, bare=variant.startswith("product")))

    # x is read and y is written, once; the weights are little beside them.
    bytes_moved = x.element_size() * (x.numel() + x.numel() // x.shape[1] * pointwise.shape[0])
    run, flops = runner(name, dtype, variant, device), 2 * x.numel() * pointwise.shape[0]  # the product's
    with torch.inference_mode():
        timed(f"{OP} {name} {dtype}", variant, run, check, bytes_moved, flops)


RATES = {"aspp": (6, 12, 18), "aspp_mobile": (6, 12, 18), "tiny": (1, 3, 5)}
CONCAT = "separable_conv_concat"


@functools.cache
def branches(name: str, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ASPP's 1x1 branch and its pooled one, which are no separable convolutions, and x."""
    x, m = inputs(name, dtype, device)[0], SEPARABLE[name][1]
    random = torch.Generator().manual_seed(1)
    first = torch.randn(x.shape[0], m, *x.shape[2:], generator=random).to(device, DTYPES[dtype])
    last = torch.randn(x.shape[0], m, 1, 1, generator=random).to(device, DTYPES[dtype])
    return x, first.contiguous(memory_format=torch.channels_last), last


def side_by_side(x: Tensor, first: Tensor, last: Tensor, separable: Callable[[int], Tensor], name: str) -> Tensor:
    parts = [first, *(separable(rate) for rate in RATES[name]), torch.empty_like(first).copy_(last)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("variant", ["native", "triton", "one_by_one", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in SEPARABLE if name in RATES])
def bench_separable_conv_concat(timed, device, name, dtype, variant):
    """one_by_one: the fused branches, then torch.cat."""
    _, depthwise, pointwise, *norms = inputs(name, dtype, device)
    x, first, last = branches(name, dtype, device)
    rates = list(RATES[name])
    lists = [[t] * len(rates) for t in (depthwise, pointwise, *norms)]
    names = ("depthwise_scales", "depthwise_shifts", "scales", "shifts")
    options = {"dilations": rates, "depthwise_activation": "relu", "activation": "relu"}
    options |= dict(zip(names, lists[2:], strict=True))
    if variant in dispatch.OPS[CONCAT].backends:
        flat = [pointwise.flatten(1)] * len(rates)
        rest = (lists[0], flat, *lists[2:4], "relu", *lists[4:], "relu", rates)
        if reason := dispatch.explain(CONCAT, x, first, last, *rest)[variant]:
            pytest.skip(reason)
        run = lambda: separable_conv_concat(x, first, last, *lists[:2], **options, backend=variant)  # noqa: E731
    elif variant == "one_by_one":
        single = dict(zip((n[:-1] for n in names), norms, strict=True))
        single |= {"depthwise_activation": "relu", "activation": "relu"}
        separable = lambda rate: separable_conv(x, depthwise, pointwise, **single, dilation=rate)  # noqa: E731
        run = lambda: side_by_side(x, first, last, separable, name)  # noqa: E731
    else:
        separable = lambda rate: layers(x, depthwise, pointwise, *norms, dilation=rate, pad=False)  # noqa: E731
        run = lambda: side_by_side(x, first, last, separable, name)  # noqa: E731

    def check(y: Tensor) -> None:
        if variant in dispatch.OPS[CONCAT].backends:
            assert dispatch.last_backend(CONCAT) == variant
        wide = [t.float() for t in (x, depthwise, pointwise.flatten(1))]
        affines = (*norms[:2], "relu", *norms[2:], "relu")
        reference = lambda rate: separable_conv_reference(*wide, *affines, rate)  # noqa: E731
        assert_close(y, side_by_side(x, first.float(), last.float(), reference, name))

    # x is read once for each rate, as long as it does not stay in a cache; first is read, the result written.
    bytes_moved = x.element_size() * (len(rates) * x.numel() + (3 + len(rates)) * first.numel())
    with torch.inference_mode():
        timed(f"{CONCAT} {name} {dtype}", variant, run, check, bytes_moved, 2 * len(rates) * x.numel() * first.shape[1])

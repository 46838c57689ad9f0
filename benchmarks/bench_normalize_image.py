"""Pixels to the network's input: plain PyTorch, the same compiled, and the backends."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import IMAGES
from deeplab_fast.ops import dispatch, normalize_image
from deeplab_fast.ops.normalize_image import GREY, MEAN, STD, normalize_image_reference
from deeplab_fast.testing import assert_close

OP = "normalize_image"
SIGMA = 1.0


@functools.cache
def batch(shape: tuple[int, int, int], kind: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pixels and colour: plain as in evaluation, jitter, or jitter and a blur of every image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (*shape, 3), generator=generator).byte().to(device)
    if kind == "plain":
        return images, None
    colour = 0.7 + 0.6 * torch.rand((shape[0], 4), generator=generator)
    colour[:, 3] = SIGMA if kind == "blur" else 0
    return images, colour


def eager(images: Tensor, colour: Tensor | None, dtype: torch.dtype, blur: bool) -> Tensor:
    """Step after step as a user writes it, the blur as a depthwise convolution."""
    x = images.permute(0, 3, 1, 2).float()
    if colour is not None:
        b, c, s = (column.to(x.device)[:, None, None, None] for column in colour[:, :3].unbind(1))
        weights = torch.tensor(GREY, device=x.device)[:, None, None]
        x = x * b
        x = c * x + (1 - c) * (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        x = (s * x + (1 - s) * (x * weights).sum(1, keepdim=True)).clamp(0, 255)
    if blur:
        radius = math.ceil(3 * SIGMA)
        taps = torch.exp(-(torch.arange(-radius, radius + 1, device=x.device) ** 2) / (2 * SIGMA**2))
        taps = (taps / taps.sum()).expand(3, 1, 1, -1)
        x = F.conv2d(F.pad(x, [radius] * 4, mode="replicate"), taps, groups=3)
        x = F.conv2d(x, taps.transpose(2, 3), groups=3)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return ((x / 255 - mean) / std).to(dtype, memory_format=torch.channels_last)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(eager, dynamic=False)


@functools.cache
def expected(name: str, kind: str, device: torch.device) -> Tensor:
    return normalize_image_reference(*batch(IMAGES[name], kind, device), torch.float64)


@pytest.mark.parametrize("variant", ["native", "triton", "reference", "eager", "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "jitter", "blur"])
@pytest.mark.parametrize("name", IMAGES)
def bench_normalize_image(timed, device, name, kind, dtype, variant):
    images, colour = batch(IMAGES[name], kind, device)
    blur = kind == "blur"
    if variant == "eager":
        run = lambda: eager(images, colour, dtype, blur)  # noqa: E731
    elif variant == "compile":
        if not shutil.which("g++"):
            pytest.skip("torch.compile needs a C++ compiler")
        if name == "tiny" and (kind, dtype) != ("jitter", torch.float32):
            pytest.skip("one compilation shows that it works")
        run = lambda: compiled()(images, colour, dtype, blur)  # noqa: E731
    else:
        if reason := dispatch.explain(OP, images, colour, dtype, True)[variant]:
            pytest.skip(reason)
        run = lambda: normalize_image(images, colour, dtype=dtype, backend=variant)  # noqa: E731

    def check(x: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert_close(x, expected(name, kind, device))

    # Every byte is read once, and the result written once.
    bytes_moved = images.numel() * (1 + dtype.itemsize)
    timed(f"{OP} {name} {kind} {str(dtype).removeprefix('torch.')}", variant, run, check, bytes_moved)

"""Label map of upsampled logits: F.interpolate and argmax, as predictions have it, against the backends."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import UPSAMPLED_LOGITS
from deeplab_fast.ops import dispatch, upsample_argmax
from deeplab_fast.testing import assert_close

OP = "upsample_argmax"
CASES = [(name, dtype) for name in UPSAMPLED_LOGITS for dtype in ("float32", "bfloat16")]


@functools.cache
def logits_map(shape: tuple[int, ...], kind: str, dtype: str, device: torch.device) -> Tensor:
    """random: every pixel on its own, so that nothing can be skipped; smooth: regions of about 32 pixels, and noise"""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    if kind == "smooth":
        coarse = torch.randn((*shape[:2], shape[2] // 32 + 2, shape[3] // 32 + 2), generator=generator)
        logits = 0.05 * logits + 4 * F.interpolate(coarse, size=shape[2:], mode="bicubic")
    return logits.to(device, getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)


def eager(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear").argmax(1)


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


@functools.lru_cache(maxsize=1)
def upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear")


@pytest.mark.parametrize("variant", ["native", "reference", "eager", "eager_nchw", "compile"])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("name, dtype", CASES)
def bench_upsample_argmax(timed, device, name, dtype, kind, variant):
    shape, size = UPSAMPLED_LOGITS[name]
    logits = logits_map(shape, kind, dtype, device)
    if variant == "compile":
        # One shape: each of them costs a compilation, and the time does not depend on the values.
        if name != "cityscapes" or kind != "random":
            pytest.skip("compiled for random logits of cityscapes only")
        if device.type == "cpu" and shutil.which("g++") is None:
            pytest.skip("torch.compile needs g++")
        run = lambda: compiled()(logits, size)  # noqa: E731
    elif variant == "eager":
        run = lambda: eager(logits, size)  # noqa: E731
    elif variant == "eager_nchw":
        nchw = logits.contiguous()
        run = lambda: eager(nchw, size)  # noqa: E731
    else:
        if reason := dispatch.explain(OP, logits, list(size), False)[variant]:
            pytest.skip(reason)
        run = lambda: upsample_argmax(logits, size, backend=variant)  # noqa: E731

    def check(labels: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
            values = upsampled(logits, size)
            chosen = values.gather(1, labels.long()[:, None])
            assert_close(chosen, values.amax(1, keepdim=True))
        else:
            # torch rounds upsampled bfloat16 logits to bfloat16, so that close ones become ties.
            expected = upsample_argmax(logits, size, backend="reference")
            assert (labels == expected).float().mean() > (0.999 if dtype == "float32" else 0.95)

    # The low-resolution logits are read, and a byte a pixel is written.
    bytes_moved = logits.numel() * logits.element_size() + shape[0] * size[0] * size[1]
    timed(f"{OP} {name} {kind} {dtype}", variant, run, check, bytes_moved)

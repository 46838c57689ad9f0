"""The threshold of hard pixels: torch.topk, kthvalue and sort, against the backends."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import PIXEL_LOSSES
from deeplab_fast.ops import dispatch, kth_largest

OP = "kth_largest"


@functools.cache
def pixel_losses(shape: tuple[int, ...], kind: str, device: torch.device) -> Tensor:
    """random: of an untrained network, every pixel on its own; trained: small ones, and a tenth that is ignored"""
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(shape, generator=generator).mul(0.5).add(1).exp()
    if kind == "trained":
        losses = torch.randn(shape, generator=generator).mul(3).sub(4).exp()
        losses[:, : shape[1] // 10] = 0
    return losses.to(device)


@functools.cache
def expected(losses: Tensor, k: int) -> Tensor:
    return losses.flatten().sort(descending=True).values[k - 1]


@functools.cache
def compiled():
    return torch.compile(lambda x, k: x.flatten().topk(k, sorted=False).values.amin(), dynamic=False)


@pytest.mark.parametrize("variant", ["native", "reference", "kthvalue", "sort", "compile"])
@pytest.mark.parametrize("share", [1 / 16, 1 / 4])  # OHEM's and top-k's defaults
@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("name", PIXEL_LOSSES)
def bench_kth_largest(timed, device, name, kind, share, variant):
    shape = PIXEL_LOSSES[name]
    losses = pixel_losses(shape, kind, device)
    k = round(share * losses.numel())
    if variant == "compile":
        if kind != "random" or share != 1 / 4:  # each k is a compilation
            pytest.skip("compiled for a quarter of random losses only")
        if device.type == "cpu" and shutil.which("g++") is None:
            pytest.skip("torch.compile needs g++")
        run = lambda: compiled()(losses, k)  # noqa: E731
    elif variant == "kthvalue":
        run = lambda: losses.flatten().kthvalue(losses.numel() - k + 1).values  # noqa: E731
    elif variant == "sort":
        run = lambda: losses.flatten().sort(descending=True).values[k - 1]  # noqa: E731
    else:
        if reason := dispatch.explain(OP, losses, k)[variant]:
            pytest.skip(reason)
        run = lambda: kth_largest(losses, k, backend=variant)  # noqa: E731

    def check(value: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        assert torch.equal(value, expected(losses, k))

    # The values have to be read once.
    timed(f"{OP} {name} {kind} 1/{round(1 / share)}", variant, run, check, 4 * losses.numel())

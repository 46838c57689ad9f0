"""Upsample + cross entropy: interpolate and F.cross_entropy, as training loops have it, against the backends."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import TINY, UPSAMPLED_LOGITS_TRAINED
from deeplab_fast.ops import dispatch, upsample_cross_entropy
from deeplab_fast.testing import assert_close

OP = "upsample_cross_entropy"


@functools.cache
def logits_and_labels(name: str, dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels in squares of 16 pixels, a tenth of them ignored."""
    shape, size = UPSAMPLED_LOGITS_TRAINED[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(getattr(torch, dtype), memory_format=torch.channels_last)
    coarse = torch.randint(0, shape[1], (shape[0], size[0] // 16 + 1, size[1] // 16 + 1), generator=generator)
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : size[0], : size[1]].byte()
    labels[:, : size[0] // 10] = 255
    return logits.to(device), labels.contiguous().to(device)


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    full = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear")
    return F.cross_entropy(full, labels.long(), ignore_index=255)


@functools.cache
def expected(name: str, dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    logits, labels = logits_and_labels(name, dtype, device)
    logits = logits.float().contiguous().requires_grad_()
    loss = eager(logits, labels)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("variant", ["native", "triton", "reference", "eager", "eager_nchw", "compile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", UPSAMPLED_LOGITS_TRAINED)
def bench_upsample_cross_entropy(timed, device, name, grad, dtype, variant):
    if variant == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    slow = variant in ("reference", "compile", "eager_nchw") and (dtype != "float32" or name == "ade20k")
    if slow or (TINY and variant == "compile" and grad == "forward"):
        pytest.skip("the other cases show it")
    logits, labels = logits_and_labels(name, dtype, device)
    if variant in dispatch.OPS[OP].backends:
        if reason := dispatch.explain(OP, logits, labels, None, 255, 0.0, False, False, False)[variant]:
            pytest.skip(reason)
        loss_of = lambda x: upsample_cross_entropy(x, labels, backend=variant)[0]  # noqa: E731
    else:
        function = torch.compile(eager, dynamic=False) if variant == "compile" else eager
        loss_of = lambda x: function(x, labels)  # noqa: E731
    if variant == "eager_nchw":
        logits = logits.contiguous()
    logits = logits.detach().requires_grad_(grad == "forward_backward")

    def run() -> tuple[Tensor, ...]:
        loss = loss_of(logits)
        return (loss.detach(), *torch.autograd.grad(loss, logits)) if logits.requires_grad else (loss,)

    def check(result: tuple[Tensor, ...]) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        loss, grad = expected(name, dtype, device)
        assert_close(result[0], loss)
        # Of a mean over so many pixels every gradient is below the absolute tolerance: the largest is to be 1.
        for ours in result[1:]:
            assert_close(ours / grad.abs().max(), grad / grad.abs().max())

    # The logits and the labels are read once, the gradient is written once.
    passes = 2 if logits.requires_grad else 1
    bytes_moved = passes * logits.numel() * logits.element_size() + labels.numel()
    timed(f"{OP} {name} {grad} {dtype}", variant, run, check, bytes_moved)

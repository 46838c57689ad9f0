"""Confusion matrix of upsampled logits: interpolate, argmax and masked bincount in torch, against the backends."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_upsample_argmax import logits_map
from benchmarks.shapes import UPSAMPLED_LOGITS
from deeplab_fast.ops import dispatch, upsample_argmax, upsample_confusion_matrix

OP = "upsample_confusion_matrix"
IGNORE = 255
CASES = [(name, "float32") for name in UPSAMPLED_LOGITS] + [(next(iter(UPSAMPLED_LOGITS)), "bfloat16")]


@functools.cache
def target_map(shape: tuple[int, ...], size: tuple[int, int], device: torch.device) -> Tensor:
    """What smooth logits give, a little shifted, of which a tenth is ignored."""
    target = upsample_argmax(logits_map(shape, "smooth", "float32", device), size, backend="reference")
    target = target.roll((2, 3), (1, 2))
    target[:, : size[0] // 10] = IGNORE
    return target


def eager(logits: Tensor, target: Tensor, classes: int) -> Tensor:
    prediction = F.interpolate(logits, size=target.shape[1:], mode="bilinear").argmax(1)
    valid = target != IGNORE
    bins = classes * target[valid].long() + prediction[valid]
    return torch.bincount(bins, minlength=classes**2).reshape(classes, classes)


@pytest.mark.parametrize("variant", ["native", "reference", "eager", "eager_nchw"])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("name, dtype", CASES)
def bench_upsample_confusion_matrix(timed, device, name, dtype, kind, variant):
    shape, size = UPSAMPLED_LOGITS[name]
    logits = logits_map(shape, kind, dtype, device)
    target = target_map(shape, size, device)
    if variant == "eager":
        run = lambda: eager(logits, target, shape[1])  # noqa: E731
    elif variant == "eager_nchw":
        nchw = logits.contiguous()
        run = lambda: eager(nchw, target, shape[1])  # noqa: E731
    else:
        if reason := dispatch.explain(OP, logits, target, IGNORE, False)[variant]:
            pytest.skip(reason)
        run = lambda: upsample_confusion_matrix(logits, target, backend=variant)[0]  # noqa: E731

    def check(counts: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        expected = eager(logits.float(), target, shape[1])
        assert torch.equal(counts.sum(1), expected.sum(1))
        # A pixel counted elsewhere changes two counts. torch rounds upsampled bfloat16 logits to bfloat16.
        rounded = dtype == "bfloat16" and variant.startswith("eager")
        assert (counts - expected).abs().sum() <= 2 * target.numel() * (0.05 if rounded else 1e-3)

    # The low-resolution logits and the target are read; the (K, K) result is nothing beside them.
    bytes_moved = logits.numel() * logits.element_size() + target.numel() * target.element_size()
    timed(f"{OP} {name} {kind} {dtype}", variant, run, check, bytes_moved)

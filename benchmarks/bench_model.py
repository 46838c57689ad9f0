"""Whole networks: a training step, and an image to a label map, on this project's kernels and on torch's own."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import INFERENCE, TINY, TRAINING
from deeplab_fast import build_model
from deeplab_fast.device import autocast
from deeplab_fast.loss import cross_entropy_sum
from deeplab_fast.model import decoder
from deeplab_fast.ops import dispatch, upsample_argmax

CLASSES = 19
OURS = ("native", "one_by_one")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative to the fp32 loss, and share of equal labels: rounding in bf16 moves both.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
SAME_LABELS = {"fp32": 0.999, "bf16": 0.9}


def network(backbone: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(backbone=backbone, num_classes=CLASSES, dropout=0.0)
    return model.to(device, memory_format=torch.channels_last)


def plain_concat(x: Tensor, skip: Tensor, *, align_corners: bool) -> Tensor:
    return torch.cat([F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=align_corners), skip], 1)


def plain_loss(logits: Tensor, mask: Tensor) -> Tensor:
    full = F.interpolate(logits.float(), mask.shape[1:], mode="bilinear")
    return F.cross_entropy(full, mask.long(), ignore_index=255, reduction="sum")


@contextlib.contextmanager
def on(variant: str) -> Iterator[None]:
    """`native` leaves the choice to the ops; the others run the network as plain PyTorch would have it.

    "one_by_one": the ops too, but batch norm and activation before a depthwise convolution on their own.
    """
    if variant == "native":
        yield
        return
    if variant == "one_by_one":
        with dispatch.requesting("depthwise_conv_normalised=reference"):
            yield
        return
    with dispatch.requesting("reference"), mock.patch.object(decoder, "upsample_concat", plain_concat):
        yield


def image(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normalised noise with structure, so that labels have regions."""
    n, h, w = shape
    coarse = torch.randn(n, 3, -(-h // 16), -(-w // 16), generator=torch.Generator().manual_seed(1))
    x = nn.functional.interpolate(coarse, size=(h, w), mode="bilinear")
    return x.to(device, memory_format=torch.channels_last)


def training_step(backbone: str, shape: tuple[int, ...], dtype: str, variant: str, device: torch.device) -> Callable:
    model = network(backbone, device).train()
    forward = torch.compile(model) if variant == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # rate 0: every step computes the same
    x = image(shape, device)
    mask = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(2)).to(device, torch.uint8)

    loss_sum = cross_entropy_sum if variant in OURS else plain_loss

    def run() -> Tensor:
        with on(variant):
            with autocast(device, DTYPES[dtype]):
                logits = forward(x)
            loss = loss_sum(logits, mask) / mask.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def labelling(backbone: str, shape: tuple[int, ...], dtype: str, variant: str, device: torch.device) -> Callable:
    model = network(backbone, device).eval()
    x = image(shape, device)
    align_corners = model.align_corners
    if variant == "compile":
        forward = torch.compile(lambda x: model.predict_logits(x).argmax(1).to(torch.uint8))
    elif variant == "native":
        forward = lambda x: upsample_argmax(model(x), x.shape[-2:], align_corners=align_corners)  # noqa: E731
    else:
        forward = lambda x: model.predict_logits(x).argmax(1).to(torch.uint8)  # noqa: E731

    def run() -> Tensor:
        with on(variant), torch.inference_mode(), autocast(device, DTYPES[dtype]):
            return forward(x)

    return run


@functools.cache
def expected(make: Callable, backbone: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return make(backbone, shape, "fp32", "eager", device)()


def skip_compile(variant: str) -> None:
    if variant == "compile" and (TINY or not shutil.which("g++")):
        pytest.skip("compiling a whole network takes minutes" if TINY else "no C++ compiler")


@pytest.mark.parametrize("variant", ["native", "one_by_one", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRAINING)
def bench_training_step(timed, device, name, dtype, variant):
    skip_compile(variant)
    backbone, shape = TRAINING[name]
    if variant == "one_by_one" and not (backbone.startswith("mobilenet") and device.type == "cpu"):
        pytest.skip("no inverted residual, or no kernel for it")
    run = training_step(backbone, shape, dtype, variant, device)

    def check(loss: Tensor) -> None:
        correct = expected(training_step, backbone, shape, device)
        torch.testing.assert_close(loss, correct, rtol=LOSS_TOLERANCE[dtype], atol=0)

    timed(f"training step {name} {dtype}", variant, run, check, 0)


@pytest.mark.parametrize("variant", ["native", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INFERENCE)
def bench_labelling(timed, device, name, dtype, variant):
    skip_compile(variant)
    backbone, shape = INFERENCE[name]
    run = labelling(backbone, shape, dtype, variant, device)

    def check(labels: Tensor) -> None:
        correct = expected(labelling, backbone, shape, device)
        assert (labels == correct).float().mean() >= SAME_LABELS[dtype]

    timed(f"image to labels {name} {dtype}", variant, run, check, 0)

"""Hard pixels against a selection written out pixel by pixel, and the focal loss against its formula."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from deeplab_fast import train as command
from deeplab_fast.cli import parse_train
from deeplab_fast.config import OptimConfig
from deeplab_fast.errors import UserError
from deeplab_fast.loss import focal_loss_sum, hard_pixels, mean_loss, rescale, target_weight, training_loss

TINY = [
    *("--scene-size", "32", "64", "--crop-size", "32", "64", "--scene-count", "6", "--scene-val-count", "2"),
    *("--backbone", "mobilenet_v2", "--width-mult", "0.25", "--aspp-channels", "8", "--decoder-channels", "8"),
    *("--batch-size", "2", "--workers", "0", "--no-tensorboard", "--device", "cpu", "--log-every", "1"),
]
OHEM = OptimConfig(mining="ohem")
WEIGHTS = torch.tensor((0.5, 2.0, 1.0, 0.25, 3.0))


def draw(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (batch, 5, 5, 7) and masks (batch, 18, 25) whose first rows are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, 5, 5, 7, generator=generator)
    mask = torch.randint(0, 5, (batch, 18, 25), generator=generator).to(torch.uint8)
    mask[:, :3] = 255
    return logits, mask


def probabilities(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, H, W): of each pixel's class, at label resolution; 1 where nothing is labelled."""
    full = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear").softmax(1)
    own = full.gather(1, mask.long().clamp(max=4)[:, None])[:, 0]
    return torch.where(mask < 5, own, 1.0)


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 0.0), (0.2, 0.0), (0.05, 0.25), (0.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize(("weights", "smoothing"), [(None, 0.0), (WEIGHTS, 0.1)])
def test_ohem_keeps_what_the_sources_definition_keeps(threshold, min_kept, weights, smoothing):
    logits, mask = draw()
    logits = (3 * logits).requires_grad_()
    config = OptimConfig(mining="ohem", ohem_threshold=threshold, ohem_min_kept=min_kept, label_smoothing=smoothing)
    own = probabilities(logits.detach(), mask)
    count = round(min_kept * mask.numel())
    limit = max([threshold, *own.flatten().sort().values[count - 1 : count].tolist()] if count else [threshold])
    keep = (own <= limit) & (mask < 5)
    assert 0 < keep.sum() < (mask < 5).sum() or threshold == 1.0
    full = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear")
    target = torch.where(keep, mask.long(), 255)
    expected = F.cross_entropy(full, target, weights, ignore_index=255, label_smoothing=smoothing)

    loss, weight = training_loss(logits, mask, config, class_weights=weights)
    loss = mean_loss(loss, weight)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize(
    ("top_k", "steps", "step", "share"), [(0.25, 0, 0, 0.25), (0.2, 10, 5, 0.6), (0.2, 10, 99, 0.2)]
)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_top_k_is_the_mean_of_the_largest_losses(top_k, steps, step, share, weights):
    """With class weights it is divided by the number of pixels, as TensorFlow does."""
    logits, mask = draw()
    logits.requires_grad_()
    full = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear")
    losses = F.cross_entropy(full, mask.long(), weights, ignore_index=255, reduction="none").flatten()
    expected = losses.topk(round(share * mask.numel())).values.mean()
    config = OptimConfig(mining="top_k", top_k=top_k, top_k_steps=steps)
    loss = mean_loss(*training_loss(logits, mask, config, class_weights=weights, step=step))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])


def test_top_k_does_not_count_ignored_pixels():
    """Half of what is to be kept is ignored, so all that is labelled is kept and divided by its own number."""
    logits, mask = draw()
    mask[:, 4:] = 255
    labelled = int((mask != 255).sum())
    _, weight = training_loss(logits, mask, OptimConfig(mining="top_k", top_k=2 * labelled / mask.numel()))
    assert weight == labelled > 0


@pytest.mark.parametrize("mining", ["ohem", "top_k"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_all_ignored_gives_zero_loss_and_gradient(mining, share):
    logits, mask = draw()
    logits.requires_grad_()
    mask.fill_(255)
    config = OptimConfig(mining=mining, ohem_min_kept=share, top_k=share)
    loss = mean_loss(*training_loss(logits, mask, config))
    assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("mining", ["ohem", "top_k"])
def test_nan_is_not_taken_for_easy(mining):
    logits, mask = draw()
    logits[1] = math.nan
    config = OptimConfig(mining=mining)
    assert mean_loss(*training_loss(logits, mask, config)).isnan()


def test_accumulated_passes_equal_one_batch_where_the_threshold_alone_decides():
    """The second pass has few hard pixels; each counts as much as one of the first."""
    logits, mask = draw(batch=4)
    logits[2:, 0] += 6
    mask[2:, 5:] = 0
    config = dataclasses.replace(OHEM, ohem_min_kept=0.0)
    logits.requires_grad_()
    whole = mean_loss(*training_loss(logits, mask, config, class_weights=WEIGHTS))
    expected = torch.autograd.grad(whole, logits)[0]

    assumed = sum(target_weight(part, 5, WEIGHTS)[0] for part in mask.split(2))
    total, kept = torch.zeros(()), torch.zeros(())
    for part, target in zip(logits.split(2), mask.split(2), strict=True):
        loss, hard = training_loss(part, target, config, class_weights=WEIGHTS)
        mean_loss(loss, assumed).backward()
        total, kept = total + mean_loss(loss, assumed).detach(), kept + hard
    assert rescale([logits.grad], total, assumed, kept).item() == pytest.approx(whole.item())
    torch.testing.assert_close(logits.grad, expected)


def test_rescale_of_nothing_kept_is_zero():
    gradient = torch.ones(3)
    assert rescale([gradient], torch.tensor(2.0), torch.tensor(5.0), torch.tensor(0.0)) == 0
    assert not gradient.any()


def test_mask_dtypes_and_labels_that_are_no_class():
    logits, mask = draw()
    mask[0, 10, :4] = 200
    for dtype in (torch.uint8, torch.int64):
        kept = hard_pixels(logits, mask.to(dtype), dataclasses.replace(OHEM, ohem_threshold=1.0))
        assert kept.dtype == dtype and torch.equal((kept < 5), (mask < 5))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_loss_weighs_each_pixel_by_its_own_probability(gamma, weights):
    logits, mask = draw()
    logits = (2 * logits).requires_grad_()
    own = probabilities(logits, mask)[mask < 5]
    each = 1.0 if weights is None else weights[mask[mask < 5].long()]
    expected = (each * (1 - own) ** gamma * -own.log()).sum()
    loss = focal_loss_sum(logits, mask, gamma, class_weights=weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])


def test_focal_loss_of_certain_pixels_has_a_finite_gradient():
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = 200.0
    logits.requires_grad_()
    for gamma in (0.5, 1.0, 3.0):
        loss = focal_loss_sum(logits, torch.ones(1, 4, 4, dtype=torch.uint8), gamma)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all() and loss < 1e-6


def test_focal_loss_is_what_training_takes():
    logits, mask = draw()
    loss, weight = training_loss(logits, mask, OptimConfig(focal_gamma=2.0))
    torch.testing.assert_close(loss, focal_loss_sum(logits, mask, 2.0))
    assert weight is None
    with pytest.raises(UserError, match="--focal-gamma 2.0 --label-smoothing 0.1: expected one of them"):
        parse_train(["--focal-gamma", "2", "--label-smoothing", "0.1"])


def run(output, *flags: str) -> list[float]:
    """The losses of two steps of training."""
    parsed, _ = parse_train([*TINY, "--steps", "2", *flags, "--output", str(output)])
    lines = [json.loads(line) for line in (command.train(parsed, None) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_training_with_hard_pixels(tmp_path):
    """The first step's loss is the mean over what is kept, which the harder pixels are above."""
    accumulate = ("--accumulate", "2")
    plain = run(tmp_path / "plain", *accumulate)
    everything = run(tmp_path / "all", *accumulate, "--mining", "ohem", "--ohem-threshold", "1")
    hardest = run(tmp_path / "hard", *accumulate, "--mining", "top_k", "--top-k", "0.1")
    focal = run(tmp_path / "focal", *accumulate, "--focal-gamma", "2")
    assert everything == pytest.approx(plain, rel=1e-3)
    assert plain[0] < hardest[0] < 10 * plain[0]
    assert 0 < focal[0] < plain[0]

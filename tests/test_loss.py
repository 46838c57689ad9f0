"""The loss against torch's own cross entropy at full resolution, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from deeplab_fast.config import OptimConfig
from deeplab_fast.loss import cross_entropy_sum, hard_pixels, mean_loss, target_weight
from deeplab_fast.ops import dispatch

CASES = [
    pytest.param(None, 0.0, False, id="plain"),
    pytest.param((0.5, 2.0, 1.0, 0.0, 3.0), 0.0, False, id="weights"),
    pytest.param(None, 0.1, True, id="smoothing"),
    pytest.param((0.5, 2.0, 1.0, 0.25, 3.0), 0.2, True, id="both"),
]


def draw(seed: int = 0, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, 5, 5, 7, generator=generator)
    mask = torch.randint(0, 5, (batch, 18, 25), generator=generator).to(torch.uint8)
    mask[:, :3] = 255
    return logits, mask


@pytest.mark.parametrize(("weights", "smoothing", "align_corners"), CASES)
def test_matches_torch(weights, smoothing, align_corners):
    logits, mask = draw()
    logits.requires_grad_()
    weights = torch.tensor(weights) if weights else None
    full = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(full, mask.long(), weights, ignore_index=255, label_smoothing=smoothing)

    weight, out_of_range = target_weight(mask, 5, weights)
    total = cross_entropy_sum(
        logits, mask, class_weights=weights, label_smoothing=smoothing, align_corners=align_corners
    )
    loss = mean_loss(total, weight)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])
    assert out_of_range.item() == 0


def test_accumulated_passes_equal_one_batch():
    """Two passes with very different numbers of labelled pixels, divided by their common weight."""
    logits, mask = draw(batch=4)
    mask[:2, 2:] = 255
    logits.requires_grad_()
    weight = sum(target_weight(part, 5, None)[0] for part in mask.split(2))
    parts = sum(
        mean_loss(cross_entropy_sum(part, target), weight)
        for part, target in zip(logits.split(2), mask.split(2), strict=True)
    )
    whole = mean_loss(cross_entropy_sum(logits, mask), target_weight(mask, 5, None)[0])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], torch.autograd.grad(whole, logits)[0])


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 3.0, 4.0, 5.0)])
def test_all_ignored_gives_zero_loss_and_gradient(weights):
    logits, mask = draw()
    logits.requires_grad_()
    mask.fill_(255)
    weights = torch.tensor(weights) if weights else None
    loss = mean_loss(cross_entropy_sum(logits, mask, class_weights=weights), target_weight(mask, 5, weights)[0])
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


def test_only_classes_of_weight_zero_give_zero_loss():
    """Label smoothing alone would leave a sum of all classes' losses, divided by nothing."""
    logits, mask = draw()
    mask.fill_(3)
    weights = torch.tensor((1.0, 1.0, 1.0, 0.0, 1.0))
    total = cross_entropy_sum(logits, mask, class_weights=weights, label_smoothing=0.1)
    assert total > 1
    assert mean_loss(total, target_weight(mask, 5, weights)[0]).item() == 0.0


def test_labels_that_are_no_class_are_left_out_and_counted():
    logits, mask = draw()
    clean = mask.clone()
    mask[0, 10, :4] = 200
    clean[0, 10, :4] = 255
    torch.testing.assert_close(cross_entropy_sum(logits, mask), cross_entropy_sum(logits, clean))
    weight, out_of_range = target_weight(mask, 5, None)
    assert out_of_range.item() == 4
    assert weight.item() == (clean != 255).sum().item()


@pytest.mark.parametrize("class_weights", [None, torch.tensor([1.0, 2.0, 4.0])])
def test_weight_and_loss_agree_on_what_is_a_label(class_weights):
    mask = torch.tensor([[[0, 1, 2, 255], [-1, 3, 300, 1]]])
    weight, out_of_range = target_weight(mask, 3, class_weights)
    assert weight == (4 if class_weights is None else 1 + 2 + 4 + 2) and out_of_range == 3
    loss = cross_entropy_sum(torch.zeros(1, 3, 2, 4), mask, class_weights=class_weights)
    torch.testing.assert_close(loss, weight * torch.log(torch.tensor(3.0)))


OHEM = {"mining": "ohem", "ohem_threshold": 0.01, "ohem_min_kept": 0.3}


@pytest.mark.parametrize("options", [OHEM, {"mining": "top_k", "top_k": 0.2}])
@pytest.mark.parametrize("strange", [None, math.nan])
def test_hard_pixels_are_those_that_topk_finds(options, strange):
    """Among them all that tie with the last: coarse logits have many equals."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 9, 11, generator=generator).round()
    mask = torch.randint(0, 6, (2, 9, 11), generator=generator).to(torch.uint8)
    mask[mask == 5] = 255
    if strange is not None:
        logits[1, 2, 3, 4], mask[1, 3, 4] = strange, 2
    kept = {}
    for backend in dispatch.OPS["kth_largest"].backends:
        if dispatch.explain("kth_largest", torch.zeros(1), 1)[backend]:
            continue
        with dispatch.requesting(f"kth_largest={backend}"):
            kept[backend] = hard_pixels(logits, mask, OptimConfig(**options))
        assert dispatch.last_backend("kth_largest") == backend
    count = int((kept["reference"] != 255).sum())
    if strange is math.nan:
        assert torch.equal(kept["reference"], mask)
    else:
        assert 30 < count < (mask != 255).sum()
    assert all(torch.equal(one, kept["reference"]) for one in kept.values())

"""Learning-rate schedule, parameter groups and the averaged weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from deeplab_fast.config import OptimConfig
from deeplab_fast.model import build_model
from deeplab_fast.schedule import WeightAverage, build_optimizer, lr_factor, parameter_groups


def test_poly_starts_at_one_and_falls_as_the_formula_says():
    config = OptimConfig(steps=100, poly_power=0.9)
    assert lr_factor(0, config) == 1.0
    assert lr_factor(50, config) == pytest.approx(0.5**0.9)
    assert lr_factor(99, config) == pytest.approx(0.01**0.9)


def test_warm_up_rises_linearly_to_the_poly_curve():
    config = OptimConfig(steps=1000, warmup_steps=10, warmup_lr_mult=0.1, poly_power=1.0)
    assert lr_factor(0, config) == pytest.approx(0.1)
    assert lr_factor(5, config) == pytest.approx((0.1 + 0.9 * 0.5) * (1 - 5 / 1000))
    assert lr_factor(10, config) == pytest.approx(1 - 10 / 1000)


def test_exponential_warm_up_rises_by_one_factor_and_poly_has_the_rest():
    """From 5e-6 to 0.01 in 1,000 of 41,000 steps, as in CoinCheung/DeepLab-v3-plus-cityscapes."""
    config = OptimConfig(steps=41_000, warmup_steps=1000, warmup_lr_mult=5e-4, warmup="exponential")
    factors = [lr_factor(step, config) for step in range(1001)]
    assert factors[0] == pytest.approx(5e-4) and factors[1000] == 1.0
    ratios = [b / a for a, b in itertools.pairwise(factors)]
    assert ratios == pytest.approx([2000 ** (1 / 1000)] * 1000)
    assert lr_factor(21_000, config) == pytest.approx(0.5**0.9)


def test_constant_warm_up_is_tensorflows_slow_start():
    """train_utils.py: the slow rate for so many steps, then the schedule over those that are left."""
    config = OptimConfig(steps=1000, warmup="constant", warmup_steps=100, warmup_lr_mult=0.01)
    assert [lr_factor(step, config) for step in (0, 50, 99)] == [0.01] * 3
    assert lr_factor(100, config) == 1.0 and lr_factor(550, config) == pytest.approx(0.5**0.9)


def test_step_and_cosine_and_constant():
    step = OptimConfig(steps=100, schedule="step", step_every=30, step_factor=0.5)
    assert [lr_factor(s, step) for s in (0, 29, 30, 59, 60, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.125]
    cosine = OptimConfig(steps=100, schedule="cosine")
    assert [lr_factor(s, cosine) for s in (0, 25, 50)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5])
    assert 0 < lr_factor(99, cosine) < 1e-3
    assert lr_factor(99, OptimConfig(steps=100, schedule="constant")) == 1.0
    warm = OptimConfig(steps=100, schedule="cosine", warmup_steps=10, warmup_lr_mult=0.0)
    assert lr_factor(5, warm) == pytest.approx(0.5 * lr_factor(5, cosine))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.classifier = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def test_every_trained_parameter_stands_in_one_group():
    model = Tiny()
    groups = parameter_groups(model, OptimConfig(head_lr_mult=10.0, weight_decay=0.1))
    seen = [id(p) for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen)) == 5
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(seen)
    found = {(group["lr_mult"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {(1.0, 0.1): 1, (1.0, 0.0): 2, (10.0, 0.1): 1, (10.0, 0.0): 1}


def test_decay_norm_bias_decays_everything():
    groups = parameter_groups(Tiny(), OptimConfig(weight_decay=0.1, decay_norm_bias=True))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


@pytest.mark.parametrize("everything", [True, False])
def test_depthwise_convolutions_may_be_left_without_decay(everything):
    model = build_model(num_classes=2, backbone="mobilenet_v2", width_mult=0.25)
    decayed = {
        decay: {id(p) for group in parameter_groups(model, config) if group["weight_decay"] for p in group["params"]}
        for decay in (True, False)
        for config in [OptimConfig(decay_depthwise=decay, decay_norm_bias=everything, weight_decay=0.1)]
    }
    depthwise = {id(p) for p in model.parameters() if p.ndim == 4 and p.shape[1:] == (1, 3, 3)}
    assert len(depthwise) == 17 + 3 + 2, "blocks, ASPP and decoder"
    assert decayed[True] - decayed[False] == depthwise and decayed[False] < decayed[True]


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)]
)
def test_optimiser_takes_groups_momentum_and_decay(name, kind):
    optimizer = build_optimizer(Tiny(), OptimConfig(optimizer=name, momentum=0.8, weight_decay=0.3, head_lr_mult=2.0))
    assert type(optimizer) is kind
    assert sorted({group["lr_mult"] for group in optimizer.param_groups}) == [1.0, 2.0]
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.3]
    for group in optimizer.param_groups:
        assert (group["betas"][0] if name == "adamw" else group["momentum"]) == 0.8


def test_rmsprop_steps_as_the_formula_says():
    """v = a v + (1 - a) g^2, b = m b + g / (sqrt(v) + e), w = w - lr b, with the L2 penalty in g."""
    settings = {"momentum": 0.9, "rms_decay": 0.8, "epsilon": 0.25, "weight_decay": 0.1}
    model = Tiny()
    weight = model.classifier.weight
    optimizer = build_optimizer(model, OptimConfig(optimizer="rmsprop", lr=0.5, head_lr_mult=1.0, **settings))
    expected, square, buffer = weight.detach().clone(), 0.0, 0.0
    for step in range(3):
        gradient = torch.full_like(weight, step + 1.0)
        weight.grad = gradient.clone()
        optimizer.step()
        gradient += 0.1 * expected
        square = 0.8 * square + 0.2 * gradient**2
        buffer = 0.9 * buffer + gradient / (square.sqrt() + 0.25)
        expected -= 0.5 * buffer
        torch.testing.assert_close(weight.detach(), expected)


def test_average_follows_the_formula_and_covers_buffers():
    model = Tiny()
    average = WeightAverage(model, decay=0.9)
    before = model.classifier.weight.detach().clone()
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
        model.backbone[1].running_mean.fill_(4.0)
        model.backbone[1].num_batches_tracked.fill_(7)
    average.update(step=10)
    decay = 11 / 20
    mine = average.model
    torch.testing.assert_close(mine.classifier.weight, decay * before + (1 - decay) * (before + 1.0))
    torch.testing.assert_close(mine.backbone[1].running_mean, torch.full((4,), (1 - decay) * 4.0))
    assert mine.backbone[1].num_batches_tracked.item() == 7
    assert not any(p.requires_grad for p in mine.parameters())


def test_average_takes_in_weights_that_were_loaded_later():
    model = Tiny()
    average = WeightAverage(model, decay=0.0)
    model.load_state_dict(Tiny().state_dict())
    average.update(step=0)
    torch.testing.assert_close(average.model.state_dict(), model.state_dict())

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deeplab_fast.errors import UserError
from deeplab_fast.model import build_model
from deeplab_fast.model.norm import (
    NORMS,
    FrozenBatchNorm2d,
    StandardisedConv2d,
    SyncBatchNorm2d,
    group_count,
    make_norm,
)

SMALL = {"backbone": "resnet18", "num_classes": 5, "aspp_channels": 32, "decoder_channels": 32}


def test_frozen_batch_norm_stays_frozen() -> None:
    model = build_model(norm="frozen_batch", **SMALL).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(type(m) is FrozenBatchNorm2d for m in norms)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    model.train()(torch.randn(2, 3, 33, 33)).sum().backward()
    assert model.training and not any(m.training for m in norms)
    assert all(p.grad is None and not p.requires_grad for m in norms for p in m.parameters())
    assert before and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.classifier.weight.grad is not None


def test_frozen_batch_norm_uses_its_statistics() -> None:
    frozen, plain = FrozenBatchNorm2d(3).train(), nn.BatchNorm2d(3)
    plain.running_mean.uniform_()
    plain.running_var.uniform_(0.5, 2)
    frozen.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(frozen(x), plain.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_of_one_process_is_plain_batch_norm(training: bool) -> None:
    torch.manual_seed(0)
    plain, synchronised = (build_model(norm=norm, dropout=0.0, **SMALL).train(training) for norm in NORMS[:2])
    norms = {type(m) for m in synchronised.modules() if hasattr(m, "running_mean")}
    assert norms == {SyncBatchNorm2d}
    synchronised.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(synchronised(x), plain(x))
    for (name, ours), theirs in zip(synchronised.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_one_value_per_channel_is_refused_as_by_plain_batch_norm() -> None:
    with pytest.raises(UserError, match="one value per channel"):
        build_model(norm="sync_batch", **SMALL).train()(torch.randn(1, 3, 33, 33))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(256, 32), (64, 32), (48, 24), (24, 12), (96, 32), (7, 1), (2, 1), (1, 1), (80, 20)],
)
def test_group_count(channels: int, groups: int) -> None:
    assert group_count(channels) == groups
    assert make_norm("group", channels).num_groups == groups


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_group_norm_comes_with_standardised_weights(backbone: str) -> None:
    model = build_model(norm="group", **{**SMALL, "backbone": backbone})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert any(isinstance(m, nn.GroupNorm) for m in model.modules())
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            plain = name == "classifier" or conv.groups > 1
            assert type(conv) is (nn.Conv2d if plain else StandardisedConv2d), name


def test_standardised_convolution() -> None:
    conv = StandardisedConv2d(6, 4, 3, padding=1, bias=False).double()
    with torch.no_grad():
        conv.weight.mul_(3).add_(2)
    weight = conv.standardised_weight()
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.std((1, 2, 3)), torch.ones(4).double(), rtol=1e-4, atol=0)
    x = torch.randn(2, 6, 5, 5).double()
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, padding=1))
    conv(x).square().sum().backward()
    # The output does not depend on the mean of a filter, so its gradient goes through the standardisation.
    torch.testing.assert_close(conv.weight.grad.sum((1, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-9)
    assert conv.weight.grad.abs().max() > 1

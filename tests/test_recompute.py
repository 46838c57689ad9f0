"""Activation checkpointing: the same numbers, batch norms that move once, and less memory kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deeplab_fast import build_model, checkpoint
from deeplab_fast import train as command
from deeplab_fast.cli import parse_train
from deeplab_fast.errors import UserError
from deeplab_fast.model.recompute import run_block

SMALL = {"aspp_channels": 8, "decoder_channels": 8, "low_level_channels": 4, "dropout": 0.0, "num_classes": 3}


def one_step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Output, gradients, and the bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    y.square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet_v1_50_beta", "mobilenet_v2"])
@pytest.mark.parametrize("native", [True, False])
def test_same_numbers_and_statistics_that_move_once(backbone, native, monkeypatch):
    if not native:  # what a GPU runs: torch's own batch norm moves its statistics itself
        monkeypatch.setattr("deeplab_fast.ops.has_kernel", lambda *_: False)
    torch.manual_seed(0)
    plain = build_model(backbone=backbone, **SMALL).to(memory_format=torch.channels_last).train()
    again = copy.deepcopy(plain)
    again.backbone.recompute = True
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    expected, gradients, whole = one_step(plain, x)
    y, got, less = one_step(again, x)
    assert torch.equal(y, expected)
    for name, gradient in gradients.items():
        assert torch.equal(got[name], gradient), name
    for (name, ours), theirs in zip(again.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(m.num_batches_tracked == 1 for m in again.modules() if type(m) is nn.BatchNorm2d)
    assert less < 0.7 * whole


def test_synchronised_batch_norm_is_held_back_as_well():
    """Its class is another; in one process and on a CPU its own forward cannot run."""

    class Counted(nn.SyncBatchNorm):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            return x * self.weight.view(-1, 1, 1)

    block = nn.Sequential(nn.Conv2d(3, 4, 1), Counted(4), nn.ReLU())
    run_block(block, torch.randn(2, 3, 4, 4), True).sum().backward()
    assert block[1].num_batches_tracked == 1


def test_frozen_norms_are_recomputed_with_their_own_statistics():
    block = nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()).eval()
    block[0].running_mean.fill_(2.0)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(run_block(block, x, True).sum(), x)[0], expected)


def test_an_error_while_recomputing_puts_the_statistics_back():
    class Second(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise ZeroDivisionError
            return x.sin()

    block = nn.Sequential(nn.BatchNorm2d(3), Second())
    before = block[0].running_mean
    y = run_block(block, torch.randn(2, 3, 4, 4, requires_grad=True), True)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert block[0].running_mean is before and block[0].num_batches_tracked == 1


def test_no_gradient_nothing_to_recompute():
    block = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        assert run_block(block, torch.randn(1, 3, 2, 2), True).grad_fn is None


def test_a_run_is_the_same_bit_for_bit(tmp_path):
    tiny = ("--scene-size", "32", "64", "--crop-size", "32", "64", "--scene-count", "4", "--scene-val-count", "2")
    small = ("--aspp-channels", "8", "--decoder-channels", "8", "--batch-size", "2", "--workers", "0", "--threads", "1")
    plain = ("--no-tensorboard", "--device", "cpu", "--steps", "2", "--precision", "fp32")
    saved = []
    for name, flag in (("plain", "--no-recompute"), ("again", "--recompute")):
        parsed, _ = parse_train([*tiny, *small, *plain, flag, "--output", str(tmp_path / name)])
        saved.append(checkpoint.load(command.train(parsed, None) / "last.pt")["training"]["model"])
    for (name, ours), theirs in zip(saved[0].items(), saved[1].values(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(UserError, match="--recompute --compile: expected one of them"):
        parse_train(["--recompute", "--compile"])

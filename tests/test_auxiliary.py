"""The auxiliary head, the decoder's dropout and the norms' momentum: parts of a model that only training sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deeplab_fast import build_model, checkpoint
from deeplab_fast import train as command
from deeplab_fast.cli import parse_train
from deeplab_fast.config import OptimConfig
from deeplab_fast.errors import UserError
from deeplab_fast.loss import cross_entropy_sum, hard_pixels, target_weight, training_loss
from deeplab_fast.model import load_matching

SMALL = {"aspp_channels": 8, "decoder_channels": 8, "low_level_channels": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("backbone", "stride", "channels", "size"),
    [("resnet50", 8, 1024, 8), ("resnet18", 16, 256, 4), ("mobilenet_v2", 32, 96, 4)],
)
def test_it_reads_the_third_stage_and_is_torchvisions_graph(backbone, stride, channels, size):
    torch.manual_seed(0)
    model = build_model(backbone=backbone, output_stride=stride, auxiliary=True, **SMALL).train()
    x = torch.randn(2, 3, 64, 64)
    stage = model.backbone.features[13] if backbone == "mobilenet_v2" else model.backbone.layer3
    seen = []
    stage.register_forward_hook(lambda module, args, output: seen.append(output))
    model.auxiliary.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits, extra = model(x)
    assert len(seen) == 2 and seen[0] is seen[1]
    assert logits.shape == (2, 5, 16, 16) and extra.shape == (2, 5, size, size)

    head, quarter = model.auxiliary, channels // 4
    same = nn.Sequential(nn.Conv2d(channels, quarter, 3, padding=1, bias=False), nn.BatchNorm2d(quarter), nn.ReLU())
    same.append(nn.Conv2d(quarter, 5, 1))
    keys = [k for k in same.state_dict() if "num_batches" not in k]
    ours = [v for k, v in head.state_dict().items() if "num_batches" not in k]
    same.load_state_dict(dict(zip(keys, ours, strict=True)), strict=False)
    features = torch.randn(2, channels, size, size)
    torch.testing.assert_close(head.eval()(features), same.eval()(features))


def test_evaluation_does_not_run_it_and_a_model_without_one_has_no_key_of_it():
    model = build_model(auxiliary=True, width_mult=0.25, **SMALL).eval()
    model.auxiliary.forward = lambda _: pytest.fail("the auxiliary head ran")
    x = torch.randn(1, 3, 32, 32)
    assert model(x).shape == (1, 5, 8, 8) and model.predict_logits(x).shape == (1, 5, 32, 32)
    plain = build_model(width_mult=0.25, **SMALL)
    own, others = plain.state_dict().keys(), model.state_dict().keys()
    assert {k for k in others if not k.startswith("auxiliary.")} == set(own) < set(others)


@pytest.mark.parametrize("ours", [True, False])
def test_weights_pass_between_models_with_and_without_it(ours):
    one, other = (build_model(auxiliary=flag, width_mult=0.25, **SMALL) for flag in (ours, not ours))
    load_matching(one, other.state_dict())
    torch.testing.assert_close(one.classifier.weight, other.classifier.weight)
    torch.testing.assert_close(one.backbone.state_dict(), other.backbone.state_dict())


def test_the_loss_adds_its_cross_entropy_over_the_pixels_of_the_other():
    generator = torch.Generator().manual_seed(0)
    logits, extra = (torch.randn(2, 5, 4, 6, generator=generator, requires_grad=True) for _ in range(2))
    mask = torch.randint(0, 5, (2, 16, 24), generator=generator).to(torch.uint8)
    mask[:, :3] = 255
    weights = torch.tensor((1.0, 2.0, 0.5, 1.0, 3.0))
    plain = OptimConfig(auxiliary_weight=0.3, label_smoothing=0.1)
    shared = {"class_weights": weights, "label_smoothing": 0.1}
    loss, _ = training_loss((logits, extra), mask, plain, class_weights=weights)
    torch.testing.assert_close(
        loss, cross_entropy_sum(logits, mask, **shared) + 0.3 * cross_entropy_sum(extra, mask, **shared)
    )
    assert torch.autograd.grad(loss, extra)[0].any()

    mined = OptimConfig(auxiliary_weight=0.3, mining="ohem", ohem_threshold=0.2, ohem_min_kept=0.0)
    loss, kept = training_loss((logits, extra), mask, mined)
    alone, kept_alone = training_loss(logits, mask, mined)
    assert kept == kept_alone < target_weight(mask, 5, None)[0]
    torch.testing.assert_close(loss, alone + 0.3 * cross_entropy_sum(extra, hard_pixels(logits, mask, mined)))


def test_the_decoders_dropout_changes_training_and_no_key():
    torch.manual_seed(0)
    model = build_model(decoder_dropout=(0.5, 0.1), dropout=0.0, width_mult=0.25, **SMALL)
    plain = build_model(dropout=0.0, width_mult=0.25, **SMALL)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    dropped = []
    for layer, dropout in zip(model.decoder.refinements, model.decoder.dropouts, strict=True):
        dropout.register_forward_hook(lambda m, i, o: dropped.append(((o == 0) & (i[0] != 0)).float().mean().item()))
        assert layer is not dropout
    model.train()(x)
    assert dropped[0] == pytest.approx(0.25, abs=0.15) and dropped[1] == pytest.approx(0.05, abs=0.05)
    for bad in ((0.5,), (0.5, 1.0)):
        with pytest.raises(UserError, match="expected 2 probabilities in"):
            build_model(decoder_dropout=bad, **SMALL)
    with pytest.raises(UserError, match="deeplabv3 has no decoder"):
        build_model("deeplabv3", decoder_dropout=(0.5, 0.5), **SMALL)


def test_momentum_of_the_norms():
    model = build_model(norm_momentum=0.05, head_norm_momentum=0.0003, auxiliary=True, width_mult=0.25, **SMALL)
    found = {(name.split(".")[0], m.momentum) for name, m in model.named_modules() if type(m) is nn.BatchNorm2d}
    heads = {("aspp", 0.0003), ("decoder", 0.0003), ("auxiliary", 0.0003)}
    assert found == {("backbone", 0.05), *heads}
    with pytest.raises(UserError, match="norm_momentum is 0: expected a share"):
        build_model(norm_momentum=0, **SMALL)


def test_a_run_trains_it_and_its_checkpoint_holds_it(tmp_path):
    tiny = ("--scene-size", "32", "64", "--crop-size", "32", "64", "--scene-count", "4", "--scene-val-count", "2")
    small = (
        "--aspp-channels",
        "8",
        "--decoder-channels",
        "8",
        "--batch-size",
        "2",
        "--workers",
        "0",
        "--ema-decay",
        "0",
    )
    flags = [*tiny, *small, "--no-tensorboard", "--device", "cpu", "--steps", "2", "--auxiliary", "--mining", "ohem"]
    parsed, _ = parse_train([*flags, "--output", str(tmp_path / "run")])
    folder = command.train(parsed, None)
    model, config, _ = checkpoint.load_model(folder / "best.pt")
    assert config.model.auxiliary and model(torch.randn(1, 3, 32, 64)).shape == (1, 10, 8, 16)
    assert (model.auxiliary.classifier.bias != 0).any()

"""timm's encoders as backbones; skipped where timm is not installed, but for what says so."""

from __future__ import annotations

import itertools
import sys
import urllib.error

import pytest
import torch
import torch.nn.functional as F

from deeplab_fast.errors import UserError
from deeplab_fast.model import build_model, load_backbone_weights
from deeplab_fast.model import timm_encoder as encoders

SMALL = {"num_classes": 5, "aspp_channels": 16, "decoder_channels": 16, "low_level_channels": 8}


@pytest.fixture
def timm(torchvision_imports):
    # Its layers import torchvision, which needs its operators declared beside a CPU build of torch.
    return pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"backbone timm:resnet18: timm is not installed: pip install 'deeplab_fast\[timm\]'"
    ):
        build_model(backbone="timm:resnet18", **SMALL)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        *itertools.product(["resnet18", "mobilenetv3_small_050", "convnext_atto"], [16, 32]),
        *(("mobilenetv3_large_100", 8), ("darknet53", 16)),
    ],
)
def test_features_are_timms_at_the_output_stride(timm, name: str, stride: int) -> None:
    torch.manual_seed(0)
    model = build_model(backbone=f"timm:{name}", output_stride=stride, dropout=0.0, **SMALL)
    x = torch.randn(2, 3, 64, 96)
    peer = timm.create_model(name, features_only=True, **({} if stride == 32 else {"output_stride": stride})).eval()
    peer.load_state_dict(model.backbone.encoder.state_dict())
    with torch.no_grad():
        low_level, features = model.eval().backbone(x)
        expected = peer(x)
    assert low_level.shape[2:] == (16, 24) and features.shape[2:] == (64 // stride, 96 // stride)
    torch.testing.assert_close(features, expected[-1])
    assert any(torch.equal(low_level, y) for y in expected)
    logits = model.train()(x)
    assert logits.shape == (2, 5, 16, 24)
    F.cross_entropy(logits, torch.randint(5, (2, 16, 24))).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_its_own_initial_weights_are_kept(timm) -> None:
    torch.manual_seed(0)
    peer = timm.create_model("resnet18", features_only=True, output_stride=16).state_dict()
    torch.manual_seed(0)
    ours = build_model(backbone="timm:resnet18", **SMALL).backbone.encoder.state_dict()
    assert ours.keys() == peer.keys() and all(torch.equal(ours[k], peer[k]) for k in ours)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"backbone": "timm:resnet19x"},
            r"backbone timm:resnet19x with output_stride 16: timm has none \(Unknown model",
        ),
        ({"backbone": "timm:vgg11"}, "backbone timm:vgg11 with output_stride 16: timm has none"),
        ({"norm": "group"}, "norm is 'group': timm:resnet18 has its own, expected batch"),
        ({"width_mult": 0.5}, "width_mult is 0.5: timm:resnet18 has no width multiplier"),
        ({"multi_grid": (1, 2, 4)}, r"multi_grid is \(1, 2, 4\): timm:resnet18 has none"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_one_sentence(timm, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(**{"backbone": "timm:resnet18", **SMALL, **fields})


def test_published_weights_are_timms(timm, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    published = build_model(backbone="timm:resnet18", **SMALL).backbone
    create, asked = timm.create_model, []

    def download(name: str, *, pretrained: bool, **options: object) -> torch.nn.Module:
        asked.append((name, pretrained))
        return published.encoder if pretrained else create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", download)
    model = build_model(backbone="timm:resnet18", **SMALL)
    load_backbone_weights(model, "timm:resnet18")
    assert asked == [("resnet18", False), ("resnet18", True)]
    state = published.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="weights of timm:resnet18 could not be downloaded .*no network"):
        encoders.pretrained_state("timm:resnet18", 16)

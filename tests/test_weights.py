from __future__ import annotations

import os
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deeplab_fast.config import Config, ModelConfig, RunConfig
from deeplab_fast.errors import UserError
from deeplab_fast.model import DeepLab, build_model, load_backbone_weights, load_matching
from deeplab_fast.model.weights import IMAGENET
from deeplab_fast.state import load_initial_weights

SMALL = {"num_classes": 5, "aspp_channels": 32, "decoder_channels": 32}


def build(seed: int = 0, **fields) -> DeepLab:
    torch.manual_seed(seed)
    return build_model(**{"backbone": "resnet18", **SMALL, **fields})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def backbone() -> dict[str, Tensor]:
    return build(1).backbone.state_dict()


def test_imagenet_mobilenet_file() -> None:
    data = os.environ.get("DEEPLAB_FAST_TEST_DATA")
    if not data:
        pytest.skip("DEEPLAB_FAST_TEST_DATA is not set: it names the folder of weights/")
    path = Path(data) / "weights" / "mobilenet_v2_imagenet_features.pth"
    model = build(backbone="mobilenet_v2")
    load_backbone_weights(model, str(path))
    file = torch.load(path, weights_only=True)
    kept = {k: v for k, v in file.items() if not k.startswith("features.18.")}
    assert same(model.backbone.state_dict(), kept)
    with pytest.raises(UserError, match=r"other shapes: features.0.0.weight is \(32, 3, 3, 3\) where .* \(16,"):
        load_backbone_weights(build(backbone="mobilenet_v2", width_mult=0.5), str(path))


WRAPPINGS: dict[str, Callable[[dict], dict]] = {
    "plain": dict,
    "ImageNet classifier": lambda s: {**s, "fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)},
    "nested": lambda s: {"state_dict": s, "epoch": 3},
    "nested twice": lambda s: {"model": {"state_dict": s}, "optimizer": {}},
    "data parallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "whole DeepLab": lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"aspp.x": torch.ones(1)},
    "no counters": lambda s: {k: v for k, v in s.items() if "num_batches_tracked" not in k},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_load_backbone(tmp_path: Path, backbone: dict, wrap: Callable[[dict], dict]) -> None:
    torch.save(wrap(backbone), tmp_path / "weights.pth")
    model = build(0)
    head = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert same(model.backbone.state_dict(), backbone)
    assert same({k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}, head)


def test_load_xception_by_the_names_of_timm(tmp_path: Path) -> None:
    ours = build(1, backbone="xception41").backbone.state_dict()
    theirs = {"head.fc.weight": torch.ones(10, 2048), "head.fc.bias": torch.ones(10)}
    layers = {"depthwise_norm": "bn_dw", "depthwise": "conv_dw", "pointwise": "conv_pw", "norm": "bn_pw"}
    for key, value in ours.items():
        key = re.sub(r"^exit\.(\d)", lambda match: f"blocks.12.conv{int(match[1]) + 1}", key)
        key = re.sub(r"\.(conv\d)\.(\w+)", lambda match: f".stack.{match[1]}.{layers[match[2]]}", key)
        theirs[re.sub(r"\bnorm\b", "bn", key)] = value
    assert "blocks.12.stack.conv3.bn_pw.running_var" in theirs and "blocks.0.shortcut.bn.weight" in theirs
    torch.save(theirs, tmp_path / "weights.pth")
    model = build(0, backbone="xception41")
    load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert same(model.backbone.state_dict(), ours)


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        (
            {},
            lambda s: s.pop("layer2.0.conv1.weight"),
            "not for this model: they lack layer2.0.conv1.weight$",
        ),
        ({}, lambda s: s.update({"extra.bias": torch.ones(1)}), "they hold extra.bias, unknown to it$"),
        (
            {},
            lambda s: s.update({"conv1.weight": torch.ones(64, 3, 3, 3)}),
            r"conv1.weight is \(64, 3, 3, 3\) where the model has \(64, 3, 7, 7\)",
        ),
        ({"backbone": "resnet34"}, lambda s: None, r"they lack layer1.2.conv1.weight, .* and \d+ more"),
        ({"norm": "group"}, lambda s: None, "holds batch normalisation, the model has norm group"),
        ({"beta_stem": True}, lambda s: None, "has the plain 7x7 stem, the model has beta_stem"),
    ],
)
def test_differences_are_named(tmp_path: Path, backbone: dict, fields: dict, change, message: str) -> None:
    change(backbone)
    torch.save(backbone, tmp_path / "weights.pth")
    model = build(**fields)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert str(tmp_path / "weights.pth") in str(caught.value)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"\x89PNG\r\n" + b"\0" * 50, b"PK\x03\x04" + b"\0" * 300, None], ids=repr
)
def test_unreadable_files_are_named(tmp_path: Path, backbone: dict, content: bytes | None) -> None:
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save(backbone, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pth: not a readable weights file, expected tensors .* \(.+\)"):
        load_backbone_weights(build(), str(path))


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Path("x")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth: not a readable weights file, .* \(Weights only load failed\)"):
        load_backbone_weights(build(), str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(torch.ones(3), "holds a Tensor"), ({"step": 3}, "holds a dictionary whose 'step' is no tensor")],
)
def test_files_of_something_else_are_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"{message}, expected a state_dict"):
        load_backbone_weights(build(), str(tmp_path / "weights.pth"))


def test_unknown_source() -> None:
    with pytest.raises(UserError, match="resnet77: no such weights file, nor a URL, nor one of resnet18, "):
        load_backbone_weights(build(), "resnet77")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


def test_offline_names_the_url_and_where_to_put_the_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as caught:
        load_backbone_weights(build(), "resnet18")
    message = str(caught.value)
    assert message.startswith(f"{IMAGENET['resnet18']} could not be downloaded (")
    assert f"put the file at {hub / 'resnet18-f37072fd.pth'} by hand" in message
    assert "--weights None" in message
    assert "\n" not in message


def test_a_file_put_there_by_hand_is_used(hub: Path, backbone: dict) -> None:
    hub.mkdir(parents=True)
    torch.save(backbone, hub / "resnet18-f37072fd.pth")
    model = build()
    load_backbone_weights(model, "resnet18")
    assert same(model.backbone.state_dict(), backbone)


def test_imagenet_is_the_backbones_own_file(hub: Path, backbone: dict) -> None:
    hub.mkdir(parents=True)
    torch.save(backbone, hub / "resnet18-f37072fd.pth")
    fields = ModelConfig(backbone="resnet18", aspp_channels=32, decoder_channels=32)
    model = build()
    load_initial_weights(model, Config(model=fields, run=RunConfig(weights="imagenet")))
    assert same(model.backbone.state_dict(), backbone)


def test_download(hub: Path, backbone: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(url: str, path: str, digest: str | None) -> None:
        calls.append((url, digest))
        torch.save(backbone, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for source in ("resnet18", "resnet18", "https://example.org/files/mine-20240101.pth?raw=1"):
        model = build()
        load_backbone_weights(model, source)
        assert same(model.backbone.state_dict(), backbone)
    # A number in the name of a user's file is no digest.
    assert calls == [
        (IMAGENET["resnet18"], "f37072fd"),
        ("https://example.org/files/mine-20240101.pth?raw=1", None),
    ]
    assert (hub / "mine-20240101.pth").is_file()


def test_zym1119_takes_from_torchvision_what_the_two_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_model(num_classes=2, backbone="mobilenet_v2_1280").backbone.state_dict()
    torch.save({**source, "classifier.1.weight": torch.ones(1000, 1280)}, tmp_path / "mobilenet_v2.pth")
    kwargs = {"num_classes": 2, "backbone": "mobilenet_v2_zym1119"}
    model = build_model("deeplabv3", **kwargs)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    load_backbone_weights(model, str(tmp_path / "mobilenet_v2.pth"))
    taken = {k for k, v in model.backbone.state_dict().items() if k in source and torch.equal(v, source[k])}
    blocks = {int(k.split(".")[1]) for k in taken if k.endswith("conv.2.weight")}
    assert blocks == set(range(2, 17)) and "features.0.0.weight" in taken
    for key, value in model.backbone.state_dict().items():
        if int(key.split(".")[1]) in (1, *range(17, 21)) or ".shortcut." in key:
            assert torch.equal(value, before[key]), key
        else:
            assert key in taken
    with pytest.raises(UserError, match="are not for this model: they lack features.1.conv.3"):
        partial = {k: v for k, v in before.items() if k != "features.1.conv.3.weight"}
        torch.save(partial, tmp_path / "own.pth")
        load_backbone_weights(model, str(tmp_path / "own.pth"))


def test_load_matching_leaves_out_a_classifier_of_another_size() -> None:
    model, other, equal = build(0), build(1, num_classes=7).state_dict(), build(2).state_dict()
    classifier = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("classifier.")}
    assert load_matching(model, other) == ["classifier.weight", "classifier.bias"]
    kept = {k: v for k, v in other.items() if not k.startswith("classifier.")}
    assert same(model.state_dict(), {**kept, **classifier})
    assert load_matching(model, equal) == []
    assert same(model.state_dict(), equal)


def test_load_matching_refuses_every_other_difference() -> None:
    model = build(0)
    with pytest.raises(UserError, match=r"have other shapes: decoder.* is \(16, 80, 1, 1\) where the model has"):
        load_matching(model, build(1, num_classes=7, decoder_channels=16).state_dict())
    with pytest.raises(UserError, match="saved weights are not for this model: they lack decoder.refinements.1"):
        load_matching(model, build(1, num_classes=7, refinements=1).state_dict())

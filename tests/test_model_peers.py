"""The same graphs as torchvision, timm and segmentation_models_pytorch, by tensor names, shapes and results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deeplab_fast.model import build_model
from deeplab_fast.model.importers import load_weights
from deeplab_fast.model.xception import from_timm

pytestmark = pytest.mark.usefixtures("torchvision_imports")


@pytest.fixture
def torchvision_models():
    return pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))


@pytest.fixture
def smp(torchvision_models):
    return pytest.importorskip("segmentation_models_pytorch")


def copy_weights(model: nn.Module, peer: nn.Module, names: dict[str, str]) -> None:
    """Give `model` the weights of `peer`; every tensor of both must be used."""
    randomise(peer)
    state = {}
    for key, value in peer.state_dict().items():
        prefix = max((p for p in names if key.startswith(p)), key=len)
        state[names[prefix] + key.removeprefix(prefix)] = value
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def randomise(peer: nn.Module) -> None:
    """Running statistics and scales away from 0 and 1, so that a swapped norm shows."""
    generator = torch.Generator().manual_seed(0)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.1, 0.1, generator=generator)


def aspp_names(peer: str, rates: int, separable: bool) -> Iterator[tuple[str, str]]:
    """From the layout of torchvision and segmentation_models_pytorch: convs.0-3, convs.4 (pool), project."""
    yield f"{peer}convs.0.0.", "aspp.branches.0.conv."
    yield f"{peer}convs.0.1.", "aspp.branches.0.norm."
    for i in range(1, rates + 1):
        yield from layer_names(f"{peer}convs.{i}.0.", f"{peer}convs.{i}.1.", f"aspp.branches.{i}", separable)
    yield from layer_names(f"{peer}convs.{rates + 1}.1.", f"{peer}convs.{rates + 1}.2.", "aspp.pool", False)
    yield from layer_names(f"{peer}project.0.", f"{peer}project.1.", "aspp.project", False)


def layer_names(conv: str, norm: str, ours: str, separable: bool) -> Iterator[tuple[str, str]]:
    if separable:
        yield f"{conv}0.", f"{ours}.depthwise."
        yield f"{conv}1.", f"{ours}.pointwise."
    else:
        yield conv, f"{ours}.conv."
    yield norm, f"{ours}.norm."


def assert_same_logits(model: nn.Module, peer: nn.Module, expected: Tensor, x: Tensor) -> None:
    actual = model.predict_logits(x)
    assert actual.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


@torch.no_grad()
def test_torchvision_deeplabv3_resnet50(torchvision_models) -> None:
    peer = torchvision_models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=False
    ).eval()
    model = build_model(
        "deeplabv3",
        backbone="resnet50",
        num_classes=21,
        output_stride=8,
        first_block_dilation="previous",
        separable=False,
        aspp_refine=True,
        dropout=0.5,
    ).eval()
    names = {"backbone.": "backbone.", "classifier.4.": "classifier."}
    names |= dict(aspp_names("classifier.0.", rates=3, separable=False))
    names |= dict(layer_names("classifier.1.", "classifier.2.", "aspp.refine", separable=False))
    copy_weights(model, peer, names)
    x = torch.randn(1, 3, 65, 97)
    assert_same_logits(model, peer, peer(x)["out"], x)


def smp_deeplabv3plus(smp, encoder: str, stride: int) -> nn.Module:
    peer = smp.DeepLabV3Plus(encoder, encoder_weights=None, encoder_output_stride=stride, classes=19)
    if encoder == "mobilenet_v2":
        # Its encoder ends with the 1280 channels of features.18; ours with the 320 before them.
        del peer.encoder.features[18]
        peer.encoder._out_indexes[-1] = 17
        peer.decoder = smp.decoders.deeplabv3.decoder.DeepLabV3PlusDecoder(
            (3, 16, 24, 32, 96, 320), 5, 256, (12, 24, 36), stride, aspp_separable=True, aspp_dropout=0.5
        )
    return peer.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "stride"), [("resnet50", 16), ("resnet18", 8), ("mobilenet_v2", 16), ("mobilenet_v2", 8)]
)
def test_smp_deeplabv3plus(smp, backbone: str, stride: int) -> None:
    peer = smp_deeplabv3plus(smp, backbone, stride)
    model = build_model(
        "deeplabv3plus",
        backbone=backbone,
        num_classes=19,
        output_stride=stride,
        atrous_rates=(12, 24, 36),
        separable=True,
        aspp_refine=True,
        refinements=1,
        dropout=0.5,
        align_corners=True,
    ).eval()
    names = {"encoder.": "backbone.", "segmentation_head.0.": "classifier."}
    names |= dict(aspp_names("decoder.aspp.0.", rates=3, separable=True))
    names |= dict(layer_names("decoder.aspp.1.", "decoder.aspp.2.", "aspp.refine", separable=True))
    names |= dict(layer_names("decoder.block1.0.", "decoder.block1.1.", "decoder.low_level", separable=False))
    names |= dict(layer_names("decoder.block2.0.", "decoder.block2.1.", "decoder.refinements.0", separable=True))
    copy_weights(model, peer, names)
    x = torch.randn(1, 3, 64, 96)
    assert_same_logits(model, peer, peer(x), x)
    if backbone == "resnet50":
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet101", "resnet152", "mobilenet_v2"])
def test_backbone_keys_are_torchvisions(torchvision_models, backbone: str) -> None:
    with torch.device("meta"):
        peer = getattr(torchvision_models, backbone)()
        model = build_model(backbone=backbone, num_classes=2)
    heads = ("fc.", "classifier.", "features.18.")
    expected = {k: v.shape for k, v in peer.state_dict().items() if not k.startswith(heads)}
    assert {k: v.shape for k, v in model.backbone.state_dict().items()} == expected


@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.4])
def test_mobilenet_widths_are_torchvisions(torchvision_models, width_mult: float) -> None:
    peer = torchvision_models.mobilenet_v2(width_mult=width_mult).features[:18].eval()
    model = build_model(backbone="mobilenet_v2", width_mult=width_mult, output_stride=32, num_classes=2).eval()
    model.backbone.features.load_state_dict(peer.state_dict())
    x = torch.randn(1, 3, 33, 50)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(x)[1], peer(x))


@torch.no_grad()
@pytest.mark.parametrize(("name", "stride"), [("xception41", 32), ("xception65", 16), ("xception71", 8)])
def test_timm_xception(torchvision_models, name: str, stride: int) -> None:
    timm = pytest.importorskip("timm")
    peer = timm.create_model(name, pretrained=False).eval()
    randomise(peer)
    if stride < 32:  # Its own output_stride leaves out shortcuts that the weights have.
        dilate(peer, stride)
    model = build_model(backbone=name, num_classes=2, output_stride=stride).eval()
    model.backbone.load_state_dict(from_timm(peer.state_dict()))
    x = torch.randn(1, 3, 65, 98)
    low_level, features = peer.blocks[model.backbone.low_level_block].stack.conv2, peer.forward_features
    seen = []
    # The ReLU that follows is in place.
    low_level.register_forward_hook(lambda _m, _x, y: seen.append(y.clone()))
    expected = features(x)
    ours = model.backbone(x)
    for actual, wanted in zip(ours, (seen[0], expected), strict=True):
        scale = wanted.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * scale)


def dilate(peer: nn.Module, stride: int) -> None:
    """Strides beyond `stride` become the dilation of what follows."""
    reached, dilation = 2, 1
    for block in peer.blocks:
        own = block.stack.conv3.conv_dw.stride[0]
        replaced = own > 1 and reached * own > stride
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)
                if replaced:
                    module.stride = (1, 1)
        reached, dilation = reached * (1 if replaced else own), dilation * (own if replaced else 1)


def load(peer: nn.Module, path: Path, **fields) -> nn.Module:
    randomise(peer.eval())
    torch.save({"state_dict": {f"module.{k}": v for k, v in peer.state_dict().items()}}, path)
    loaded = load_weights(None, path, **fields)
    assert not loaded.missing
    assert all(k.startswith("aux_classifier.") for k in loaded.left_over)
    return loaded.model


@torch.no_grad()
def test_load_torchvision_deeplabv3(torchvision_models, tmp_path: Path) -> None:
    peer = torchvision_models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )
    x = torch.randn(1, 3, 65, 97)
    assert_same_logits(load(peer, tmp_path / "file.pth"), peer, peer(x)["out"], x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "encoder", "fields"),
    [
        ("DeepLabV3Plus", "resnet34", {}),
        ("DeepLabV3Plus", "mobilenet_v2", {"output_stride": 8}),
        ("DeepLabV3", "resnet50", {}),
        ("DeepLabV3", "mobilenet_v2", {"output_stride": 16}),
    ],
)
def test_load_smp(smp, tmp_path: Path, kind: str, encoder: str, fields: dict) -> None:
    stride = {"encoder_output_stride": fields["output_stride"]} if fields else {}
    peer = getattr(smp, kind)(encoder, encoder_weights=None, classes=5, **stride)
    model = load(peer, tmp_path / "file.pth", **fields)
    x = torch.randn(1, 3, 64, 96)
    assert_same_logits(model, peer, peer(x), x)
    if kind == "DeepLabV3":  # as versions before 0.3 named it
        old = {"aspp": "0", "conv": "1", "bn": "2"}
        state = peer.state_dict()
        for name, number in old.items():
            state = {k.replace(f"decoder.{name}.", f"decoder.{number}."): v for k, v in state.items()}
        torch.save(state, tmp_path / "old.pth")
        assert_same_logits(load_weights(None, tmp_path / "old.pth", **fields).model, peer, peer(x), x)

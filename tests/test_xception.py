"""Aligned Xception: parameters and multiply-adds as published, strides, dilations and the low-level features."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deeplab_fast.errors import UserError
from deeplab_fast.model import DeepLab, build_model
from deeplab_fast.model.xception import XCEPTIONS

SMALL = {"num_classes": 5, "aspp_channels": 16, "decoder_channels": 16, "low_level_channels": 8}
# TensorFlow's DeepLabv3+: both norms and ReLUs in every separable convolution.
TENSORFLOW = {"separable_order": "norm_each", "output_stride": 16}


@torch.no_grad()
def multiply_adds(model: nn.Module, size: tuple[int, int]) -> float:
    """Of all convolutions, for one image, in billions."""
    total = 0

    def count(conv: nn.Conv2d, _inputs: tuple, y: torch.Tensor) -> None:
        nonlocal total
        total += y.numel() * conv.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, *size))
    return total / 1e9


@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    # timm's model cards of xception41 and xception65 and its results table for xception71, at 299 x 299: with the
    # classifier, whose parameters are 2048 x 1000 + 1000.
    [("xception41", 26.97, 9.28), ("xception65", 39.92, 13.96), ("xception71", 42.34, 18.09)],
)
def test_parameters_and_multiply_adds_are_those_of_the_classifiers(name: str, millions: float, billions: float) -> None:
    with FakeTensorMode():
        backbone = build_model(backbone=name, output_stride=32, **SMALL).eval().backbone
        parameters = sum(p.numel() for p in backbone.parameters()) + 2048 * 1000 + 1000
        assert parameters / 1e6 == pytest.approx(millions, abs=0.005)
        assert multiply_adds(backbone, (299, 299)) == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("classes", "size", "billions"),
    # tensorflow/models, research/deeplab/g3doc/model_zoo.md: xception65_cityscapes_trainfine and xception65_coco_voc.
    [(19, (1025, 2049), 418.64), (21, (513, 513), 54.17)],
)
def test_multiply_adds_are_those_of_the_segmentation_models(classes: int, size: tuple, billions: float) -> None:
    with FakeTensorMode():
        model = build_model(backbone="xception65", num_classes=classes, **TENSORFLOW).eval()
        assert multiply_adds(model, size) == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize("size", [(65, 97), (33, 50)])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", XCEPTIONS)
def test_feature_sizes(name: str, output_stride: int, size: tuple[int, int]) -> None:
    with FakeTensorMode():
        model = build_model(backbone=name, output_stride=output_stride, **SMALL).eval()
        low_level, features = model.backbone(torch.empty(1, 3, *size))
        assert low_level.shape == (1, 256, *(math.ceil(s / 4) for s in size))
        assert features.shape == (1, 2048, *(math.ceil(s / output_stride) for s in size))


def dilations(model: DeepLab) -> list[int]:
    """Of the entry flow's last block, the middle, the block of 1024 channels, and the last three convolutions."""
    blocks = model.backbone.blocks
    entry = len(XCEPTIONS["xception65"][0])
    kept = [blocks[entry - 1].conv3, blocks[entry].conv1, blocks[-2].conv3, blocks[-1].conv3, *model.backbone.exit]
    return [conv.depthwise.dilation[0] for conv in kept]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"output_stride": 32}, [1, 1, 1, 1, 1, 1, 1]),
        ({"output_stride": 16}, [1, 1, 1, 1, 2, 2, 2]),
        ({"output_stride": 8}, [1, 2, 2, 2, 4, 4, 4]),
        ({"output_stride": 16, "multi_grid": (1, 2, 4)}, [1, 1, 1, 1, 2, 4, 8]),
    ],
)
def test_dilations(fields: dict, expected: list[int]) -> None:
    with torch.device("meta"):
        assert dilations(build_model(backbone="xception65", **fields, **SMALL)) == expected


@torch.no_grad()
def test_dilation_computes_the_strided_network_on_a_finer_grid() -> None:
    torch.manual_seed(0)
    dilated = build_model(backbone="xception41", output_stride=8, **SMALL).eval()
    strided = build_model(backbone="xception41", output_stride=32, **SMALL).eval()
    strided.load_state_dict(dilated.state_dict())
    x = torch.randn(1, 3, 65, 34)
    coarse = strided.backbone(x)[1]
    scale = coarse.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(dilated.backbone(x)[1][..., ::4, ::4], coarse, rtol=1e-4, atol=1e-5 * scale)


@torch.no_grad()
@pytest.mark.parametrize(("name", "block"), [("xception41", 1), ("xception71", 2)])
def test_low_level_features_are_unrectified(name: str, block: int) -> None:
    """The second pointwise convolution's norm: no ReLU, and not the end of the block."""
    torch.manual_seed(0)
    backbone = build_model(backbone=name, **SMALL).backbone.eval()
    seen = []
    backbone.blocks[block].conv2.norm.register_forward_hook(lambda _m, _x, y: seen.append(y.clone()))
    low_level = backbone(torch.randn(1, 3, 33, 33))[0]
    assert torch.equal(low_level, seen[0]) and low_level.min() < 0


@torch.no_grad()
def test_block_is_three_convolutions_with_norms_and_a_shortcut() -> None:
    torch.manual_seed(0)
    block = build_model(backbone="xception41", output_stride=32, **SMALL).backbone.blocks[0].double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
            assert module.eps == 1e-3
    x = y = torch.randn(2, 64, 9, 8, dtype=torch.double)
    for conv, stride in ((block.conv1, 1), (block.conv2, 1), (block.conv3, 2)):
        y = F.conv2d(F.relu(y), conv.depthwise.weight, stride=stride, padding=1, groups=y.shape[1])
        y = conv.norm(F.conv2d(conv.depthwise_norm(y), conv.pointwise.weight))
    expected = y + block.shortcut.norm(F.conv2d(x, block.shortcut.conv.weight, stride=2))
    torch.testing.assert_close(block(x)[0], expected)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = build_model(backbone="xception41", dropout=0.0, **SMALL).train()
    logits = model(torch.randn(2, 3, 33, 33))
    F.cross_entropy(logits, torch.randint(5, (2, *logits.shape[2:]))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@torch.no_grad()
def test_kernels_compute_what_plain_modules_do() -> None:
    """A hook on every convolution sends the layers down the plain path."""
    torch.manual_seed(0)
    model, x = build_model(backbone="xception41", **SMALL).eval(), torch.randn(1, 3, 33, 34)
    fast = model(x)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), fast, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{"width_mult": 0.5}, {"beta_stem": True}], ids=str)
def test_fields_of_other_backbones_are_refused(fields: dict) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=f"{next(iter(fields))} is .*xception65"):
        build_model(backbone="xception65", num_classes=5, **fields)

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deeplab_fast.config import ModelConfig
from deeplab_fast.errors import UserError
from deeplab_fast.model import DeepLab, build_model
from deeplab_fast.model.layers import SeparableConv

SMALL = {"num_classes": 5, "aspp_channels": 32, "decoder_channels": 32, "low_level_channels": 16}


def test_keywords_are_the_fields_of_the_config() -> None:
    parameters = inspect.signature(build_model).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.name != "num_classes"}
    assert keywords == dataclasses.asdict(ModelConfig())


@pytest.mark.parametrize(
    ("name", "classes", "fields", "count"),
    [
        # torchvision's deeplabv3_resnet50 without its auxiliary head.
        ("deeplabv3", 21, {"backbone": "resnet50", "separable": False, "aspp_refine": True}, 39_638_869),
        # segmentation_models_pytorch's DeepLabV3Plus.
        ("deeplabv3plus", 19, {"backbone": "resnet50", "aspp_refine": True, "refinements": 1}, 26_682_211),
        # The published ResNet-101 implementations of v3+ and v3.
        ("deeplabv3plus", 21, {"backbone": "resnet101", "separable": False}, 59_344_309),
        ("deeplabv3", 21, {"backbone": "resnet101", "separable": False}, 58_040_661),
    ],
)
def test_parameter_count(name: str, classes: int, fields: dict, count: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=classes, **fields)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "count", "features"),
    [
        ("resnet18", 11_689_512, 512),
        ("resnet34", 21_797_672, 512),
        ("resnet50", 25_557_032, 2048),
        ("resnet101", 44_549_160, 2048),
        ("resnet152", 60_192_808, 2048),
    ],
)
def test_resnets_have_the_parameters_of_torchvisions_classifiers(name: str, count: int, features: int) -> None:
    """Those of torchvision's documentation, with 1,000 classes."""
    with torch.device("meta"):
        backbone = build_model(backbone=name, **SMALL).backbone
    assert sum(p.numel() for p in backbone.parameters()) + 1000 * features + 1000 == count


@torch.no_grad()
@pytest.mark.parametrize("size", [(65, 97), (33, 50)])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_feature_sizes(backbone: str, output_stride: int, size: tuple[int, int]) -> None:
    model = build_model(backbone=backbone, output_stride=output_stride, **SMALL).eval()
    x = torch.randn(1, 3, *size)
    low_level, features = model.backbone(x)
    assert low_level.shape == (1, model.backbone.low_level_channels, *(math.ceil(s / 4) for s in size))
    assert features.shape == (1, model.backbone.out_channels, *(math.ceil(s / output_stride) for s in size))
    assert model(x).shape == (1, 5, *(math.ceil(s / 4) for s in size))
    assert model.predict_logits(x).shape == (1, 5, *size)


@torch.no_grad()
def test_mobilenet_low_level_features_end_their_stage() -> None:
    backbone = build_model(backbone="mobilenet_v2", **SMALL).backbone.eval()
    x = torch.randn(1, 3, 33, 33)
    low_level, features = backbone(x)
    assert torch.equal(low_level, backbone.features[:4](x))
    assert torch.equal(features, backbone.features(x))


@torch.no_grad()
def test_deeplabv3_answers_at_the_output_stride() -> None:
    model = build_model("deeplabv3", backbone="resnet18", output_stride=8, **SMALL).eval()
    assert model(torch.randn(2, 3, 65, 50)).shape == (2, 5, 9, 7)
    assert model.predict_logits(torch.randn(2, 3, 1, 1)).shape == (2, 5, 1, 1)


def last_stages(model: DeepLab) -> list[list[int]]:
    """Dilations of the 3x3 convolutions of layer3 and layer4, a list each."""
    stages = (model.backbone.layer3, model.backbone.layer4)
    return [
        [m.dilation[0] for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        for stage in stages
    ]


@pytest.mark.parametrize(
    ("fields", "layer3", "layer4"),
    [
        ({"output_stride": 32}, [1] * 6, [1, 1, 1]),
        ({"output_stride": 16}, [1] * 6, [2, 2, 2]),
        ({"output_stride": 8}, [2] * 6, [4, 4, 4]),
        ({"output_stride": 16, "multi_grid": (1, 2, 4)}, [1] * 6, [2, 4, 8]),
        ({"output_stride": 8, "multi_grid": (1, 2, 4)}, [2] * 6, [4, 8, 16]),
        ({"output_stride": 16, "first_block_dilation": "previous"}, [1] * 6, [1, 2, 2]),
        ({"output_stride": 8, "first_block_dilation": "previous"}, [1, 2, 2, 2, 2, 2], [2, 4, 4]),
    ],
)
def test_resnet_dilations(fields: dict, layer3: list[int], layer4: list[int]) -> None:
    with torch.device("meta"):
        model = build_model(backbone="resnet50", **SMALL, **fields)
    assert last_stages(model) == [layer3, layer4]


def test_basic_block_dilations() -> None:
    with torch.device("meta"):
        model = build_model(backbone="resnet18", first_block_dilation="previous", **SMALL)
    assert last_stages(model) == [[1, 1, 1, 1], [1, 2, 2, 2]]


@torch.no_grad()
def test_beta_stem_is_three_convolutions_with_norms_between() -> None:
    torch.manual_seed(0)
    backbone = build_model(backbone="resnet18", beta_stem=True, **SMALL).backbone.eval()
    first, norm, _, second, other, _, third = backbone.conv1
    for module in (norm, other, backbone.bn1):
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.bias, -0.5, 0.5)
    x = torch.randn(1, 3, 33, 50)
    y = norm(F.conv2d(x, first.weight, stride=2, padding=1)).relu()
    y = other(F.conv2d(y, second.weight, padding=1)).relu()
    y = backbone.bn1(F.conv2d(y, third.weight, padding=1)).relu()
    expected = backbone.layer1(F.max_pool2d(y, 3, stride=2, padding=1))
    assert expected.shape == (1, 64, 9, 13)
    torch.testing.assert_close(backbone(x)[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropout_after_the_projection_in_training_only() -> None:
    torch.manual_seed(0)
    model = build_model("deeplabv3", backbone="resnet18", dropout=0.5, **SMALL)
    seen = []
    model.aspp.project.register_forward_hook(lambda _m, _x, y: seen.append(y))
    x = torch.randn(2, 512, 9, 9)
    for training, share in ((True, 0.5), (False, 0.0)):
        y = model.aspp.train(training)(x)
        positive = seen[-1] > 0
        assert (y[positive] == 0).float().mean().item() == pytest.approx(share, abs=0.05)
        torch.testing.assert_close(y[y > 0], (seen[-1] / (1 - share))[y > 0])


@pytest.mark.parametrize(("first", "expected"), [("stage", [2, 2, 2, 2]), ("previous", [1, 2, 2, 2])])
def test_mobilenet_dilations(first: str, expected: list[int]) -> None:
    with torch.device("meta"):
        model = build_model(backbone="mobilenet_v2", first_block_dilation=first, **SMALL)
    blocks = model.backbone.features
    assert [blocks[i].conv[1][0].dilation[0] for i in (13, *range(14, 18))] == [1, *expected]


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2"])
def test_dilation_computes_the_strided_network_on_a_finer_grid(backbone: str) -> None:
    """With "previous", every fourth feature at output stride 8 is the one at 32, the borders included."""
    x = torch.randn(1, 3, 97, 70)
    dilated = build_model(backbone=backbone, output_stride=8, first_block_dilation="previous", **SMALL).eval()
    strided = build_model(backbone=backbone, output_stride=32, **SMALL).eval()
    strided.load_state_dict(dilated.state_dict())
    coarse = strided.backbone(x)[1]
    scale = coarse.abs().max().item()
    torch.testing.assert_close(dilated.backbone(x)[1][..., ::4, ::4], coarse, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({"output_stride": 8}, [12, 24, 36]),
        ({"output_stride": 16}, [6, 12, 18]),
        ({"output_stride": 32}, [3, 6, 9]),
        ({"atrous_rates": (2, 5)}, [2, 5]),
    ],
)
@pytest.mark.parametrize("separable", [True, False])
def test_atrous_rates(fields: dict, rates: list[int], separable: bool) -> None:
    with torch.device("meta"):
        model = build_model(separable=separable, **SMALL, **fields)
    branches = list(model.aspp.branches)[1:]
    convs = [branch.depthwise if separable else branch.conv for branch in branches]
    assert [conv.dilation[0] for conv in convs] == rates
    assert [conv.padding[0] for conv in convs] == rates
    assert model.aspp.project.conv.in_channels == (len(rates) + 2) * 32


VARIANTS = [
    {"backbone": "resnet18"},
    {"backbone": "mobilenet_v2", "separable_order": "norm_each", "aspp_refine": True},
    {"backbone": "resnet50", "name": "deeplabv3", "separable": False, "multi_grid": (1, 2, 4)},
    {"backbone": "resnet18", "image_pooling": False, "refinements": 1, "separable": False},
    {"backbone": "resnet18", "beta_stem": True, "align_corners": True, "norm": "group"},
    {"backbone": "mobilenet_v2", "width_mult": 0.5, "output_stride": 8, "norm": "group"},
    {"backbone": "resnet18", "activation": "leaky_relu", "aspp_activation": False, "separable_order": "norm_each"},
    {"backbone": "mobilenet_v2_zym1119", "multi_grid": (1, 2, 4), "pixels": "bgr_unit", "aspp_activation": False},
    {"backbone": "mobilenet_v2_1280", "pixels": "symmetric"},
    {"backbone": "resnet_v1_50_beta", "multi_grid": (1, 2, 4), "pixels": "symmetric"},
    {"name": "deeplabv3", "width_mult": 0.5, "width_divisor": 4, "atrous_rates": ()},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_gradient_reaches_every_parameter(fields: dict) -> None:
    torch.manual_seed(0)
    model = build_model(**SMALL, **fields, dropout=0.0).train()
    logits = model(torch.randn(2, 3, 65, 97))
    F.cross_entropy(logits, torch.randint(5, (2, *logits.shape[2:]))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_the_stride_at_the_end_of_a_stage(output_stride: int) -> None:
    """In fp32 as the ops compute it and in fp64, and the sizes at odd sides."""
    torch.manual_seed(0)
    backbone = build_model(backbone="resnet_v1_50_beta", output_stride=output_stride, **SMALL).backbone.eval()
    x = torch.randn(1, 3, 67, 98)
    found, exact = backbone(x), backbone.double()(x.double())
    for y, expected, stride in zip(found, exact, (4, output_stride), strict=True):
        assert y.shape[2:] == (-(-67 // stride), -(-98 // stride))
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("order", ["norm_last", "norm_each"])
def test_separable_orders(order: str) -> None:
    layer = SeparableConv("batch", 4, 6, 2, order=order).eval()
    for norm in (layer.depthwise_norm, layer.norm):
        if norm is not None:
            nn.init.uniform_(norm.weight)
            nn.init.uniform_(norm.running_mean)
    x = torch.randn(2, 4, 7, 9)
    y = F.conv2d(x, layer.depthwise.weight, padding=2, dilation=2, groups=4)
    if order == "norm_each":
        y = layer.depthwise_norm(y).relu()
    expected = layer.norm(F.conv2d(y, layer.pointwise.weight)).relu()
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("align_corners", [False, True])
def test_align_corners_holds_everywhere(align_corners: bool) -> None:
    model = build_model(backbone="resnet18", align_corners=align_corners, **SMALL).eval()
    x = torch.randn(1, 3, 65, 97)
    low_level, features = model.backbone(x)
    up = F.interpolate(model.aspp(features), low_level.shape[2:], mode="bilinear", align_corners=align_corners)
    y = model.decoder.refinements(torch.cat([up, model.decoder.low_level(low_level)], 1))
    logits = F.interpolate(model.classifier(y), (65, 97), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(model.predict_logits(x), logits)


@torch.no_grad()
def test_logits_are_upsampled_in_fp32() -> None:
    torch.manual_seed(0)
    model = build_model(backbone="resnet18", **SMALL).eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.autocast("cpu", torch.bfloat16):
        low, logits = model(x), model.predict_logits(x)
    assert low.dtype == torch.bfloat16 and logits.dtype == torch.float32
    expected = F.interpolate(low.float(), (65, 97), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_image_pooling_is_the_mean_of_the_image() -> None:
    model = build_model(backbone="resnet18", **SMALL).eval()
    features = torch.randn(2, 512, 3, 4)
    seen = []
    model.aspp.project.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.aspp(features)
    expected = model.aspp.pool(features.mean((2, 3), keepdim=True))
    torch.testing.assert_close(seen[0][:, -32:], expected.expand(2, 32, 3, 4))
    assert build_model(backbone="resnet18", image_pooling=False, **SMALL).aspp.pool is None


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_channels_last_stays(fields: dict) -> None:
    model = build_model(**SMALL, **fields).to(memory_format=torch.channels_last)
    wrong = []

    def check(name: str, y: torch.Tensor) -> None:
        if isinstance(y, torch.Tensor) and not y.is_contiguous(memory_format=torch.channels_last):
            wrong.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _x, y, name=name: check(name, y))
        if name.endswith(".conv"):
            module.register_forward_pre_hook(lambda _m, args, name=name: check(f"input of {name}", args[0]))
    x = torch.randn(2, 3, 65, 97).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert not wrong


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training: bool) -> None:
    model = build_model(backbone="resnet18", dropout=0.0, **SMALL).train(training)
    x = torch.randn(2, 3, 33, 50)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_training_on_one_image() -> None:
    x = torch.randn(1, 3, 64, 64)
    model = build_model(backbone="resnet18", **SMALL).train()
    message = r"input of \(1, 3, 64, 64\) leaves in ASPP: expected a batch of 2, or norm group or frozen_batch"
    with pytest.raises(UserError, match=message):
        model(x)
    assert model.eval()(x).shape == (1, 5, 16, 16)
    for fields in ({"norm": "group"}, {"norm": "frozen_batch"}, {"image_pooling": False}):
        other = build_model(backbone="resnet18", **fields, **SMALL).train()
        assert other(x).shape == (1, 5, 16, 16)
    with pytest.raises(UserError, match=r"input of \(1, 3, 16, 9\) leaves in ASPP"):
        other(x[..., :16, :9])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "unet"}, "name is 'unet': expected one of deeplabv3, deeplabv3plus"),
        ({"backbone": "resnet19"}, "backbone is 'resnet19': expected one of resnet18, .*, mobilenet_v2"),
        ({"output_stride": 4}, "output_stride is 4: expected one of 8, 16, 32"),
        ({"norm": "layer"}, "norm is 'layer': expected one of batch, sync_batch, frozen_batch, group"),
        ({"separable_order": "both"}, "separable_order is 'both': expected one of norm_last, norm_each"),
        ({"first_block_dilation": "next"}, "first_block_dilation is 'next': expected one of stage, previous"),
        ({"refinements": 3}, "refinements is 3: expected one of 1, 2"),
        ({"num_classes": 0}, "num_classes is 0: expected 1 or more"),
        ({"aspp_channels": 0}, "aspp_channels is 0: expected 1 or more"),
        ({"atrous_rates": (6, 0)}, "atrous_rates is 0: expected 1 or more"),
        ({"dropout": 1.0}, r"dropout is 1.0: expected a probability in \[0, 1\)"),
        ({"backbone": "resnet50", "width_mult": 0.5}, "width_mult is 0.5: resnet50 has no width multiplier"),
        ({"activation": "gelu"}, "activation is 'gelu': expected one of relu, leaky_relu"),
        ({"activation": "leaky_relu"}, "activation is 'leaky_relu': mobilenet_v2 has its own, .* or a ResNet backbone"),
        ({"pixels": "raw"}, "pixels is 'raw': expected one of imagenet, symmetric, bgr_unit"),
        (
            {"backbone": "mobilenet_v2_zym1119", "output_stride": 8},
            "output_stride is 8: .* has one stride, expected 16",
        ),
        ({"width_mult": 0.0}, "width_mult is 0.0: expected a number above 0"),
        ({"width_divisor": 0}, "width_divisor is 0: expected 1 or more"),
        ({"backbone": "resnet50", "width_divisor": 4}, "width_divisor is 4: resnet50 has no width multiplier"),
        ({"multi_grid": (1, 2, 4)}, r"multi_grid is \(1, 2, 4\): mobilenet_v2 has none"),
        ({"backbone": "resnet50", "multi_grid": (1, 2)}, r"multi_grid is \(1, 2\): expected three factors"),
        ({"backbone": "resnet18", "multi_grid": (1, 2, 4)}, "resnet18 ends with 2 blocks, not three"),
        ({"beta_stem": True}, "beta_stem is set: mobilenet_v2 .* expected a ResNet backbone"),
    ],
    ids=str,
)
def test_bad_values_are_named(fields: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_model(**{"num_classes": 5, **fields})


def test_seed_decides_the_weights() -> None:
    def build() -> DeepLab:
        torch.manual_seed(3)
        return build_model(backbone="resnet18", **SMALL)

    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert first["backbone.conv1.weight"].std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert first["aspp.branches.0.conv.weight"].std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert first["classifier.weight"].std().item() == pytest.approx(0.01, rel=0.2)
    assert not first["classifier.bias"].any()


@torch.no_grad()
def test_leaky_relu_is_everywhere_but_after_the_sum() -> None:
    torch.manual_seed(0)
    model = build_model(backbone="resnet18", activation="leaky_relu", **SMALL).eval()
    x, block = torch.randn(1, 64, 9, 9), model.backbone.layer1[0]
    y = F.leaky_relu(block.bn1(block.conv1(x)), 0.01)
    torch.testing.assert_close(block(x), F.relu(block.bn2(block.conv2(y)) + x))
    head = [m for part in (model.aspp, model.decoder) for m in part.modules() if hasattr(m, "activation")]
    assert len(head) == 9 and {m.activation for m in head} == {"leaky_relu"}
    branch, x = model.aspp.branches[0], torch.randn(1, 512, 3, 3)
    torch.testing.assert_close(branch(x), F.leaky_relu(branch.norm(branch.conv(x)), 0.01))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["symmetric", "bgr_unit"])
def test_pixels_are_made_from_the_normalised_image(kind: str) -> None:
    image = torch.randint(0, 256, (2, 3, 5, 7)).float()
    x = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    expected = image / 127.5 - 1 if kind == "symmetric" else image[:, [2, 1, 0]] / 255
    model = build_model(backbone="resnet18", pixels=kind, **SMALL)
    torch.testing.assert_close(model.pixels(x), expected)
    assert model.state_dict().keys() == build_model(backbone="resnet18", **SMALL).state_dict().keys()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(x)
    torch.testing.assert_close(seen[0], expected)


@torch.no_grad()
def test_aspp_without_activation() -> None:
    model = build_model(backbone="resnet18", aspp_activation=False, **SMALL).eval()
    assert model.aspp(torch.randn(1, 512, 3, 3)).min() < 0
    assert model.decoder.low_level(torch.randn(1, 64, 3, 3)).min() == 0


def test_zym1119_dilations() -> None:
    with torch.device("meta"):
        model = build_model("deeplabv3", backbone="mobilenet_v2_zym1119", num_classes=20, separable=False,
                            multi_grid=(1, 2, 4))  # fmt: skip
    assert [model.backbone.features[i].conv[1][0].dilation[0] for i in range(16, 21)] == [1, 2, 2, 4, 8]
    # The published count, and ASPP's pooling, which there shares its convolution.
    own = sum(p.numel() for p in model.aspp.pool.parameters())
    assert (sum(p.numel() for p in model.parameters()) - own) / 1e6 == pytest.approx(4.12, abs=0.005)


@pytest.mark.parametrize(
    ("fields", "widths"),
    [
        ({"width_mult": 0.5}, [16, 8, 16, 16, 32, 48, 80, 160]),
        # Of a published file, deeplabv3_mnv2_dm05.
        ({"width_mult": 0.5, "width_divisor": 4}, [16, 8, 12, 16, 32, 48, 80, 160]),
        ({"width_mult": 1.0, "width_divisor": 4}, [32, 16, 24, 32, 64, 96, 160, 320]),
    ],
)
def test_mobilenet_widths(fields: dict, widths: list[int]) -> None:
    with torch.device("meta"):
        model = build_model(num_classes=2, auxiliary=True, **fields)
    blocks = model.backbone.features
    assert [
        blocks[i][0].out_channels if i == 0 else blocks[i].conv[-2].out_channels for i in (0, 1, 2, 4, 7, 11, 14, 17)
    ] == widths
    assert (model.decoder.low_level.conv.in_channels, model.auxiliary.reduce.conv.in_channels) == (widths[2], widths[5])
    assert model.backbone.out_channels == widths[-1]


def test_no_rates_leave_the_1x1_branch_and_the_pooling() -> None:
    with torch.device("meta"):
        model = build_model("deeplabv3", num_classes=2, atrous_rates=(), aspp_channels=32)
    assert [tuple(branch.conv.weight.shape) for branch in (*model.aspp.branches, model.aspp.pool)] == [
        (32, 320, 1, 1)
    ] * 2
    assert model.aspp.project.conv.in_channels == 64

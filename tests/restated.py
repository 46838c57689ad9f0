"""The DeepLabs of other projects, restated in plain PyTorch with their tensors' names: what test_importers.py loads.

Written from the tables of names and graphs, not from their code, and on none of this project's layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InPlaceABN(nn.Module):
    """mapillary's: scales by |weight| + eps, and has the leaky ReLU of 0.01 inside; counts no batches."""

    def __init__(self, channels: int, activation: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight.abs() + 1e-5, self.bias, False, 0, 1e-5)
        return F.leaky_relu(y, 0.01) if self.activation else y


class WeightStandardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
        weight = rows.view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def same(x: Tensor) -> Tensor:
    return x


class Bottleneck(nn.Module):
    def __init__(self, cin: int, width: int, stride: int, dilation: int, kinds: dict) -> None:
        super().__init__()
        conv, norm, last_norm = kinds["conv"], kinds["norm"], kinds["last_norm"]
        self.conv1, self.bn1 = conv(cin, width, 1, bias=False), norm(width)
        self.conv2 = conv(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1, bias=False), last_norm(4 * width)
        self.downsample = None
        if cin != 4 * width:
            self.downsample = nn.Sequential(conv(cin, 4 * width, 1, stride, bias=False), last_norm(4 * width))
        self.act = kinds["act"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Output stride 16; the dilations of layer4's three blocks are given. -> layer1, layer4."""

    def __init__(
        self,
        depths: tuple[int, ...],
        dilations: tuple[int, int, int],
        *,
        conv: Callable = nn.Conv2d,
        norm: Callable = nn.BatchNorm2d,
        last_norm: Callable | None = None,
        act: Callable = F.relu,
    ) -> None:
        super().__init__()
        kinds = {"conv": conv, "norm": norm, "last_norm": last_norm or norm, "act": act}
        self.conv1, self.bn1, self.act = conv(3, 64, 7, 2, 3, bias=False), norm(64), act
        cin = 64
        for stage, depth in enumerate(depths, start=1):
            width, blocks = 32 << stage, []
            for i in range(depth):
                stride = 2 if i == 0 and stage in (2, 3) else 1
                blocks.append(Bottleneck(cin, width, stride, dilations[i] if stage == 4 else 1, kinds))
                cin = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.layer1(F.max_pool2d(self.act(self.bn1(self.conv1(x))), 3, 2, 1))
        return low, self.layer4(self.layer3(self.layer2(low)))


def up(x: Tensor, like: Tensor, corners: bool = True) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=corners)


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def conv_relu(cin: int, cout: int, kernel: int = 1, rate: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, 1, rate * (kernel // 2), rate, bias=False)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU()]


RATES = (1, 6, 12, 18)
RESNET50, RESNET101 = (3, 4, 6, 3), (3, 4, 23, 3)


class Jfzhang95(nn.Module):
    def __init__(self, classes: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = ResNet(depths, (2, 4, 8))
        self.aspp = nn.Module()
        for i, rate in enumerate(RATES):
            conv, norm, _ = conv_relu(2048, 256, 1 if i == 0 else 3, rate)
            self.aspp.add_module(f"aspp{i + 1}", named(atrous_conv=conv, bn=norm, relu=nn.ReLU()))
        self.aspp.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_relu(2048, 256))
        self.aspp.conv1, self.aspp.bn1 = conv_relu(1280, 256)[:2]
        self.decoder = nn.Module()
        self.decoder.conv1, self.decoder.bn1 = conv_relu(256, 48)[:2]
        drop = nn.Dropout(0.5)
        self.decoder.last_conv = nn.Sequential(
            *conv_relu(304, 256, 3), drop, *conv_relu(256, 256, 3), drop, nn.Conv2d(256, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        low, y = self.backbone.features(x)
        aspp, decoder = self.aspp, self.decoder
        parts = [aspp.aspp1(y), aspp.aspp2(y), aspp.aspp3(y), aspp.aspp4(y), up(aspp.global_avg_pool(y), y)]
        y = F.relu(aspp.bn1(aspp.conv1(torch.cat(parts, 1))))
        low = F.relu(decoder.bn1(decoder.conv1(low)))
        return up(decoder.last_conv(torch.cat([up(y, low), low], 1)), x)


class Hualin95(nn.Module):
    def __init__(self, classes: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.Resnet101 = ResNet(depths, (2, 2, 2))
        self.encoder = nn.Module()
        self.encoder.ASPP = nn.Module()
        for i, rate in enumerate(RATES):
            branch = nn.Sequential(*conv_relu(2048, 256, 1 if i == 0 else 3, rate))
            self.encoder.ASPP.add_module(f"_atrous_convolution{i + 1}", branch)
        self.encoder.ASPP._image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_relu(2048, 256))
        self.encoder.conv1, self.encoder.bn1 = conv_relu(1280, 256)[:2]
        d = self.decoder = nn.Module()
        d.conv1, d.bn1 = conv_relu(256, 48)[:2]
        d.conv2, d.bn2 = conv_relu(304, 256, 3)[:2]
        d.conv3, d.bn3 = conv_relu(256, 256, 3)[:2]
        d.conv4 = nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        low, y = self.Resnet101.features(x)
        aspp, d = self.encoder.ASPP, self.decoder
        parts = [getattr(aspp, f"_atrous_convolution{i}")(y) for i in (1, 2, 3, 4)]
        y = torch.cat([*parts, up(aspp._image_pool(y), y)], 1)
        y = F.relu(self.encoder.bn1(self.encoder.conv1(y)))
        low = F.relu(d.bn1(d.conv1(low)))
        y = F.relu(d.bn2(d.conv2(torch.cat([up(y, low), low], 1))))
        return up(d.conv4(F.relu(d.bn3(d.conv3(y)))), x)


class CoinCheung(nn.Module):
    """konami86: plain norms at the end of a residual branch and on the shortcut; CoinCheung: InPlaceABN there too."""

    def __init__(self, classes: int, depths: tuple[int, ...], *, konami86: bool) -> None:
        super().__init__()
        last = nn.BatchNorm2d if konami86 else lambda channels: InPlaceABN(channels, activation=False)
        self.backbone = ResNet(depths, (2, 2, 2), norm=InPlaceABN, last_norm=last, act=same)

        def layer(cin: int, cout: int, kernel: int, rate: int = 1) -> nn.Module:
            conv = nn.Conv2d(cin, cout, kernel, 1, rate * (kernel // 2), rate, bias=True)
            return named(conv=conv, bn=InPlaceABN(cout))

        self.aspp = nn.Module()
        for i, rate in enumerate(RATES):
            self.aspp.add_module(f"conv{i + 1}", layer(2048, 256, 1 if i == 0 else 3, rate))
        self.aspp.conv_out = layer(1024, 256, 1)
        self.decoder = nn.Module()
        self.decoder.conv_low = layer(256, 48, 1)
        self.decoder.conv_cat = nn.Sequential(layer(304, 256, 3), layer(256, 256, 3))
        self.decoder.conv_out = nn.Conv2d(256, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        low, y = self.backbone.features(x)
        aspp = self.aspp
        y = aspp.conv_out(torch.cat([aspp.conv1(y), aspp.conv2(y), aspp.conv3(y), aspp.conv4(y)], 1))
        low = self.decoder.conv_low(low)
        return up(self.decoder.conv_out(self.decoder.conv_cat(torch.cat([low, up(y, low)], 1))), x)


class Chenxi116(ResNet):
    def __init__(self, classes: int, depths: tuple[int, ...], *, group: bool) -> None:
        conv, norm = (WeightStandardised, group_norm) if group else (nn.Conv2d, nn.BatchNorm2d)
        super().__init__(depths, (1, 2, 2), conv=conv, norm=norm)
        self.aspp = nn.Module()
        for i, rate in enumerate((*RATES, 1)):
            kernel = 3 if 0 < i < 4 else 1
            branch = conv(2048, 256, kernel, 1, rate * (kernel // 2), rate, bias=False)
            self.aspp.add_module(f"aspp{i + 1}", branch)
            self.aspp.add_module(f"aspp{i + 1}_bn", norm(256))
        self.aspp.conv2, self.aspp.bn2 = conv(1280, 256, 1, bias=False), norm(256)
        self.aspp.conv3 = nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, a = self.features(x)[1], self.aspp
        mean = y.mean((2, 3), keepdim=True)
        parts = [getattr(a, f"aspp{i}_bn")(getattr(a, f"aspp{i}")(mean if i == 5 else y)).relu() for i in range(1, 6)]
        parts[4] = up(parts[4], y)
        return up(a.conv3(a.bn2(a.conv2(torch.cat(parts, 1))).relu()), x)


class ZymBlock(nn.Module):
    def __init__(self, cin: int, cout: int, expand: int, stride: int, dilation: int) -> None:
        super().__init__()
        width = cin * expand
        depthwise = nn.Conv2d(width, width, 3, stride, dilation, dilation, width, bias=False)
        first = [nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        last = [nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)]
        self.block = nn.Sequential(*first, depthwise, nn.BatchNorm2d(width), nn.ReLU6(), *last)
        self.stride = stride
        self.res_conv = None
        if stride == 1 and cin != cout:
            self.res_conv = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return self.block(x)
        return self.block(x) + (x if self.res_conv is None else self.res_conv(x))


class ZymASPP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, kernel, rate in zip(("conv11", "conv33_1", "conv33_2", "conv33_3"), (1, 3, 3, 3), RATES, strict=True):
            self.add_module(name, nn.Sequential(*conv_relu(160, 256, kernel, rate)[:2]))
        self.concate_conv = nn.Sequential(*conv_relu(1280, 256)[:2])

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv11(x.mean((2, 3), keepdim=True))
        parts = [self.conv11(x), self.conv33_1(x), self.conv33_2(x), self.conv33_3(x), up(pooled, x)]
        return self.concate_conv(torch.cat(parts, 1))


class Zym1119(nn.Sequential):
    """Of x (N, 3, H, W) BGR in 0 ... 1."""

    def __init__(self, classes: int) -> None:
        cin, blocks = 32, []
        stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1)]
        plan = [(t, c, s if i == 0 else 1, 1) for t, c, n, s in stages for i in range(n)]
        for expand, cout, stride, dilation in [*plan, *((6, 160, 1, d) for d in (2, 2, 4, 8))]:
            blocks.append(ZymBlock(cin, cout, expand, stride, dilation))
            cin = cout
        stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        super().__init__(stem, *blocks, ZymASPP(), nn.Conv2d(256, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return up(super().forward(x), x, corners=False)


class VainfBlock(nn.Module):
    def __init__(self, cin: int, cout: int, expand: int, stride: int, dilation: int) -> None:
        super().__init__()
        width = cin * expand

        def layer(a: int, b: int, kernel: int, **conv: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, kernel, bias=False, **conv), nn.BatchNorm2d(b), nn.ReLU6())

        layers = [] if expand == 1 else [layer(cin, width, 1)]
        layers += [layer(width, width, 3, stride=stride, dilation=dilation, groups=width)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout))
        self.add, self.pad = stride == 1 and cin == cout, dilation

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, [self.pad] * 4))
        return x + y if self.add else y


class VainfMobileNet(nn.Module):
    """Output stride 16: the stage of 160 keeps its resolution, and only its later blocks are dilated."""

    def __init__(self) -> None:
        super().__init__()
        cin = 32
        blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU6())]
        stages = [(1, 16, 1, 1, 1, 1), (6, 24, 2, 2, 1, 1), (6, 32, 3, 2, 1, 1), (6, 64, 4, 2, 1, 1)]
        stages += [(6, 96, 3, 1, 1, 1), (6, 160, 3, 1, 1, 2), (6, 320, 1, 1, 2, 2)]
        for expand, cout, depth, stride, first, rest in stages:
            for i in range(depth):
                step = (stride, first) if i == 0 else (1, rest)
                blocks.append(VainfBlock(cin, cout, expand, *step))
                cin = cout
        self.low_level_features = nn.Sequential(*blocks[:4])
        # Numbered on from the fourth.
        self.high_level_features = named(**{str(i): block for i, block in enumerate(blocks[4:], start=4)})

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low_level_features(x)
        return low, self.high_level_features(low)


def body(cin: int, cout: int, rate: int) -> nn.Module:
    depthwise = nn.Conv2d(cin, cin, 3, 1, rate, rate, cin, bias=False)
    return named(body=nn.Sequential(depthwise, nn.Conv2d(cin, cout, 1, bias=False)))


class Pool(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return up(super().forward(x), x, corners=False)


def vainf_aspp(cin: int, separable: bool) -> nn.Module:
    aspp = nn.Module()
    convs = [nn.Sequential(*conv_relu(cin, 256))]
    for rate in RATES[1:]:
        conv, *rest = conv_relu(cin, 256, 3, rate)
        convs.append(nn.Sequential(body(cin, 256, rate) if separable else conv, *rest))
    aspp.convs = nn.ModuleList([*convs, Pool(nn.AdaptiveAvgPool2d(1), *conv_relu(cin, 256))])
    aspp.project = nn.Sequential(*conv_relu(1280, 256), nn.Dropout(0.1))
    aspp.forward = lambda x: aspp.project(torch.cat([conv(x) for conv in aspp.convs], 1))
    return aspp


class Vainf(nn.Module):
    def __init__(
        self, classes: int, depths: tuple[int, ...] | None, *, plus: bool = True, separable: bool = False
    ) -> None:
        super().__init__()
        self.backbone = ResNet(depths, (1, 2, 2)) if depths else VainfMobileNet()
        cin, low = (2048, 256) if depths else (320, 24)
        aspp, self.classifier, self.plus = vainf_aspp(cin, separable), nn.Module(), plus
        if not plus:
            self.classifier.classifier = nn.Sequential(aspp, *conv_relu(256, 256, 3), nn.Conv2d(256, classes, 1))
            return
        self.classifier.project = nn.Sequential(*conv_relu(low, 48))
        self.classifier.aspp = aspp
        conv, *rest = conv_relu(304, 256, 3)
        self.classifier.classifier = nn.Sequential(
            body(304, 256, 1) if separable else conv, *rest, nn.Conv2d(256, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        low, y = self.backbone.features(x)
        head = self.classifier
        if self.plus:
            low = head.project(low)
            y = torch.cat([low, up(head.aspp(y), low, corners=False)], 1)
        return up(head.classifier(y), x, corners=False)

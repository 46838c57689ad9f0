"""DeepLabs of tensorflow/models, research/deeplab, restated on plain torch functions with TensorFlow's rules.

A graph makes its variables on first use, under TensorFlow's names and in its axes (H, W, in, out), so that the names
that a checkpoint holds and where they are used are one statement. Padding is TensorFlow's: SAME, which is uneven where
the stride leaves an even rest, or the explicit symmetric one of `conv2d_same` and `fixed_padding`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Variables(dict[str, Tensor]):
    """fp32, and used in fp64, so that only the graph can make a difference."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, fan: int) -> Tensor:
        if name not in self:
            # Small, so that the variances are and the epsilons show.
            self[name] = torch.randn(shape, generator=self.generator) * 0.2 / fan**0.5
        return self[name].double()

    def uniform(self, name: str, size: int, low: float, high: float) -> Tensor:
        if name not in self:
            self[name] = torch.rand(size, generator=self.generator) * (high - low) + low
        return self[name].double()


class Shapes(Variables):
    """Without values."""

    def normal(self, name: str, *shape: int, fan: int) -> Tensor:
        return self.setdefault(name, torch.empty(shape, device="meta")).double()

    def uniform(self, name: str, size: int, low: float, high: float) -> Tensor:
        return self.setdefault(name, torch.empty(size, device="meta")).double()


def same(x: Tensor, kernel: int, stride: int, rate: int, value: float = 0.0) -> Tensor:
    sides = []
    for size in (x.shape[3], x.shape[2]):
        total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * rate + 1 - size)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


def fixed(x: Tensor, kernel: int, rate: int) -> Tensor:
    return F.pad(x, [(kernel - 1) * rate // 2] * 4)


class Graph:
    """Layers with one epsilon. explicit: a strided convolution pads by itself and evenly."""

    def __init__(self, variables: Variables, eps: float, act: Callable, explicit: bool = True) -> None:
        self.v, self.eps, self.act, self.explicit = variables, eps, act, explicit

    def norm(self, x: Tensor, scope: str) -> Tensor:
        """The moving statistics are near those of the first x, so that no scale grows from layer to layer."""
        channels, scope, shape = x.shape[1], f"{scope}/BatchNorm", (1, -1, 1, 1)
        gamma = self.v.uniform(f"{scope}/gamma", channels, 0.5, 1.5)
        beta = self.v.uniform(f"{scope}/beta", channels, -0.1, 0.1)
        if f"{scope}/moving_mean" not in self.v:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.v.uniform(f"{scope}/moving_mean", channels, -0.05, 0.05)
            self.v.uniform(f"{scope}/moving_variance", channels, 0.8, 1.25)
            self.v[f"{scope}/moving_mean"] += mean.float()
            self.v[f"{scope}/moving_variance"] *= var.float() if x[0, 0].numel() > 1 else 1
        mean, var = self.v[f"{scope}/moving_mean"].double(), self.v[f"{scope}/moving_variance"].double()
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return x * gamma.view(shape) + beta.view(shape)

    def padded(self, x: Tensor, kernel: int, stride: int, rate: int) -> Tensor:
        return fixed(x, kernel, rate) if stride > 1 and self.explicit else same(x, kernel, stride, rate)

    def conv(
        self, x: Tensor, scope: str, out: int, kernel: int = 1, stride: int = 1, rate: int = 1, act=True
    ) -> Tensor:
        weight = self.v.normal(f"{scope}/weights", kernel, kernel, x.shape[1], out, fan=kernel**2 * x.shape[1])
        x = self.padded(x, kernel, stride, rate)
        x = self.norm(F.conv2d(x, weight.permute(3, 2, 0, 1), stride=stride, dilation=rate), scope)
        return self.act(x) if act else x

    def depthwise(self, x: Tensor, scope: str, stride: int = 1, rate: int = 1, act=True) -> Tensor:
        channels = x.shape[1]
        weight = self.v.normal(f"{scope}/depthwise_weights", 3, 3, channels, 1, fan=9)
        x = self.padded(x, 3, stride, rate)
        x = F.conv2d(x, weight.permute(2, 3, 0, 1), stride=stride, dilation=rate, groups=channels)
        x = self.norm(x, scope)
        return self.act(x) if act else x

    def separable(self, x: Tensor, scope: str, out: int, stride: int = 1, rate: int = 1, act=True) -> Tensor:
        return self.conv(self.depthwise(x, f"{scope}_depthwise", stride, rate, act), f"{scope}_pointwise", out, act=act)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


XCEPTION_ENTRIES = {
    "xception_41": ([(128, 2), (256, 2), (728, 2)], "entry_flow/block2", 8),
    "xception_65": ([(128, 2), (256, 2), (728, 2)], "entry_flow/block2", 16),
    "xception_71": ([(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)], "entry_flow/block3", 16),
}


def xception(v: Variables, x: Tensor, name: str, output_stride: int) -> tuple[Tensor, Tensor]:
    """-> the second pointwise convolution's output in the block that the decoder takes, the last features."""
    entry, tapped, middle = XCEPTION_ENTRIES[name]
    g = Graph(v, 1e-3, F.relu)
    x = g.conv(x, f"{name}/entry_flow/conv1_1", 32, 3, 2)
    x = g.conv(x, f"{name}/entry_flow/conv1_2", 64, 3)
    units = [(f"entry_flow/block{i}", "unit_1", (c, c, c), s, "conv") for i, (c, s) in enumerate(entry, 1)]
    units += [("middle_flow/block1", f"unit_{i + 1}", (728, 728, 728), 1, "sum") for i in range(middle)]
    units += [("exit_flow/block1", "unit_1", (728, 1024, 1024), 2, "conv")]
    units += [("exit_flow/block2", "unit_1", (1536, 1536, 2048), 1, "none")]
    reached, rate = 2, 1
    for block, unit, depths, stride, skip in units:
        scope = f"{name}/{block}/{unit}/xception_module"
        own, step = (rate, 1) if reached == output_stride else (1, stride)
        y, inside = x, skip == "none"
        for i, depth in enumerate(depths):
            y = y if inside else F.relu(y)
            s = step if i == 2 else 1
            y = g.separable(y, f"{scope}/separable_conv{i + 1}", depth, s, own, act=inside)
            if i == 1 and block == tapped:
                low = y
        if skip == "conv":
            x = y + g.conv(x, f"{scope}/shortcut", depths[2], 1, step, act=False)
        else:
            x = y + x if skip == "sum" else y
        if reached == output_stride:
            rate *= stride
        else:
            reached *= stride
    return low, x


def resnet_beta(v: Variables, x: Tensor, name: str, output_stride: int) -> tuple[Tensor, Tensor]:
    """-> block1/unit_2's third convolution, block4."""
    g = Graph(v, 1e-5, F.relu)
    for i, (width, stride) in enumerate(((64, 2), (64, 1), (128, 1)), 1):
        x = g.conv(x, f"{name}/conv1_{i}", width, 3, stride)
    x = F.max_pool2d(same(x, 3, 2, 1, value=-torch.inf), 3, 2)
    reached, rate = 4, 1
    for b, (depth, width) in enumerate(((3, 64), (4, 128), (23 if "101" in name else 6, 256), (3, 512)), 1):
        for u in range(1, depth + 1):
            scope = f"{name}/block{b}/unit_{u}/bottleneck_v1"
            stride = 2 if u == depth and b < 4 else 1
            own, step = (rate, 1) if reached == output_stride else (1, stride)
            if x.shape[1] == 4 * width:
                shortcut = F.max_pool2d(x, 1, step)
            else:
                shortcut = g.conv(x, f"{scope}/shortcut", 4 * width, 1, step, act=False)
            y = g.conv(x, f"{scope}/conv1", width)
            y = g.conv(y, f"{scope}/conv2", width, 3, step, own)
            y = g.conv(y, f"{scope}/conv3", 4 * width, act=False)
            if (b, u) == (1, 2):
                low = y
            x = F.relu(shortcut + y)
            if reached == output_stride:
                rate *= stride
            else:
                reached *= stride
    return low, x


def mobilenet(v: Variables, x: Tensor, multiplier: float, output_stride: int) -> Tensor:
    """-> layer_18."""
    g, name = Graph(v, 1e-3, lambda x: x.clamp(0, 6), explicit=False), "MobilenetV2"
    x = g.conv(x, f"{name}/Conv", int(32 * multiplier), 3, 2)
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    reached, rate, count = 2, 1, 0
    for expansion, channels, depth, first in stages:
        for i in range(depth):
            scope, stride = f"{name}/expanded_conv" + (f"_{count}" if count else ""), first if i == 0 else 1
            own, step = (rate, 1) if reached == output_stride else (1, stride)
            y = x if expansion == 1 else g.conv(x, f"{scope}/expand", expansion * x.shape[1])
            y = g.depthwise(y, f"{scope}/depthwise", step, own)
            y = g.conv(y, f"{scope}/project", int(channels * multiplier), act=False)
            x = x + y if step == 1 and x.shape == y.shape else y
            if reached == output_stride:
                rate *= stride
            else:
                reached *= stride
            count += 1
    return x


def deeplab(
    v: Variables, pixels: Tensor, backbone: str, classes: int, *, separable=True, output_stride=16, multiplier=1.0
) -> Tensor:
    """pixels fp64 (N, 3, H, W), RGB from 0 to 255, sides of 16 n + 1 -> logits (N, classes, H, W).

    As model.multi_scale_logits; MobilenetV2 has neither atrous branches nor a decoder.
    """
    size, x = pixels.shape[2:], pixels * (2 / 255) - 1
    small = backbone == "MobilenetV2"
    if small:
        x = mobilenet(v, x, multiplier, output_stride)
    else:
        low, x = (xception if backbone.startswith("xception") else resnet_beta)(v, x, backbone, output_stride)
    g = Graph(v, 1e-5, F.relu)
    pooled = g.conv(F.avg_pool2d(x, x.shape[2:]), "image_pooling", 256)
    parts = [resized(pooled, x.shape[2:]), g.conv(x, "aspp0", 256)]
    for i in () if small else (1, 2, 3):
        rate = 6 * i * 16 // output_stride
        layer = g.separable if separable else functools.partial(g.conv, kernel=3)
        parts.append(layer(x, f"aspp{i}", 256, rate=rate))
    x = g.conv(torch.cat(parts, 1), "concat_projection", 256)
    if not small:
        quarter = [(n - 1) // 4 + 1 for n in size]
        low = g.conv(low, "decoder/feature_projection0", 48)
        x = torch.cat([resized(x, quarter), resized(low, quarter)], 1)
        for i in (0, 1):
            if separable:
                x = g.separable(x, f"decoder/decoder_conv{i}", 256)
            else:
                x = g.conv(x, f"decoder/decoder_conv0/decoder_conv0_{i + 1}", 256, 3)
    weight = v.normal("logits/semantic/weights", 1, 1, x.shape[1], classes, fan=x.shape[1])
    x = F.conv2d(x, weight.permute(3, 2, 0, 1), v.uniform("logits/semantic/biases", classes, -0.5, 0.5))
    return resized(x, size)

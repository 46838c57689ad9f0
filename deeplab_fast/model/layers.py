"""The layers that backbones, ASPP and decoder are made of.

Each keeps its convolutions and norms as children and reads them at every call, so that hooks, conversions and
parametrisations of those children hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import make_conv, make_norm, relu


def conv_norm_act(x: Tensor, conv: nn.Module, norm: nn.Module, act: Callable[[Tensor], Tensor] = relu) -> Tensor:
    """act(norm(conv(x))): (N, C, H, W) -> (N, C', H', W')."""
    return act(norm(conv(x)))


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def upsample_concat(x: Tensor, skip: Tensor, align_corners: bool) -> Tensor:
    """x (N, C, h, w) resized to the size of skip (N, C', H, W), then both: (N, C + C', H, W)."""
    return torch.cat([resize(x, skip.shape[-2:], align_corners), skip], dim=1)


class ConvNormAct(nn.Module):
    """Convolution, norm, ReLU: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, norm: str, in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = make_conv(norm, in_channels, out_channels, kernel, dilation=dilation)
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(x, self.conv, self.norm)


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise convolution: (N, in_channels, H, W) -> (N, out_channels, H, W).

    order "norm_last": depthwise, pointwise, norm, ReLU; "norm_each": norm and ReLU after each of the two, as
    in TensorFlow's DeepLab (DeepLabv3+, section 3.2, for its Xception).
    """

    def __init__(self, norm: str, in_channels: int, out_channels: int, dilation: int = 1, *, order: str) -> None:
        super().__init__()
        self.depthwise = make_conv(norm, in_channels, in_channels, 3, dilation=dilation, groups=in_channels)
        self.depthwise_norm = make_norm(norm, in_channels) if order == "norm_each" else None
        self.pointwise = make_conv(norm, in_channels, out_channels, 1)
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.depthwise_norm
        x = self.depthwise(x) if norm is None else conv_norm_act(x, self.depthwise, norm)
        return conv_norm_act(x, self.pointwise, self.norm)


def conv3x3(
    norm: str, in_channels: int, out_channels: int, dilation: int = 1, *, separable: bool, order: str
) -> ConvNormAct | SeparableConv:
    """The 3x3 layer of ASPP and decoder, ordinary or depthwise-separable."""
    if separable:
        return SeparableConv(norm, in_channels, out_channels, dilation, order=order)
    return ConvNormAct(norm, in_channels, out_channels, 3, dilation)

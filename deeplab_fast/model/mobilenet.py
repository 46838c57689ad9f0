"""MobileNetV2 (Sandler et al. 2018) with torchvision's state_dict keys: x -> low-level and last features.

torchvision's features.18, the 1x1 convolution to 1280 channels that feeds ImageNet's classifier, is not part
of it: ASPP reads the 320 channels of features.17, as in TensorFlow's DeepLab.
"""

from __future__ import annotations

from torch import Tensor, nn

from .layers import conv_norm_act, is_plain
from .norm import make_conv, make_norm
from .recompute import run_block

# Expansion, channels, blocks, stride of the first block (MobileNetV2, table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scaled(channels: int, width_mult: float) -> int:
    """channels * width_mult as the nearest multiple of 8, never under 8 nor more than a tenth too small."""
    wanted = channels * width_mult
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


class ConvNormRelu6(nn.Sequential):
    """Convolution ("0"), norm ("1"), ReLU6."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(x, self[0], self[1], "relu6")


def conv_norm_relu6(norm: str, in_channels: int, out_channels: int, kernel: int, **conv: int) -> ConvNormRelu6:
    return ConvNormRelu6(make_conv(norm, in_channels, out_channels, kernel, **conv), make_norm(norm, out_channels))


class InvertedResidual(nn.Module):
    """1x1 expansion (none where the factor is 1), depthwise 3x3, linear 1x1; with `residual`, a shortcut."""

    def __init__(
        self,
        norm: str,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int,
        dilation: int,
        residual: bool,
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        expand = [] if expansion == 1 else [conv_norm_relu6(norm, in_channels, width, 1)]
        self.conv = nn.Sequential(
            *expand,
            conv_norm_relu6(norm, width, width, 3, stride=stride, dilation=dilation, groups=width),
            make_conv(norm, width, out_channels, 1),
            make_norm(norm, out_channels),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        if not is_plain(self.conv, nn.Sequential):
            y = self.conv(x)
            return y if residual is None else y + residual
        *layers, conv, norm = self.conv
        for layer in layers:
            x = layer(x)
        return conv_norm_act(x, conv, norm, "none", residual)


class MobileNetV2(nn.Module):
    """x (N, 3, H, W) -> (features.3's output at stride 4, features.17's at `output_stride`).

    With `auxiliary` features.13's stands between, the last at stride 16.

    Strides beyond `output_stride` become dilation; for `first_block_dilation` see `build_model`.
    """

    def __init__(self, *, norm: str, width_mult: float, output_stride: int, first_block_dilation: str) -> None:
        super().__init__()
        in_channels, reached, dilation = scaled(32, width_mult), 2, 1
        blocks: list[nn.Module] = [conv_norm_relu6(norm, 3, in_channels, 3, stride=2)]
        self.low_level_channels = scaled(24, width_mult)
        for expansion, base, depth, stage_stride in STAGES:
            out_channels = scaled(base, width_mult)
            stride, previous = stage_stride, dilation
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            for i in range(depth):
                blocks.append(
                    InvertedResidual(
                        norm,
                        in_channels,
                        out_channels,
                        expansion=expansion,
                        stride=stride if i == 0 else 1,
                        dilation=previous if i == 0 and first_block_dilation == "previous" else dilation,
                        # By the stage's own stride: the shortcuts stay where dilation replaces it.
                        residual=(i > 0 or stage_stride == 1) and in_channels == out_channels,
                    )
                )
                in_channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.recompute = False
        self.auxiliary_channels = scaled(96, width_mult)
        self.out_channels = in_channels

    def forward(self, x: Tensor, auxiliary: bool = False) -> tuple[Tensor, ...]:
        for i, block in enumerate(self.features):
            x = run_block(block, x, self.recompute)
            if i == 3:
                low_level = x
            elif i == 13:
                middle = x
        return (low_level, middle, x) if auxiliary else (low_level, x)

"""MobileNetV2 (Sandler et al. 2018) with torchvision's state_dict keys: x -> low-level and last features.

torchvision's features.18, the 1x1 convolution to 1280 channels that feeds ImageNet's classifier, is not part
of it: ASPP reads the 320 channels of features.17, as in TensorFlow's DeepLab.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import conv_norm_act, conv_norm_act_depthwise, is_plain
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

# Options of MobileNetV2 for the variants that other projects trained.
MOBILENETS: dict[str, dict[str, float]] = {
    "mobilenet_v2": {},
    "mobilenet_v2_1280": {"last": True},  # torchvision and segmentation_models_pytorch
    "mobilenet_v2_tf": {"eps": 1e-3},  # tensorflow/models, in its DeepLab too
    "mobilenet_v2_vainf": {"pad_first": True},  # VainF/DeepLabV3Plus-Pytorch
    "mobilenet_v2_zym1119": {},  # a class of its own
}


def scaled(channels: int, width_mult: float, divisor: int = 8) -> int:
    """channels * width_mult as the nearest multiple of `divisor`, never under it nor more than a tenth too small."""
    wanted = channels * width_mult
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * wanted else rounded + divisor


class ConvNormRelu6(nn.Sequential):
    """Convolution ("0"), norm ("1"), ReLU6."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(x, self[0], self[1], "relu6")


def conv_norm_relu6(
    norm: str, in_channels: int, out_channels: int, kernel: int, eps: float = 1e-5, **conv: int
) -> ConvNormRelu6:
    return ConvNormRelu6(make_conv(norm, in_channels, out_channels, kernel, **conv), make_norm(norm, out_channels, eps))


class InvertedResidual(nn.Module):
    """1x1 expansion (none where the factor is 1), depthwise 3x3, linear 1x1; with `residual`, a shortcut.

    pad_first: the zeros are put around the block's input, so that the depthwise convolution sees what the expansion
    makes of them. project: the expansion is there for a factor of 1 too, and a shortcut between different widths is a
    1x1 convolution with its norm.
    """

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
        pad_first: bool = False,
        project: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        expand = [] if expansion == 1 and not project else [conv_norm_relu6(norm, in_channels, width, 1, eps)]
        self.conv = nn.Sequential(
            *expand,
            conv_norm_relu6(norm, width, width, 3, eps, stride=stride, dilation=dilation, groups=width),
            make_conv(norm, width, out_channels, 1),
            make_norm(norm, out_channels, eps),
        )
        self.residual = residual
        self.padding = dilation if pad_first else 0
        if pad_first:
            self.conv[-3][0].padding = (0, 0)
        self.shortcut = None
        if residual and in_channels != out_channels:
            self.shortcut = nn.Sequential(make_conv(norm, in_channels, out_channels, 1), make_norm(norm, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        if self.shortcut is not None:
            residual = conv_norm_act(x, *self.shortcut, "none")
        if self.padding:
            x = F.pad(x, (self.padding,) * 4)
        if not is_plain(self.conv, nn.Sequential):
            y = self.conv(x)
            return y if residual is None else y + residual
        *layers, conv, norm = self.conv
        if len(layers) == 2 and all(is_plain(layer, ConvNormRelu6) for layer in layers):
            x = conv_norm_act_depthwise(x, *layers[0], *layers[1], "relu6")
        else:
            for layer in layers:
                x = layer(x)
        return conv_norm_act(x, conv, norm, "none", residual)


class MobileNetV2(nn.Module):
    """x (N, 3, H, W) -> (features.3's output at stride 4, features.17's at `output_stride`).

    With `auxiliary` features.13's stands between, the last at stride 16.

    Strides beyond `output_stride` become dilation; for `first_block_dilation` see `build_model`. last: with
    features.18. eps: of the norms. pad_first: see `InvertedResidual`; the first convolution then has no padding at all,
    as in VainF/DeepLabV3Plus-Pytorch, so that the maps are a pixel smaller for some sizes.
    """

    def __init__(
        self,
        *,
        norm: str,
        width_mult: float,
        width_divisor: int = 8,
        output_stride: int,
        first_block_dilation: str,
        last: bool = False,
        pad_first: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        in_channels, reached, dilation = scaled(32, width_mult, width_divisor), 2, 1
        blocks: list[nn.Module] = [conv_norm_relu6(norm, 3, in_channels, 3, eps, stride=2)]
        self.low_level_channels = scaled(24, width_mult, width_divisor)
        for expansion, base, depth, stage_stride in STAGES:
            out_channels = scaled(base, width_mult, width_divisor)
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
                        pad_first=pad_first,
                        eps=eps,
                    )
                )
                in_channels = out_channels
        if pad_first:
            blocks[0][0].padding = (0, 0)
        if last:
            out_channels = scaled(1280, max(1.0, width_mult), width_divisor)
            blocks.append(conv_norm_relu6(norm, in_channels, out_channels, 1, eps))
            in_channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.recompute = False
        self.auxiliary_channels = scaled(96, width_mult, width_divisor)
        self.out_channels = in_channels

    def forward(self, x: Tensor, auxiliary: bool = False) -> tuple[Tensor, ...]:
        for i, block in enumerate(self.features):
            x = run_block(block, x, self.recompute)
            if i == 3:
                low_level = x
            elif i == 13 and auxiliary:  # else it would stay in memory to the end
                middle = x
        return (low_level, middle, x) if auxiliary else (low_level, x)


class MobileNetV2Zym1119(MobileNetV2):
    """The MobileNetV2 of zym1119/DeepLabv3_MobileNetv2_PyTorch, output stride 16; forward as `MobileNetV2`.

    Four more blocks of 160 channels, dilated by 2 and by 2 * multi_grid, in place of the one of 320; every block of
    stride 1 has a shortcut, a 1x1 convolution where the width changes, and the first an expansion.
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1))

    def __init__(
        self, *, norm: str, width_mult: float, width_divisor: int = 8, multi_grid: tuple[int, int, int]
    ) -> None:
        nn.Module.__init__(self)
        in_channels = scaled(32, width_mult, width_divisor)
        self.low_level_channels = scaled(24, width_mult, width_divisor)
        plan = [(t, c, s if i == 0 else 1, 1) for t, c, n, s in self.STAGES for i in range(n)]
        plan += [(6, 160, 1, 2 * grid) for grid in (1, *multi_grid)]
        blocks: list[nn.Module] = [conv_norm_relu6(norm, 3, in_channels, 3, stride=2)]
        for expansion, base, stride, dilation in plan:
            out_channels = scaled(base, width_mult, width_divisor)
            options = {"expansion": expansion, "stride": stride, "dilation": dilation, "residual": stride == 1}
            blocks.append(InvertedResidual(norm, in_channels, out_channels, project=True, **options))
            in_channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.recompute = False
        self.auxiliary_channels = scaled(96, width_mult, width_divisor)
        self.out_channels = in_channels


def shared_with_zym1119(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of torchvision's MobileNetV2 what `MobileNetV2Zym1119` has, too: the stem and features.2 to features.16."""
    shared = {"0", *(str(i) for i in range(2, 17))}
    return {k: v for k, v in state.items() if k.startswith("features.") and k.split(".")[1] in shared}

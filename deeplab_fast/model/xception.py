"""Aligned Xception (DeepLabv3+, section 3.2 and figure 4): x -> low-level and last features.

Three widths of one design: TensorFlow's xception_41, xception_65 and xception_71 (tensorflow/models,
research/deeplab/core/xception.py), whose batch norms have an epsilon of 1e-3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ConvNormAct, SeparableConv

EPS = 1e-3

# Entry flow as (channels, stride) of each block, the index of the block with the low-level features, and the number of
# middle blocks. Each name is the number of convolutions on the main path, with a depthwise-separable one as one.
XCEPTIONS: dict[str, tuple[tuple[tuple[int, int], ...], int, int]] = {
    "xception41": (((128, 2), (256, 2), (728, 2)), 1, 8),
    "xception65": (((128, 2), (256, 2), (728, 2)), 1, 16),
    "xception71": (((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)), 2, 16),
}


class XceptionBlock(nn.Module):
    """Three times ReLU, depthwise 3x3, norm, pointwise, norm; plus x, or with `project` x through a 1x1 convolution.

    (N, in_channels, H, W) -> (N, channels[2], ceil(H / stride), ceil(W / stride)), and what enters the last of the
    three, the one with the stride: (N, channels[1], H, W), before its ReLU with `tap`, else after.
    """

    def __init__(
        self,
        norm: str,
        in_channels: int,
        channels: tuple[int, int, int],
        *,
        stride: int = 1,
        dilation: int = 1,
        project: bool = False,
        tap: bool = False,
    ) -> None:
        super().__init__()
        first, second, third = channels
        common = {"order": "norm_each", "depthwise_activation": "none", "eps": EPS}
        # The ReLU that a convolution begins with is the one that ends the convolution before it.
        self.conv1 = SeparableConv(norm, in_channels, first, dilation, **common)
        self.conv2 = SeparableConv(norm, first, second, dilation, activation="none" if tap else "relu", **common)
        self.conv3 = SeparableConv(norm, second, third, dilation, stride=stride, activation="none", **common)
        self.shortcut = None
        if project:
            self.shortcut = ConvNormAct(norm, in_channels, third, 1, stride=stride, activation="none", eps=EPS)
        self.tap = tap

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv2(self.conv1(F.relu(x)))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(F.relu(y) if self.tap else y, shortcut), y


class Xception(nn.Module):
    """x (N, 3, H, W) -> (256 channels at stride 4, 2048 at `output_stride`).

    The low-level features are those of entry_flow/block2 (block3 in xception71) before its last convolution, which has
    the stride, and before that one's ReLU. Strides beyond `output_stride` become dilation, from the block after on, as
    in TensorFlow; `multi_grid` multiplies the dilations of the last three convolutions.
    """

    def __init__(self, name: str, *, norm: str, output_stride: int, multi_grid: tuple[int, int, int]) -> None:
        super().__init__()
        entry, self.low_level_block, middle = XCEPTIONS[name]
        self.stem = nn.Sequential(ConvNormAct(norm, 3, 32, 3, stride=2, eps=EPS), ConvNormAct(norm, 32, 64, 3, eps=EPS))
        plan = [((channels,) * 3, stride) for channels, stride in entry]
        plan += [((728, 728, 728), 1)] * middle + [((728, 1024, 1024), 2)]
        blocks, in_channels, reached, dilation = [], 64, 2, 1
        for i, (channels, wanted) in enumerate(plan):
            stride = wanted if reached * wanted <= output_stride else 1
            options = {
                "stride": stride,
                "dilation": dilation,
                # By the stride that is wanted: the weights are the same at every output stride.
                "project": wanted != 1 or in_channels != channels[2],
                "tap": i == self.low_level_block,
            }
            blocks.append(XceptionBlock(norm, in_channels, channels, **options))
            in_channels, reached, dilation = channels[2], reached * stride, dilation * (wanted // stride)
        self.blocks = nn.ModuleList(blocks)
        # Here norm and ReLU follow both the depthwise and the pointwise convolution.
        widths = zip((1024, 1536, 1536), (1536, 1536, 2048), multi_grid, strict=True)
        self.exit = nn.Sequential(
            *(SeparableConv(norm, a, b, dilation * grid, order="norm_each", eps=EPS) for a, b, grid in widths)
        )
        self.low_level_channels = 256
        self.out_channels = 2048

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x, second = block(x)
            if i == self.low_level_block:
                low_level = second
        return low_level, self.exit(x)


_TIMM = {"conv_dw": "depthwise", "bn_dw": "depthwise_norm", "conv_pw": "pointwise", "bn_pw": "norm", "bn": "norm"}


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of `Xception` from that of timm's model of the same name; its classifier `head.` is left out.

    timm's weights are TensorFlow's, converted (timm/models/xception_aligned.py).
    """
    last = max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0)
    renamed = {}
    for key, value in state.items():
        if not key.startswith("head."):
            key = ".".join(_TIMM.get(part, part) for part in key.split(".") if part != "stack")
            renamed[re.sub(rf"^blocks\.{last}\.conv(\d)", lambda match: f"exit.{int(match[1]) - 1}", key)] = value
    return renamed

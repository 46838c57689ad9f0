"""TensorFlow's resnet_v1_50_beta and resnet_v1_101_beta (tensorflow/models, research/deeplab/core/resnet_v1_beta.py).

Three 3x3 convolutions for a stem, and the stride of a stage in its last block, where the shortcut is every other pixel.
The state_dict keys are those of `ResNet` with a beta stem.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import conv_norm_act
from .norm import make_norm
from .recompute import run_block, run_stage
from .resnet import Bottleneck, apply_shortcut, beta_stem

RESNETS_BETA = {"resnet_v1_50_beta": (3, 4, 6, 3), "resnet_v1_101_beta": (3, 4, 23, 3)}


class Subsample(nn.Module):
    """Every `stride`-th pixel: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # A slice would be a view that is not dense, and copied in whatever format the next op takes it for.
        return F.max_pool2d(x, 1, self.stride)


class BetaBottleneck(Bottleneck):
    """`Bottleneck` whose shortcut has a convolution where the width changes, and none where only the size does."""

    def __init__(self, norm: str, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__(norm, in_channels, width, stride, (dilation, dilation), "relu")
        if in_channels == width * self.expansion:
            self.downsample = None if stride == 1 else Subsample(stride)

    def forward(self, x: Tensor, tap: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """tap: with the last norm's output, before the sum and its ReLU."""
        if not tap:
            return super().forward(x)
        y = conv_norm_act(x, self.conv1, self.bn1)
        y = conv_norm_act(y, self.conv2, self.bn2)
        y = conv_norm_act(y, self.conv3, self.bn3, "none")
        return F.relu(y + apply_shortcut(self.downsample, x)), y


class ResNetBeta(nn.Module):
    """x (N, 3, H, W) -> (256 channels at stride 4, 2048 at `output_stride`).

    The low-level features are those of block1's second unit before its sum, and negative too. Strides beyond
    `output_stride` become dilation, from the block after on; `multi_grid` multiplies that of the last stage's blocks.
    """

    def __init__(self, name: str, *, norm: str, output_stride: int, multi_grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = beta_stem(norm, "relu", 128)
        self.bn1 = make_norm(norm, 128)
        in_channels, reached, dilation = 128, 4, 1
        for stage, (depth, width) in enumerate(zip(RESNETS_BETA[name], (64, 128, 256, 512), strict=True), start=1):
            wanted = 2 if stage < 4 else 1
            stride = wanted if reached * wanted <= output_stride else 1
            grid = multi_grid if stage == 4 else (1,) * depth
            blocks = []
            for i in range(depth):
                step = stride if i == depth - 1 else 1
                blocks.append(BetaBottleneck(norm, in_channels, width, step, dilation * grid[i]))
                in_channels = width * BetaBottleneck.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            reached, dilation = reached * stride, dilation * (wanted // stride)
        self.recompute = False
        self.low_level_channels = 256
        self.out_channels = in_channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = conv_norm_act(x, self.conv1, self.bn1)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        first, second, last = self.layer1
        x, low_level = second(run_block(first, x, self.recompute), tap=True)
        x = run_block(last, x, self.recompute)
        for stage in (self.layer2, self.layer3, self.layer4):
            x = run_stage(stage, x, self.recompute)
        return low_level, x

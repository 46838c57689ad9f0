"""ResNet backbones (He et al. 2016) with torchvision's state_dict keys: x -> low-level and last features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import conv_norm_act, is_plain
from .norm import make_conv, make_norm
from .recompute import run_stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut; ReLU after the sum, `activation` before."""

    expansion = 1

    def __init__(
        self, norm: str, in_channels: int, width: int, stride: int, dilations: tuple[int, int], activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = make_conv(norm, in_channels, width, 3, stride=stride, dilation=dilations[0])
        self.bn1 = make_norm(norm, width)
        self.conv2 = make_conv(norm, width, width, 3, dilation=dilations[1])
        self.bn2 = make_norm(norm, width)
        self.downsample = shortcut(norm, in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm_act(x, self.conv1, self.bn1, self.activation)
        return conv_norm_act(y, self.conv2, self.bn2, residual=apply_shortcut(self.downsample, x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which holds stride and dilation, as in torchvision), 1x1 and the shortcut; see `BasicBlock`."""

    expansion = 4

    def __init__(
        self, norm: str, in_channels: int, width: int, stride: int, dilations: tuple[int, int], activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = make_conv(norm, in_channels, width, 1)
        self.bn1 = make_norm(norm, width)
        self.conv2 = make_conv(norm, width, width, 3, stride=stride, dilation=dilations[0])
        self.bn2 = make_norm(norm, width)
        self.conv3 = make_conv(norm, width, width * self.expansion, 1)
        self.bn3 = make_norm(norm, width * self.expansion)
        self.downsample = shortcut(norm, in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm_act(x, self.conv1, self.bn1, self.activation)
        y = conv_norm_act(y, self.conv2, self.bn2, self.activation)
        return conv_norm_act(y, self.conv3, self.bn3, residual=apply_shortcut(self.downsample, x))


def shortcut(norm: str, in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The 1x1 convolution and norm of a shortcut that changes size or width, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(make_conv(norm, in_channels, out_channels, 1, stride=stride), make_norm(norm, out_channels))


def apply_shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """The other summand of a block: x itself, or what the shortcut's convolution and norm make of it."""
    if downsample is None:
        return x
    if is_plain(downsample, nn.Sequential) and len(downsample) == 2:
        return conv_norm_act(x, downsample[0], downsample[1], "none")
    return downsample(x)


def beta_stem(norm: str, activation: str, last: int = 64) -> nn.Sequential:
    """Three 3x3 convolutions of 64, 64 and `last` filters, the first of stride 2, norm and activation between.

    `bn1` follows. With 64 the widths are those of chenxi116/DeepLabv3.pytorch, so the stages are those of the plain
    ResNet. The norms between are those of TensorFlow's resnet_v1_beta, whose third convolution has 128 filters.
    """
    layers: list[nn.Module] = []
    for in_channels, stride in ((3, 2), (64, 1)):
        layers += [
            make_conv(norm, in_channels, 64, 3, stride=stride),
            make_norm(norm, 64),
            nn.ReLU(inplace=True) if activation == "relu" else nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers, make_conv(norm, 64, last, 3))


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """x (N, 3, H, W) -> (layer1's output at stride 4, layer4's at `output_stride`), layer3's between with `auxiliary`.

    Strides beyond `output_stride` become dilation. `multi_grid` multiplies the dilation of layer4's blocks;
    `first_block_dilation` is "stage" or "previous" (see `build_model`).
    """

    def __init__(
        self,
        name: str,
        *,
        norm: str,
        output_stride: int,
        multi_grid: tuple[int, int, int],
        first_block_dilation: str,
        beta: bool,
        activation: str,
    ) -> None:
        super().__init__()
        block, depths = RESNETS[name]
        self.conv1 = beta_stem(norm, activation) if beta else make_conv(norm, 3, 64, 7, stride=2)
        self.bn1 = make_norm(norm, 64)
        in_channels, reached, dilation = 64, 4, 1
        for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), start=1):
            stride, previous = (1 if stage == 1 else 2), dilation
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            first = previous if first_block_dilation == "previous" else dilation
            grid = multi_grid if multi_grid != (1, 1, 1) and stage == 4 else (1,) * depth
            blocks = []
            for i in range(depth):
                dilations = (grid[i] * (first if i == 0 else dilation), grid[i] * dilation)
                blocks.append(block(norm, in_channels, width, stride if i == 0 else 1, dilations, activation))
                in_channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.activation = activation
        self.recompute = False
        self.low_level_channels = 64 * block.expansion
        self.auxiliary_channels = 256 * block.expansion
        self.out_channels = in_channels

    def forward(self, x: Tensor, auxiliary: bool = False) -> tuple[Tensor, ...]:
        x = conv_norm_act(x, self.conv1, self.bn1, self.activation)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        low_level = run_stage(self.layer1, x, self.recompute)
        x = run_stage(self.layer2, low_level, self.recompute)
        x = run_stage(self.layer3, x, self.recompute)
        middle = x if auxiliary else None  # else it would stay in memory to the end
        x = run_stage(self.layer4, x, self.recompute)
        return (low_level, middle, x) if auxiliary else (low_level, x)

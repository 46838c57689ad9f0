"""Normalisation layers, and the convolutions that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("batch", "sync_batch", "frozen_batch", "group")


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that always uses its running statistics, after `.train()` too, and learns nothing.

    (N, C, H, W) -> (N, C, H, W). Its state_dict is that of `nn.BatchNorm2d`.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


class StandardisedConv2d(nn.Conv2d):
    """Convolution whose filters have zero mean and unit standard deviation (unbiased, + 1e-5) at each call.

    Weight Standardization (Qiao et al. 2019), section 3. The stored weight is the raw one.
    """

    def standardised_weight(self) -> Tensor:
        """(out, in / groups, kh, kw), in the dtype of the weight."""
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return (self.weight - mean) / (std + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardised_weight(), self.bias)


def group_count(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32 and leaves two channels or more to a group.

    A group of one channel would turn the 1x1 map of ASPP's image pooling into a constant.
    """
    return max((g for g in range(1, min(32, channels // 2) + 1) if channels % g == 0), default=1)


def make_norm(kind: str, channels: int, eps: float = 1e-5) -> nn.Module:
    """The normalisation layer for `channels` channels; `kind` is one of NORMS.

    sync_batch is decided here: `nn.SyncBatchNorm` where torch.distributed is initialised with two processes
    or more, plain `nn.BatchNorm2d` otherwise.
    """
    if kind == "group":
        return nn.GroupNorm(group_count(channels), channels, eps)
    if kind == "frozen_batch":
        return FrozenBatchNorm2d(channels, eps)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if kind == "sync_batch" and distributed and torch.distributed.get_world_size() > 1:
        return nn.SyncBatchNorm(channels, eps)
    return nn.BatchNorm2d(channels, eps)


def make_conv(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution without bias that keeps the size (over the stride), to be followed by the norm `kind`.

    With group norm its weight is standardised, unless it is depthwise: zero-mean filters pass no mean.
    """
    conv = StandardisedConv2d if kind == "group" and groups == 1 else nn.Conv2d
    padding = dilation * (kernel // 2)
    return conv(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=False,
    )

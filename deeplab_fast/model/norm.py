"""Normalisation layers, and the convolutions that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from .. import ops
from . import synchronised

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


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that takes its statistics, in training, over the batches of all processes.

    (N, C, H, W) -> (N, C, H, W), on CPU and CUDA; N may differ, and be 0, in a process. Whether there are others is
    asked at each call: with one process, and in eval mode, it is `nn.BatchNorm2d`. Its state_dict is too. Raises
    ValueError where all processes together have one value per channel.
    """

    def processes(self) -> synchronised.Group | None:
        """Those whose statistics this call is to share, or None."""
        return synchronised.processes() if self.training else None

    def forward(self, x: Tensor) -> Tensor:
        group = self.processes()
        if group is None:
            return super().forward(x)
        self._check_input_dim(x)
        if x.device.type == "cuda" and not ops.has_kernel("batch_norm_act", x) and not torch.compiler.is_compiling():
            return self._torchs_own(x, group)
        return self.normalise(x, *ops.batch_norm_statistics(x), group)

    def normalise(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        group: synchronised.Group,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        """activation(norm(x) + residual), with mean and biased variance (C,) of this process's x, fp32 or fp64."""
        pixels = x.numel() // x.shape[1]
        mean, var, count = synchronised.share_statistics(mean, var, pixels, group)
        if pixels < 2:
            _refuse_one_value(count, x)
        if self.track_running_stats:
            with torch.no_grad():
                moved = mean, var * (count / (count - 1))
                if pixels == 0:  # maybe nobody has any
                    own = self.running_mean, self.running_var
                    moved = [torch.where(count > 0, new, old) for new, old in zip(moved, own, strict=True)]
                move_statistics(self, *moved)
        weight = torch.ones_like(mean) if self.weight is None else self.weight.to(mean.dtype)
        bias = torch.zeros_like(mean) if self.bias is None else self.bias.to(mean.dtype)
        return synchronised.batch_norm_act(
            x, mean, var, count, weight, bias, residual, group, eps=self.eps, activation=activation
        )

    def _torchs_own(self, x: Tensor, group: synchronised.Group) -> Tensor:
        """What nn.SyncBatchNorm runs on CUDA, one message each way as well; its class refuses CPUs."""
        share, mean, var = 0.0 if self.momentum is None else self.momentum, None, None
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else share
            mean, var = self.running_mean, self.running_var
        world = torch.distributed.group.WORLD
        return SyncBatchNorm.apply(x, self.weight, self.bias, mean, var, self.eps, share, world, group.size)


def _refuse_one_value(count: Tensor, x: Tensor) -> None:
    """For processes that have one or none themselves, so that most wait for no device."""
    message = f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} and no other"
    if count.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(count != 1, message)
    elif count == 1:
        raise ValueError(message)


def move_statistics(norm: nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    """The running statistics and their count, as nn.BatchNorm2d moves them by one batch."""
    norm.num_batches_tracked.add_(1)
    share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(unbiased_var.to(norm.running_var.dtype), share)


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
    """The normalisation layer for `channels` channels; `kind` is one of NORMS."""
    if kind == "group":
        return nn.GroupNorm(group_count(channels), channels, eps)
    if kind == "frozen_batch":
        return FrozenBatchNorm2d(channels, eps)
    if kind == "sync_batch":
        return SyncBatchNorm2d(channels, eps)
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

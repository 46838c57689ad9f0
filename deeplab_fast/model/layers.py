"""The layers that backbones, ASPP and decoder are made of, on the ops where these have a kernel.

Each keeps its convolutions and norms as children and reads them at every call. A child that is not exactly the plain
type, or that has a hook, is called as it is, so that conversions, parametrisations and hooks hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.precision import autocast_dtype
from .norm import FrozenBatchNorm2d, SyncBatchNorm2d, make_conv, make_norm, move_statistics

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    # In place: no normalisation needs its own output for its gradient.
    "relu": lambda x: F.relu(x, inplace=True),
    "relu6": lambda x: F.relu6(x, inplace=True),
    # InPlaceABN's slope, the one that published DeepLabs were trained with.
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01, inplace=True),
}
# What the ops compute in the same pass; any other follows them.
FUSED = ("none", "relu", "relu6")


def conv_norm_act(
    x: Tensor, conv: nn.Module, norm: nn.Module, activation: str = "relu", residual: Tensor | None = None
) -> Tensor:
    """activation(norm(conv(x)) + residual): (N, C, H, W) -> (N, C', H', W'); residual as the result."""
    if activation not in FUSED:
        return ACTIVATIONS[activation](conv_norm_act(x, conv, norm, "none", residual))
    if _is_fast_depthwise(x, conv) and _is_plain_batch_norm(norm):
        step = {"stride": conv.stride[0], "dilation": conv.dilation[0]}
        if norm.training:
            y, mean, var = ops.depthwise_conv_statistics(x, conv.weight, **step)
            return _normalise(y, mean, var, norm, activation, residual)
        if residual is None and not _learns(norm):
            scale, shift = _affine(norm)
            return ops.depthwise_conv(x, conv.weight, scale, shift, activation=activation, **step)
    return norm_act(convolve(x, conv), norm, activation, residual)


def conv_norm_act_depthwise(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    depthwise: nn.Module,
    depthwise_norm: nn.Module,
    activation: str = "relu",
) -> Tensor:
    """conv_norm_act(conv_norm_act(x, conv, norm, activation), depthwise, depthwise_norm, activation).

    In training the result between them is not kept, nor written at all, where that is one op.
    """
    x = convolve(x, conv)
    if not _normalises_as_it_convolves(x, norm, depthwise, depthwise_norm, activation):
        return conv_norm_act(norm_act(x, norm, activation), depthwise, depthwise_norm, activation)
    x = x.contiguous(memory_format=torch.channels_last)  # once for all that follows
    mean, var = ops.batch_norm_statistics(x)
    _move_statistics(x, mean, var, norm)
    y, *moments = ops.depthwise_conv_normalised(
        *(x, depthwise.weight, mean, var, norm.weight, norm.bias),
        eps=norm.eps,
        activation=activation,
        stride=depthwise.stride[0],
        dilation=depthwise.dilation[0],
    )
    return _normalise(y, *moments, depthwise_norm, activation, None)


def _normalises_as_it_convolves(
    x: Tensor, norm: nn.Module, depthwise: nn.Module, depthwise_norm: nn.Module, activation: str
) -> bool:
    return (
        activation in FUSED
        and ops.has_kernel("depthwise_conv_normalised", x)
        and is_plain_depthwise(depthwise)
        and all(_is_plain_batch_norm(n) and n.training for n in (norm, depthwise_norm))
        and not (type(norm) is SyncBatchNorm2d and norm.processes())
    )


def convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x): (N, C, H, W) -> (N, C', H', W')."""
    if _is_fast_depthwise(x, conv):
        return ops.depthwise_conv(x, conv.weight, stride=conv.stride[0], dilation=conv.dilation[0])
    return conv(x)


def norm_act(x: Tensor, norm: nn.Module, activation: str = "relu", residual: Tensor | None = None) -> Tensor:
    """activation(norm(x) + residual): (N, C, H, W) -> the same. May write into x where the norm is no plain one."""
    if activation not in FUSED:
        return ACTIVATIONS[activation](norm_act(x, norm, "none", residual))
    alike = residual is None or residual.dtype == x.dtype
    if alike and ops.has_kernel("batch_norm_act", x) and _is_plain_batch_norm(norm):
        x = x.contiguous(memory_format=torch.channels_last)  # once for all that follows
        if norm.training:
            mean, var = ops.batch_norm_statistics(x)
            return _normalise(x, mean, var, norm, activation, residual)
        if not _learns(norm):
            return ops.batch_norm_act_inference(x, *_affine(norm), residual, activation=activation)
    y = norm(x)
    if y is x:  # an Identity in the norm's place: not to be written into
        y = y.clone()
    return ACTIVATIONS[activation](y if residual is None else y.add_(residual))


def _normalise(
    x: Tensor, mean: Tensor, var: Tensor, norm: nn.BatchNorm2d, activation: str, residual: Tensor | None
) -> Tensor:
    """Batch norm in training with the statistics of x, which also move the running ones, as nn.BatchNorm2d does."""
    if type(norm) is SyncBatchNorm2d and (group := norm.processes()):
        return norm.normalise(x, mean, var, group, activation, residual)
    _move_statistics(x, mean, var, norm)
    return ops.batch_norm_act(x, mean, var, norm.weight, norm.bias, residual, eps=norm.eps, activation=activation)


def _move_statistics(x: Tensor, mean: Tensor, var: Tensor, norm: nn.BatchNorm2d) -> None:
    """The running statistics by those of x, the variance biased. Raises ValueError where x has one value a channel."""
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    with torch.no_grad():
        if count:
            move_statistics(norm, mean, var * (count / (count - 1)))
        else:  # an empty batch has no statistics
            norm.num_batches_tracked.add_(1)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """fp32 (C,) scale and shift that batch norm with running statistics comes to."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def is_plain(module: nn.Module, *types: type) -> bool:
    """Exactly one of these types, and `is_unhooked`."""
    return type(module) in types and is_unhooked(module)


def is_unhooked(module: nn.Module) -> bool:
    """A call runs the forward of its type and no hook."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks) and not _has_any_global_hook()


def _is_fast_depthwise(x: Tensor, conv: nn.Module) -> bool:
    return ops.has_kernel("depthwise_conv", x) and is_plain_depthwise(conv)


def is_plain_depthwise(conv: nn.Module) -> bool:
    return (
        is_plain(conv, nn.Conv2d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.stride[0] == conv.stride[1]
        and conv.dilation[0] == conv.dilation[1]
        and conv.padding == (conv.dilation[0] * (conv.kernel_size[0] // 2),) * 2
        and conv.padding_mode == "zeros"
        and conv.bias is None
    )


def is_plain_pointwise(conv: nn.Module) -> bool:
    return (
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), 0)
        and conv.groups == 1
        and conv.bias is None
    )


def _is_plain_batch_norm(norm: nn.Module) -> bool:
    return (
        is_plain(norm, nn.BatchNorm2d, SyncBatchNorm2d, FrozenBatchNorm2d)
        and norm.weight is not None
        and norm.bias is not None
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
        and norm.weight.dtype == norm.running_mean.dtype == torch.float32
    )


def _learns(norm: nn.BatchNorm2d) -> bool:
    """Whether scale and shift want gradients although the statistics are frozen: the plain path's business."""
    return torch.is_grad_enabled() and (norm.weight.requires_grad or norm.bias.requires_grad)


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class ConvNormAct(nn.Module):
    """Convolution, norm, activation: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ...)."""

    def __init__(
        self,
        norm: str,
        in_channels: int,
        out_channels: int,
        kernel: int,
        dilation: int = 1,
        *,
        stride: int = 1,
        activation: str = "relu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = make_conv(norm, in_channels, out_channels, kernel, stride=stride, dilation=dilation)
        self.norm = make_norm(norm, out_channels, eps)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(x, self.conv, self.norm, self.activation)


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise convolution: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ...).

    order "norm_last": depthwise, pointwise, norm, activation; "norm_each": norm and activation after each of the two,
    as in TensorFlow's DeepLab (DeepLabv3+, section 3.2). depthwise_activation: the first of them where it differs.
    """

    def __init__(
        self,
        norm: str,
        in_channels: int,
        out_channels: int,
        dilation: int = 1,
        *,
        order: str,
        stride: int = 1,
        activation: str = "relu",
        depthwise_activation: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.depthwise = make_conv(
            norm, in_channels, in_channels, 3, stride=stride, dilation=dilation, groups=in_channels
        )
        self.depthwise_norm = make_norm(norm, in_channels, eps) if order == "norm_each" else None
        self.pointwise = make_conv(norm, in_channels, out_channels, 1)
        self.norm = make_norm(norm, out_channels, eps)
        self.activation = activation
        self.depthwise_activation = activation if depthwise_activation is None else depthwise_activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual, of the result's shape, is added before the last activation."""
        return separable_norm_act(x, *self._parts(), residual)

    def _parts(self) -> tuple[nn.Module, nn.Module, nn.Module, str, nn.Module | None, str]:
        inner = self.depthwise_norm, self.depthwise_activation
        return self.depthwise, self.pointwise, self.norm, self.activation, *inner

    def _inner(self) -> str:
        """The activation between the two convolutions."""
        return "none" if self.depthwise_norm is None else self.depthwise_activation

    def _folds(self, x: Tensor) -> bool:
        return _folds(x, *self._parts())


def separable_norm_act(
    x: Tensor,
    depthwise: nn.Module,
    pointwise: nn.Module,
    norm: nn.Module,
    activation: str = "relu",
    depthwise_norm: nn.Module | None = None,
    depthwise_activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`SeparableConv` of any modules: (N, C, H, W) -> (N, C', H', W'); residual as the result.

    Without depthwise_norm nothing stands between the convolutions.
    """
    if residual is None and _folds(x, depthwise, pointwise, norm, activation, depthwise_norm, depthwise_activation):
        scale, shift = (None, None) if depthwise_norm is None else _affine(depthwise_norm)
        last_scale, last_shift = _affine(norm)
        return ops.separable_conv(
            x,
            depthwise.weight,
            pointwise.weight,
            depthwise_scale=scale,
            depthwise_shift=shift,
            depthwise_activation="none" if depthwise_norm is None else depthwise_activation,
            scale=last_scale,
            shift=last_shift,
            activation=activation,
            dilation=depthwise.dilation[0],
            stride=depthwise.stride[0],
        )
    if depthwise_norm is not None:
        x = conv_norm_act(x, depthwise, depthwise_norm, depthwise_activation)
    else:
        x = convolve(x, depthwise)
    return conv_norm_act(x, pointwise, norm, activation, residual)


def _folds(
    x: Tensor,
    depthwise: nn.Module,
    pointwise: nn.Module,
    norm: nn.Module,
    activation: str,
    depthwise_norm: nn.Module | None,
    depthwise_activation: str,
) -> bool:
    """Whether the whole layer is one op: nothing asks for a gradient, and the norms are running ones."""
    norms = [norm] if depthwise_norm is None else [depthwise_norm, norm]
    return (
        not torch.is_grad_enabled()
        and ops.has_kernel("separable_conv", x)
        and activation in FUSED
        and depthwise_activation in FUSED
        and is_plain_depthwise(depthwise)
        and depthwise.kernel_size == (3, 3)
        and is_plain_pointwise(pointwise)
        and all(_is_plain_batch_norm(norm) and not norm.training for norm in norms)
    )


def separable_concat(x: Tensor, first: Tensor, branches: Sequence[nn.Module], last: Tensor | None) -> Tensor | None:
    """torch.cat((first, each branch's result for x, last), dim=1) where that is one op, else None.

    x: (N, C, H, W); first: (N, M, H, W); last: (N, M', 1, 1), the same at every pixel, or None.
    """
    dtype = autocast_dtype(x.device, x.dtype)
    if not branches or not all(part is None or part.dtype == dtype for part in (first, last)):
        return None
    if not ops.has_kernel("separable_conv_concat", x):
        return None
    if not all(is_plain(branch, SeparableConv) and branch._folds(x) for branch in branches):
        return None
    kinds = {(b.depthwise.stride, b.depthwise_norm is None, b._inner(), b.activation) for b in branches}
    if len(kinds) > 1 or branches[0].depthwise.stride != (1, 1):
        return None
    inner = [_affine(b.depthwise_norm) for b in branches if b.depthwise_norm is not None]
    outer = [_affine(b.norm) for b in branches]
    return ops.separable_conv_concat(
        *(x, first, last, [b.depthwise.weight for b in branches], [b.pointwise.weight for b in branches]),
        *([scale for scale, _ in outer], [shift for _, shift in outer]),
        dilations=[b.depthwise.dilation[0] for b in branches],
        depthwise_scales=[scale for scale, _ in inner],
        depthwise_shifts=[shift for _, shift in inner],
        depthwise_activation=branches[0]._inner(),
        activation=branches[0].activation,
    )


def conv3x3(
    norm: str,
    in_channels: int,
    out_channels: int,
    dilation: int = 1,
    *,
    separable: bool,
    order: str,
    activation: str = "relu",
) -> ConvNormAct | SeparableConv:
    """The 3x3 layer of ASPP and decoder, ordinary or depthwise-separable."""
    if separable:
        return SeparableConv(norm, in_channels, out_channels, dilation, order=order, activation=activation)
    return ConvNormAct(norm, in_channels, out_channels, 3, dilation, activation=activation)

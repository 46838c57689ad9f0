"""What `fusing` puts in place of torch's calls, beside `layers`: for any tensor, with the result and dtype of these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.precision import autocast_dtype
from . import layers
from .layers import ACTIVATIONS
from .reading import add_in_place


def convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x), of one image too."""
    return layers.convolve(x, conv) if x.dim() == 4 else conv(x)


def norm_act(x: Tensor, norm: nn.Module, activation: str, residual: Any = None, in_place: bool = False) -> Tensor:
    """activation(norm(x) + residual) in the dtype that this has: autocast leaves norms and sums theirs."""
    same = residual is None or (
        isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype
    )
    if same and x.dim() == 4 and x.dtype == autocast_dtype(x.device, x.dtype):
        return layers.norm_act(x, norm, activation, residual)
    y = norm(x)
    if residual is not None:
        y = add_in_place(y, residual) if in_place else y + residual
    return ACTIVATIONS[activation](y)


def resize_concat(x: Tensor, low_level: Tensor, size: Any, scale: Any, align_corners: bool | None) -> Tensor:
    """torch.cat((x resized, low_level), 1), x by `F.interpolate`'s bilinear mode with size or scale."""
    if x.dim() == low_level.dim() == 4 and x.dtype == low_level.dtype == autocast_dtype(x.device, x.dtype):
        given = size
        if scale is not None:
            scales = scale if isinstance(scale, (tuple, list)) else (scale,) * 2
            given = tuple(s * n for s, n in zip(scales, x.shape[2:], strict=False))
        given = (given,) * 2 if isinstance(given, int) else tuple(given)
        alike = given == tuple(low_level.shape[2:]) and x.shape[0] == low_level.shape[0]
        if alike and ops.has_kernel("upsample_concat", x):
            return ops.upsample_concat(x, low_level, align_corners=bool(align_corners))
    return torch.cat((F.interpolate(x, size, scale, "bilinear", align_corners), low_level), 1)


def concat(parts: list[Tensor]) -> Tensor:
    """torch.cat(parts, 1), in channels-last where one of them is: torch turns a mixture of layouts into NCHW."""
    last = torch.channels_last
    if any(x.dim() == 4 and x.is_contiguous(memory_format=last) and not x.is_contiguous() for x in parts):
        parts = [x.contiguous(memory_format=last) for x in parts]
    return torch.cat(parts, 1)

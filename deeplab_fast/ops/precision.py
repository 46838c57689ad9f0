"""In which dtype an op computes, and what autocast makes of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is summed in, and what scales, shifts and statistics are in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of an activation or a convolution's weight of `dtype`; fp64 and integers stay."""
    if torch.is_autocast_enabled(device.type) and dtype.is_floating_point and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Activations and convolution weights as autocast wants them; scales, shifts and statistics are not for it."""
    return tuple(t.to(autocast_dtype(t.device, t.dtype)) for t in tensors)

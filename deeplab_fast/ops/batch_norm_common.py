"""What batch norm's ops share, forward and backward: shapes, the native launcher, the table of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, native
from .precision import compute_dtype

CHANNELS = "Tensor mean, Tensor var, Tensor weight, Tensor bias"  # in schemas


def wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def row(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def like_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    wanted = compute_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=wanted), x.new_empty(x.shape[1], dtype=wanted)


def packed(x: Tensor | None) -> Tensor | None:
    """Tensors as kernels want them: activations in channels-last memory, what is per channel contiguous."""
    if x is None:
        return None
    return native.channels_last(x) if x.dim() == 4 else x.contiguous()


def launch_native(
    kernel: str, like: Tensor, eps: float = 0.0, activation: str = "none", count: int = 0, **tensors: Tensor | None
) -> None:
    """csrc/bind/batch_norm_act.cpp; what is not named is null."""
    n, c, h, w = like.shape
    held = {name: packed(x) for name, x in tensors.items()}  # until the kernel has returned: some are copies
    at = lambda *names: [0 if held.get(k) is None else held[k].data_ptr() for k in names]  # noqa: E731
    getattr(native.kernels(), f"batch_norm_act_{kernel}_cpu")(
        *(native.FLOAT_DTYPES.index(like.dtype), native.ACTIVATIONS.index(activation), n * h * w, c),
        *at("x", "y", "grad", "residual", "mean", "var", "weight", "bias"),
        *(eps, *at("sum_grad", "sum_grad_xhat"), count),
        *(*at("result", "masked", "first", "second"), torch.get_num_threads()),
    )


# AMD EPYC (AVX-512), 2 threads, torch 2.13, forward and backward with ReLU, 8 x 256 x 64 x 64: native 11 ms in fp32 and
# 6.3 in bf16, eager 1.3 and 1.4 times as long, torch.compile 5.3 and 7.6 times. Triton: not timed on a GPU yet.
def table(
    native_run: tuple[Callable[..., Any], Callable[..., str | None]],
    triton_run: tuple[Callable[..., Any], Callable[..., str | None]],
    reference: Callable[..., Any],
) -> dict[str, dispatch.Backend]:
    """Of pairs (run, why_not)."""
    return {
        "native": dispatch.Backend(*native_run, measured=("cpu",)),
        "triton": dispatch.Backend(*triton_run, measured=()),
        "reference": dispatch.Backend(reference, dispatch.always, measured=("cpu", "cuda")),
    }


def example_tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(2, 3, 4, 5, device=device), torch.ones(3, device=device)

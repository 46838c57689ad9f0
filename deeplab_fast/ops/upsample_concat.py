"""Bilinear resize of x to the size of low_level, and the concatenation of both, in one pass.

    y[n, :C, Y, X] = sum over the two rows and the two columns of x nearest to (Y, X) of weight * x
    y[n, C:, Y, X] = low_level[n, :, Y, X]

The taps are those of `F.interpolate(mode="bilinear", antialias=False)`. Eager writes the resized tensor, reads it
again and writes the concatenation; its gradient copies the slice of the concatenation's and scatters it. Here each
result is written once from x, which stays in cache. The gradient is gathered with sums in fp32: repeatable.
Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", section 3.1 (the decoder).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native
from .precision import autocast_dtype, compute_dtype


def upsample_concat_reference(x: Tensor, low_level: Tensor, align_corners: bool) -> Tensor:
    """The specification, in plain PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # CUDA's kernel computes in fp32 whatever it reads and writes.
    source = x if x.is_cuda else x.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        resized = F.interpolate(source, low_level.shape[2:], mode="bilinear", align_corners=align_corners)
    result = torch.cat((resized.to(x.dtype), low_level), 1)
    return torch.empty_like(result, memory_format=torch.channels_last).copy_(result)


def upsample_concat(x: Tensor, low_level: Tensor, *, align_corners: bool = False, backend: str = "auto") -> Tensor:
    """Resizes x to low_level's height and width and puts low_level's channels behind it.

    x: (N, C, h, w), any strides, larger or smaller than the result
    low_level: (N, C', H, W), any strides; C' may be 0
    Both floating point; of two dtypes the wider is taken, as by torch.cat, but before the resize.
    Under autocast both are cast to its dtype, in which the result is (torch resizes and concatenates in fp32 there).
    Returns (N, C + C', H, W) in packed channels-last memory.
    Raises ValueError on shapes, dtypes and devices, UserError where a named backend cannot run.
    """
    for name, tensor in (("x", x), ("low_level", low_level)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected 4 dimensions (N, C, H, W)")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; expected a floating-point dtype")
        if tensor.shape[2] == 0 or tensor.shape[3] == 0:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected a height and a width of at least 1")
    if x.shape[1] == 0:
        raise ValueError(f"x is {tuple(x.shape)}; expected at least 1 channel")
    if x.shape[0] != low_level.shape[0]:
        raise ValueError(f"x is {tuple(x.shape)} and low_level {tuple(low_level.shape)}; expected one batch size")
    if x.device != low_level.device:
        raise ValueError(f"x is on {x.device} and low_level on {low_level.device}")
    dtype = autocast_dtype(x.device, torch.promote_types(x.dtype, low_level.dtype))
    return dispatch.run("upsample_concat", x.to(dtype), low_level.to(dtype), align_corners, backend=backend)


def _native_why_not(x: Tensor, low_level: Tensor, align_corners: bool) -> str | None:
    return native.cpu_why_not(x, low_level)


def _native(x: Tensor, low_level: Tensor, align_corners: bool) -> Tensor:
    x, low_level = native.channels_last(x), native.channels_last(low_level)
    result = _fake(x, low_level, align_corners)
    native.kernels().upsample_concat_cpu(
        native.FLOAT_DTYPES.index(x.dtype),
        (*x.shape[:2], low_level.shape[1], *x.shape[2:], *low_level.shape[2:]),
        align_corners,
        *(x.data_ptr(), low_level.data_ptr(), result.data_ptr()),
        torch.get_num_threads(),
    )
    return result


def _triton_why_not(x: Tensor, low_level: Tensor, align_corners: bool) -> str | None:
    return gpu.triton_why_not(x, low_level)


def _triton(x: Tensor, low_level: Tensor, align_corners: bool) -> Tensor:
    from ..kernels import upsample_concat as kernels

    x, low_level = native.channels_last(x), native.channels_last(low_level)
    result = _fake(x, low_level, align_corners)
    kernels.forward(x, low_level, result, align_corners)
    return result


# AMD EPYC (Zen 5, AVX-512), 2 threads, torch 2.13, 256 at 32x64 with 48 at 128x256, fp32 / bf16: native 1.58 / .87 ms,
# torch.compile 2.6 / 2.1, eager 6.6 / 4.6, a copy of the result 2.4 / .85. Triton is not timed on a GPU yet.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton, _triton_why_not, measured=()),
    "reference": dispatch.Backend(upsample_concat_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(x: Tensor, low_level: Tensor, align_corners: bool, backend: str = "auto") -> Tensor:
    shape = (x.shape[0], x.shape[1] + low_level.shape[1], *low_level.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _example(device: torch.device) -> tuple[Tensor, Tensor, bool]:
    return torch.zeros((1, 2, 2, 3), device=device), torch.zeros((1, 1, 4, 5), device=device), False


def _backward_native_why_not(grad: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(grad)


def _backward_native(
    grad: Tensor, height: int, width: int, channels: int, align_corners: bool, need_x: bool, need_low: bool
) -> tuple[Tensor, Tensor]:
    grad = native.channels_last(grad)
    grad_x, grad_low = _backward_fake(grad, height, width, channels, align_corners, need_x, need_low)
    native.kernels().upsample_concat_backward_cpu(
        native.FLOAT_DTYPES.index(grad.dtype),
        (grad.shape[0], channels, grad.shape[1] - channels, height, width, *grad.shape[2:]),
        align_corners,
        grad.data_ptr(),
        grad_x.data_ptr() if need_x else 0,
        grad_low.data_ptr() if need_low else 0,
        torch.get_num_threads(),
    )
    return grad_x, grad_low


def _backward_triton_why_not(grad: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(grad)


def _backward_triton(
    grad: Tensor, height: int, width: int, channels: int, align_corners: bool, need_x: bool, need_low: bool
) -> tuple[Tensor, Tensor]:
    from ..kernels import upsample_concat as kernels

    grad_x, grad_low = _backward_fake(grad, height, width, channels, align_corners, need_x, need_low)
    kernels.backward(native.channels_last(grad), grad_x, grad_low, align_corners)
    return grad_x, grad_low


def _backward_reference(
    grad: Tensor, height: int, width: int, channels: int, align_corners: bool, need_x: bool, need_low: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_low = _backward_fake(grad, height, width, channels, align_corners, need_x, need_low)
    if need_x and grad_x.numel():
        wide = compute_dtype(grad.dtype)
        transposed = torch.ops.aten.upsample_bilinear2d_backward
        grad_x.copy_(transposed(grad[:, :channels].to(wide), grad.shape[2:], grad_x.shape, align_corners))
    if need_low:
        grad_low.copy_(grad[:, channels:])
    return grad_x, grad_low


# The same, 8 x 256 at 22x22 with 48 at 88x88, fp32 / bf16: native 5.8 / 4.9 ms, eager 43 / 44, compile 118 / 124.
BACKWARD_BACKENDS = {
    "native": dispatch.Backend(_backward_native, _backward_native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_backward_triton, _backward_triton_why_not, measured=()),
    "reference": dispatch.Backend(_backward_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _backward_fake(
    grad: Tensor,
    height: int,
    width: int,
    channels: int,
    align_corners: bool,
    need_x: bool,
    need_low: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """grad_x (N, C, h, w) and grad_low (N, C', H, W); what is not needed has no elements."""
    shapes = (
        (grad.shape[0] if need_x else 0, channels, height, width),
        (grad.shape[0] if need_low else 0, grad.shape[1] - channels, *grad.shape[2:]),
    )
    grad_x, grad_low = (
        torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last) for shape in shapes
    )
    return grad_x, grad_low


def _backward_example(device: torch.device) -> tuple[Tensor, int, int, int, bool, bool, bool]:
    return torch.zeros((1, 3, 4, 5), device=device), 2, 3, 2, False, True, True


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, align_corners, backend = inputs
    ctx.sizes = (*x.shape[2:], x.shape[1])
    ctx.align_corners, ctx.backend = align_corners, backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_low = ctx.needs_input_grad[:2]
    grad_x, grad_low = _backward_op(grad, *ctx.sizes, ctx.align_corners, need_x, need_low, ctx.backend)
    return grad_x if need_x else None, grad_low if need_low else None, None, None


dispatch.register(
    "upsample_concat",
    "(Tensor x, Tensor low_level, bool align_corners, str backend) -> Tensor",
    BACKENDS,
    _fake,
    _example,
)
_backward_op = dispatch.register(
    "upsample_concat_backward",
    "(Tensor grad, SymInt height, SymInt width, SymInt channels, bool align_corners, bool need_x, bool need_low, "
    "str backend) -> (Tensor, Tensor)",
    BACKWARD_BACKENDS,
    _backward_fake,
    _backward_example,
)
dispatch.register_autograd("upsample_concat", _backward, _setup_context)
dispatch.forbid_gradient("upsample_concat_backward", "has no second derivative")

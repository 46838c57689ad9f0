"""Gradients of a depthwise convolution (k x k, odd; padding = dilation * (k // 2)) with regard to x and weight.

    grad_x[n, c, h, w]      = sum of grad_y[n, c, i, j] * weight[c, 0, a, b]  over the taps (a, b) that read (h, w):
                              h = i * stride + dilation * (a - k // 2), w likewise
    grad_weight[c, 0, a, b] = sum of grad_y[n, c, i, j] * x[n, c, h, w]  over all such (n, h, w)

Both in one pass: grad_y and x are read once and grad_x is written once, where torch reads grad_y twice and, for a
dilation above 1, multiplies block-diagonal weights that are fifteen sixteenths zeros. Gathered, without atomics: the
result does not depend on the number of threads.
Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions"; Chen et al., "Encoder-Decoder with
Atrous Separable Convolution for Semantic Image Segmentation", section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native


def depthwise_conv_backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch on any device; in fp32, or fp64 where an input is."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    padding, groups = dilation * (weight.shape[-1] // 2), weight.shape[0]
    window = [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups
    inputs = grad_y.to(dtype), x.to(dtype), weight.to(dtype)
    found = torch.ops.aten.convolution_backward(*inputs, None, *window, [need_x, need_weight, False])
    results = _empty(x, weight, need_x, need_weight)
    for result, value in zip(results, found, strict=False):
        if value is not None:
            result.copy_(value)
    return results


def depthwise_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    need_x: bool = True,
    need_weight: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradients of `conv2d(x, weight, None, stride, dilation * (k // 2), dilation, groups=C)`.

    grad_y: (N, C, Ho, Wo) of x's dtype, Ho = (H - 1) // stride + 1, Wo likewise; any strides, as x
    x: (N, C, H, W)
    weight: (C, 1, k, k), k odd, of any floating dtype
    Returns grad_x (N, C, H, W) of x's dtype in packed channels-last memory and grad_weight (C, 1, k, k) of weight's,
    summed in fp32 and fp64; (0,) for one that is not needed. Autocast changes nothing: a gradient follows its forward.
    Has no gradient of its own: asking for one raises. Raises ValueError on shapes and dtypes, UserError where a
    named backend cannot run.
    """
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x is {tuple(x.shape)}; expected (N, C, H, W) of at least one channel and pixel")
    channels, kernel = x.shape[1], weight.shape[-1] if weight.dim() == 4 else 0
    if weight.shape != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected ({channels}, 1, k, k) with an odd k")
    if stride < 1 or dilation < 1:
        raise ValueError(f"stride is {stride} and dilation {dilation}; expected at least 1")
    expected = (*x.shape[:2], *((size - 1) // stride + 1 for size in x.shape[2:]))
    if grad_y.shape != expected:
        raise ValueError(f"grad_y is {tuple(grad_y.shape)}; expected {expected} for the stride {stride}")
    if grad_y.dtype != x.dtype or not x.is_floating_point() or not weight.is_floating_point():
        given = f"grad_y is {grad_y.dtype}, x {x.dtype} and weight {weight.dtype}"
        raise ValueError(f"{given}; expected floating types, one for grad_y and x")
    if not grad_y.device == x.device == weight.device:
        raise ValueError(f"grad_y is on {grad_y.device}, x on {x.device} and weight on {weight.device}")
    return _op(grad_y, x, weight, stride, dilation, need_x, need_weight, backend)


def _empty(x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """grad_x and grad_weight, to be written."""
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    shape = weight.shape if need_weight else (0,)
    return grad_x, weight.new_empty(shape)


def _native_why_not(grad_y: Tensor, x: Tensor, weight: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(grad_y, x) or native.cpu_why_not(weight)


def _native(
    grad_y: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    if missing := max(0, native.FEWEST_CHANNELS - x.shape[1]):
        padded = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (grad_y, x))
        wide = _native(*padded, F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)), stride, dilation, need_x, need_weight)
        grad_x, grad_weight = _empty(x, weight, need_x, need_weight)
        return (
            grad_x.copy_(wide[0][:, : x.shape[1]]) if need_x else grad_x,
            grad_weight.copy_(wide[1][: x.shape[1]]) if need_weight else grad_weight,
        )
    results = grad_x, grad_weight = _empty(x, weight, need_x, need_weight)
    grad_y, x, weight = native.channels_last(grad_y), native.channels_last(x), weight.contiguous()
    native.kernels().depthwise_conv_backward_cpu(
        *(grad_y.data_ptr(), x.data_ptr(), weight.data_ptr()),
        *(grad_x.data_ptr() if need_x else 0, grad_weight.data_ptr() if need_weight else 0),
        *(native.FLOAT_DTYPES.index(x.dtype), native.FLOAT_DTYPES.index(weight.dtype)),
        *((*x.shape, *grad_y.shape[2:]), (weight.shape[-1], stride, dilation)),
        *((0, 0, 0, 0), 0.0, 0, (0, 0), torch.get_num_threads()),
    )
    return results


def _triton_why_not(grad_y: Tensor, x: Tensor, weight: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(grad_y, x) or gpu.triton_why_not(weight) or gpu.images_why_not(x)


def _triton(
    grad_y: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    from ..kernels import depthwise_conv_backward as kernels

    results = grad_x, grad_weight = _empty(x, weight, need_x, need_weight)
    wanted = grad_x if need_x else None, grad_weight if need_weight else None
    grad_y, x = native.channels_last(grad_y), native.channels_last(x)
    kernels.depthwise_conv_backward(grad_y, x, weight, *wanted, stride, dilation)
    return results


# Triton has not been timed on a GPU yet.
# AMD EPYC (AVX-512), 2 threads, torch 2.13, bf16: 8 x 960 x 22 x 22 at dilation 2, native 2.4 ms, torch 77;
# 8 x 96 x 176 x 176 at stride 2, 4.3 and 78; 8 x 384 x 22 x 22, .45 and .63.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton, _triton_why_not, measured=()),
    "reference": dispatch.Backend(depthwise_conv_backward_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    need_x: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty(x, weight, need_x, need_weight)


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int, bool, bool]:
    x = torch.zeros((1, 16, 3, 3), device=device)
    return x, x, torch.zeros((16, 1, 3, 3), device=device), 1, 1, True, True


_op = dispatch.register(
    "depthwise_conv_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, int stride, int dilation, bool need_x, bool need_weight, str backend)"
    " -> (Tensor, Tensor)",
    BACKENDS,
    _fake,
    _example,
)
dispatch.forbid_gradient("depthwise_conv_backward", "has no second derivative")

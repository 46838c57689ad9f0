"""Depthwise convolution of batch norm's and the activation's result, which is never in memory; for training.

    z = act((x - mean) * rsqrt(var + eps) * weight + bias),   y = conv(z, conv_weight), with mean and variance of y

The middle of an inverted residual: 1x1 convolution, norm, ReLU6, depthwise convolution, norm. Where x and y are T bytes
each, batch_norm_act and depthwise_conv_statistics read and write 4 T, keep x and z for the gradient, and read and write
8 T in it. Here z is made of x as x is loaded, in both directions: 2 T, x alone is kept, and 6 T. The padding is of z:
taps outside the image add nothing. z is not rounded to x's dtype.

The gradient is two ops. depthwise_conv_normalised_backward gives the gradient of conv_weight and, in the same pass,
what the activation let pass of z's gradient, with the two sums of it that are the gradients of bias and weight;
batch_norm_act_backward makes grad_x of these. Between them lies the message of synchronised batch norm.
Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", section 3; Ioffe, Szegedy, "Batch
Normalization", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native
from .batch_norm_act import batch_norm_act_reference
from .batch_norm_act_backward import batch_norm_act_backward_reduce_reference
from .batch_norm_common import CHANNELS, like, like_channels, wide
from .depthwise_conv import depthwise_conv_reference
from .depthwise_conv_backward import depthwise_conv_backward_reference
from .precision import autocast, compute_dtype


def depthwise_conv_normalised_reference(
    x: Tensor,
    conv_weight: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    stride: int = 1,
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in plain PyTorch; differentiates mean and var as batch_norm_act_reference does."""
    z = batch_norm_act_reference(wide(x), mean, var, weight, bias, None, eps, activation)
    y = depthwise_conv_reference(z, conv_weight.to(z.dtype), None, None, stride, dilation).to(x.dtype)
    rounded = wide(y.detach())
    found = rounded.mean((0, 2, 3))
    return y, found, (rounded - found[:, None, None]).square().mean((0, 2, 3))


def depthwise_conv_normalised_backward_reference(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_z where the activation let it pass, as x; grad_conv_weight; sum_grad and sum_grad_xhat (C,) as mean.

    grad_y: of y's shape and x's dtype; the others as `depthwise_conv_normalised` has checked them. The sums are over
    this x alone, of what is not rounded yet, and are the gradients of bias and weight.
    """
    channels = mean, var, weight, bias
    with torch.no_grad():
        z = batch_norm_act_reference(wide(x), *channels, None, eps, "none")
        low, high = {"none": (-torch.inf, torch.inf), "relu": (0, torch.inf), "relu6": (0, 6)}[activation]
        given = wide(grad_y), z.clamp(low, high), conv_weight.to(z.dtype)
        grad_z, grad_weight = depthwise_conv_backward_reference(*given, stride, dilation, True, True)
        passed = torch.where((z > low) & (z < high), grad_z, 0)
        sums = batch_norm_act_backward_reduce_reference(passed, wide(x), None, *channels, eps, "none")
        return like(x).copy_(passed), grad_weight.to(conv_weight.dtype), *sums


def depthwise_conv_normalised(
    x: Tensor,
    conv_weight: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """conv(act((x - mean) * rsqrt(var + eps) * weight + bias), conv_weight), and mean and biased variance of it.

    x: (N, C, H, W), any strides; conv_weight: (C, 1, k, k) of x's dtype, k odd; under autocast both take its dtype
    mean, var: (C,) fp32 (fp64 for fp64), the statistics of x over N, H, W: grad_x is that of training-mode batch norm,
        and they themselves get no gradient
    weight, bias: (C,) as mean, of the norm; activation: "none", "relu" or "relu6"
    Returns y (N, C, ceil(H / stride), ceil(W / stride)) of x's dtype in channels-last memory, with zero padding of
    dilation * (k // 2), and mean (C,) and variance (C,) of y as it was rounded, in the dtype of `mean`. Gradients of
    x, conv_weight, weight and bias, through y alone. Keeps x for them.
    Raises ValueError on shapes, dtypes, devices and activations, UserError where a named backend cannot run.
    """
    x, conv_weight = autocast(x, conv_weight)
    _check(x, conv_weight, activation, stride, dilation, mean=mean, var=var, weight=weight, bias=bias)
    channels = (mean.detach(), var.detach(), weight, bias)
    inputs = (x, conv_weight, *channels, eps, activation, stride, dilation)
    return dispatch.run("depthwise_conv_normalised", *inputs, backend=backend)


def _check(x: Tensor, conv_weight: Tensor, activation: str, stride: int, dilation: int, **channels: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(
            f"x is {tuple(x.shape)} of {x.dtype}; expected a floating (N, C, H, W) of at least one channel and pixel"
        )
    c, k = x.shape[1], conv_weight.shape[-1] if conv_weight.dim() == 4 else 0
    if tuple(conv_weight.shape) != (c, 1, k, k) or k % 2 == 0 or conv_weight.dtype != x.dtype:
        given = f"{conv_weight.dtype} {tuple(conv_weight.shape)}"
        raise ValueError(f"conv_weight is {given}; expected {x.dtype} ({c}, 1, k, k) with an odd k")
    if stride < 1 or dilation < 1:
        raise ValueError(f"stride is {stride} and dilation {dilation}; expected at least 1")
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(native.ACTIVATIONS)}")
    wanted = compute_dtype(x.dtype)
    for name, values in channels.items():
        if values.shape != (c,) or values.dtype != wanted:
            raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)}; expected {wanted} ({c},)")
    for name, values in (channels | {"conv_weight": conv_weight}).items():
        if values.device != x.device:
            raise ValueError(f"{name} is on {values.device} and x on {x.device}")


def _native_why_not(x: Tensor, conv_weight: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(x, conv_weight)


def _native_backward_why_not(grad_y: Tensor, x: Tensor, conv_weight: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(grad_y, x, conv_weight)


def _result(x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    size = (n, c, -(-h // stride), -(-w // stride))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, *like_channels(x)


def _gradients(x: Tensor, conv_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(x), conv_weight.new_empty(conv_weight.shape), *like_channels(x)


def _native(x: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *channels, eps, activation, stride, dilation = rest
    held = [native.channels_last(x), conv_weight.contiguous(), *(c.contiguous() for c in channels)]
    x, conv_weight, *channels = held
    y, mean, var = _result(x, stride)
    n, c, h, w = x.shape
    native.kernels().depthwise_conv_cpu(
        *(x.data_ptr(), y.data_ptr(), conv_weight.data_ptr(), 0, 0),
        *(native.FLOAT_DTYPES.index(x.dtype), n, h, w, c, conv_weight.shape[-1], stride, dilation, 0),
        *(mean.data_ptr(), var.data_ptr()),
        *([c.data_ptr() for c in channels], eps, native.ACTIVATIONS.index(activation), torch.get_num_threads()),
    )
    return y, mean, var


def _native_backward(grad_y: Tensor, x: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *channels, eps, activation, stride, dilation = rest
    c = x.shape[1]
    if missing := max(0, native.FEWEST_CHANNELS - c):
        images = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (grad_y, x))
        vectors = (F.pad(t, (0, missing)) for t in channels)
        padded = (*images, F.pad(conv_weight, (0, 0, 0, 0, 0, 0, 0, missing)), *vectors)
        grad_z, *others = _native_backward(*padded, eps, activation, stride, dilation)
        return like(x).copy_(grad_z[:, :c]), *(t[:c].clone() for t in others)
    grad_y, x, conv_weight = native.channels_last(grad_y), native.channels_last(x), conv_weight.contiguous()
    channels = [c.contiguous() for c in channels]
    results = grad_z, grad_weight, *sums = _gradients(x, conv_weight)
    native.kernels().depthwise_conv_backward_cpu(
        *(grad_y.data_ptr(), x.data_ptr(), conv_weight.data_ptr(), grad_z.data_ptr(), grad_weight.data_ptr()),
        *(native.FLOAT_DTYPES.index(x.dtype), native.FLOAT_DTYPES.index(conv_weight.dtype)),
        *((*x.shape, *grad_y.shape[2:]), (conv_weight.shape[-1], stride, dilation)),
        *([c.data_ptr() for c in channels], eps, native.ACTIVATIONS.index(activation)),
        *([s.data_ptr() for s in sums], torch.get_num_threads()),
    )
    return results


def _triton_why_not(x: Tensor, conv_weight: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(x, conv_weight) or gpu.images_why_not(x)


def _triton_backward_why_not(grad_y: Tensor, x: Tensor, conv_weight: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(grad_y, x, conv_weight) or gpu.images_why_not(x)


def _triton(x: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import depthwise_conv as kernels

    *channels, eps, activation, stride, dilation = rest
    norm = kernels.Norm(*(c.contiguous() for c in channels), eps, activation)
    return kernels.depthwise_conv_statistics(native.channels_last(x), conv_weight, stride, dilation, norm)


def _triton_backward(grad_y: Tensor, x: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels import depthwise_conv_backward as kernels

    *channels, eps, activation, stride, dilation = rest
    norm = kernels.Norm(*(c.contiguous() for c in channels), eps, activation)
    grads = like(x), conv_weight.new_empty(conv_weight.shape)
    grad_y, x = native.channels_last(grad_y), native.channels_last(x)
    sums = kernels.depthwise_conv_normalised_backward(grad_y, x, conv_weight, norm, *grads, stride, dilation)
    return *grads, *sums


# Triton has not been timed on a GPU yet.
# AMD EPYC (AVX-512), 2 threads, torch 2.13, forward and backward, 4 x 96 x 128 x 128 at stride 2: 12 ms in
# fp32 and 5.7 in bf16 with the statistics; batch_norm_act and depthwise_conv_statistics 1.7 and 1.8 times as long
# (benchmarks/results/amd_epyc_inverted_residual.md).
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton, _triton_why_not, measured=()),
    "reference": dispatch.Backend(depthwise_conv_normalised_reference, dispatch.always, measured=("cpu", "cuda")),
}
BACKWARD_BACKENDS = {
    "native": dispatch.Backend(_native_backward, _native_backward_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton_backward, _triton_backward_why_not, measured=()),
    "reference": dispatch.Backend(
        depthwise_conv_normalised_backward_reference, dispatch.always, measured=("cpu", "cuda")
    ),
}


def _example(device: torch.device) -> tuple[Any, ...]:
    x, c = torch.ones(1, 16, 3, 3, device=device), torch.ones(16, device=device)
    return x, torch.ones(16, 1, 3, 3, device=device), c, c, c, c, 1e-5, "relu", 1, 1


def _example_backward(device: torch.device) -> tuple[Any, ...]:
    return torch.ones(1, 16, 3, 3, device=device), *_example(device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.activation, ctx.stride, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    x, conv_weight, *channels = ctx.saved_tensors
    ops, window = torch.ops.deeplab_fast, (ctx.stride, ctx.dilation)
    given = (grad, x, conv_weight, *channels, ctx.eps, ctx.activation, *window, ctx.backend)
    grad_z, grad_weight, *sums = ops.depthwise_conv_normalised_backward(*given)
    needs_x, needs_conv_weight, _, _, needs_weight, needs_bias = ctx.needs_input_grad[:6]
    grad_x = None
    if needs_x:
        last = (x.numel() // x.shape[1], ctx.eps, "none", False, ctx.backend)
        (grad_x,) = ops.batch_norm_act_backward(grad_z, x, None, *channels, *sums, *last)
    wanted = (grad_weight if needs_conv_weight else None, None, None, sums[1] if needs_weight else None)
    return grad_x, *wanted, sums[0] if needs_bias else None, *[None] * 5


_ARGUMENTS = f"Tensor x, Tensor conv_weight, {CHANNELS}, float eps, str activation, int stride, int dilation"
dispatch.register(
    "depthwise_conv_normalised",
    f"({_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor)",
    BACKENDS,
    lambda x, *rest: _result(x, rest[-3]),
    _example,
)
dispatch.register(
    "depthwise_conv_normalised_backward",
    f"(Tensor grad_y, {_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    BACKWARD_BACKENDS,
    lambda grad_y, x, conv_weight, *_: _gradients(x, conv_weight),
    _example_backward,
)
dispatch.register_autograd("depthwise_conv_normalised", _backward, _setup)
dispatch.forbid_gradient("depthwise_conv_normalised_backward", "has no second derivative")

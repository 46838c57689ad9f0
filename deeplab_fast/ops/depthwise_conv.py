"""Depthwise convolution with the affine and the activation that follow it, in one pass; three forms.

    y = activation(scale * conv(x, weight) + shift)          scale, shift: the folded batch norm

depthwise_conv is that, depthwise_conv_rates is that for several dilations of one x, and
depthwise_conv_statistics is conv(x, weight) with its mean and variance, for the batch norm of training.
Where x and y are T bytes each, eager reads and writes 6 T for convolution, batch norm and activation, 18 T for
three rates, and 3 T for convolution and statistics; here it is 2 T, 4 T (6 T on a CPU, where arithmetic binds) and
2 T. Above a dilation of 6 oneDNN multiplies dense 16 x 16 blocks of zeros; here taps outside the image are not
computed at all.
Source: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native
from .precision import autocast, compute_dtype

MOST_RATES = 3  # of one launch on a GPU; csrc/cuda/depthwise_plan.h: kMostRates


def _convolution(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """In fp32, or fp64 for fp64."""
    dtype = compute_dtype(x.dtype)
    padding = dilation * (weight.shape[-1] // 2)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups=x.shape[1])


def depthwise_conv_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    activation: str = "none",
) -> Tensor:
    """The specification, in plain PyTorch."""
    y = _convolution(x, weight, stride, dilation)
    if scale is not None:
        y = y * scale[:, None, None].to(y.dtype)
    if shift is not None:
        y = y + shift[:, None, None].to(y.dtype)
    y = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[activation](y)
    return torch.empty_like(y, dtype=x.dtype, memory_format=torch.channels_last).copy_(y)


def depthwise_conv_rates_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    activation: str = "none",
) -> list[Tensor]:
    """The specification, in plain PyTorch."""
    rates = zip(weights, scales, shifts, dilations, strict=True)
    return [depthwise_conv_reference(x, *affine, 1, dilation, activation) for *affine, dilation in rates]


def depthwise_conv_statistics_reference(
    x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    y = depthwise_conv_reference(x, weight, None, None, stride, dilation)
    rounded = y.detach().to(compute_dtype(x.dtype))
    mean = rounded.mean((0, 2, 3))
    variance = (rounded - mean[:, None, None]).square().mean((0, 2, 3))
    return y, mean.float(), variance.float()


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """activation(scale * conv(x, weight) + shift), with a zero padding of dilation * (k // 2).

    x: (N, C, H, W), any strides; weight: (C, 1, k, k) of x's dtype, k odd; under autocast both take its dtype
    scale, shift: (C,) fp32 (fp64 for fp64), or None for 1 and 0
    activation: none, relu or relu6
    Returns (N, C, ceil(H / stride), ceil(W / stride)) of x's dtype, in channels-last memory. An activation's gradient
    is taken from the sign of that result, rounded as it is. Gradients of x, weight, scale and shift, once.
    Raises ValueError on shapes, dtypes and devices, UserError where a named backend cannot run.
    """
    x, weight = autocast(x, weight)
    _check_input(x)
    _check_weight("weight", weight, x)
    _check_affine("scale", scale, x)
    _check_affine("shift", shift, x)
    _check_positive("stride", stride)
    _check_positive("dilation", dilation)
    _check_activation(activation)
    return dispatch.run("depthwise_conv", x, weight, scale, shift, stride, dilation, activation, backend=backend)


def depthwise_conv_rates(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    dilations: Sequence[int],
    activation: str = "none",
    backend: str = "auto",
) -> list[Tensor]:
    """`depthwise_conv` for each of `dilations` with its own weight, scale and shift, at stride 1; for inference.

    x: (N, C, H, W), any strides; weights: one (C, 1, k, k) for each dilation; scales, shifts: one (C,) fp32 for each
    Returns one (N, C, H, W) for each dilation. Raises RuntimeError where a gradient is asked for, else as
    `depthwise_conv`.
    """
    given = [len(weights), len(scales), len(shifts), len(dilations)]
    if not dilations or len(set(given)) != 1:
        raise ValueError(
            "weights, scales, shifts and dilations are {}, {}, {} and {} in number; "
            "expected the same, at least one".format(*given)
        )
    x, *weights = autocast(x, *weights)
    _check_input(x)
    for i, (weight, scale, shift, dilation) in enumerate(zip(weights, scales, shifts, dilations, strict=True)):
        _check_weight(f"weights[{i}]", weight, x)
        _check_affine(f"scales[{i}]", scale, x)
        _check_affine(f"shifts[{i}]", shift, x)
        _check_positive(f"dilations[{i}]", dilation)
    _check_activation(activation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *scales, *shifts)):
        raise RuntimeError("deeplab_fast.depthwise_conv_rates has no gradient: it is for inference")
    inputs = (x, weights, list(scales), list(shifts), list(dilations), activation)
    return dispatch.run("depthwise_conv_rates", *inputs, backend=backend)


def depthwise_conv_statistics(
    x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """conv(x, weight) with the mean and the biased variance of each channel: what batch norm needs in training.

    x: (N, C, H, W), any strides; weight: (C, 1, k, k) of x's dtype, k odd; under autocast both take its dtype
    Returns y as `depthwise_conv` does, and mean (C,) and variance (C,) fp32 of y over N, H and W, as it was rounded
    to its dtype. Gradients go through y alone: those of mean and variance belong to the batch norm's own backward.
    """
    x, weight = autocast(x, weight)
    _check_input(x)
    _check_weight("weight", weight, x)
    _check_positive("stride", stride)
    _check_positive("dilation", dilation)
    return dispatch.run("depthwise_conv_statistics", x, weight, stride, dilation, backend=backend)


def _check_input(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}; expected (N, C, H, W) of a floating-point type")
    if 0 in x.shape[1:]:
        raise ValueError(f"x is {tuple(x.shape)}; expected at least one channel and one pixel")


def _check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    k = weight.shape[-1] if weight.dim() == 4 else 0
    if tuple(weight.shape) != (x.shape[1], 1, k, k) or k % 2 == 0:
        raise ValueError(f"{name} is {tuple(weight.shape)}; expected ({x.shape[1]}, 1, k, k) with an odd k")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"{name} is {weight.dtype} on {weight.device} and x {x.dtype} on {x.device}; expected the same"
        )


def _check_affine(name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is None:
        return
    if tuple(vector.shape) != (x.shape[1],) or vector.device != x.device:
        raise ValueError(f"{name} is {tuple(vector.shape)} on {vector.device}; expected ({x.shape[1]},) on {x.device}")
    if vector.dtype != compute_dtype(x.dtype):
        raise ValueError(f"{name} is {vector.dtype}; expected {compute_dtype(x.dtype)}")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")


def _check_activation(activation: str) -> None:
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(native.ACTIVATIONS)}")


def _native_why_not(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return native.float_why_not(x, weight)


def _native_rates_why_not(x: Tensor, weights: Sequence[Tensor], *_: object) -> str | None:
    return native.float_why_not(x, *weights)


def _triton_why_not(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(x, weight) or gpu.images_why_not(x)


def _triton_rates_why_not(x: Tensor, weights: Sequence[Tensor], *_: object) -> str | None:
    return gpu.triton_why_not(x, *weights) or gpu.images_why_not(x)


def _empty(x: Tensor, stride: int = 1) -> Tensor:
    n, c, h, w = x.shape
    size = (n, c, -(-h // stride), -(-w // stride))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _native(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    dilation: int,
    activation: str,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    if x.is_cuda:
        return _cuda(x, [(weight, scale, shift, dilation)], stride, activation, statistics)[0]
    x, weight = native.channels_last(x), weight.contiguous()
    vectors = [None if v is None else v.contiguous() for v in (scale, shift)]
    y = _empty(x, stride)
    n, c, h, w = x.shape
    native.kernels().depthwise_conv_cpu(
        *(x.data_ptr(), y.data_ptr(), weight.data_ptr(), *(0 if v is None else v.data_ptr() for v in vectors)),
        *(native.FLOAT_DTYPES.index(x.dtype), n, h, w, c),
        *(weight.shape[-1], stride, dilation, native.ACTIVATIONS.index(activation)),
        *((m.data_ptr() for m in statistics) if statistics else (0, 0)),
        *((0, 0, 0, 0), 0.0, 0, torch.get_num_threads()),
    )
    return y


def _cuda(
    x: Tensor,
    rates: Sequence[tuple[Tensor, Tensor | None, Tensor | None, int]],
    stride: int,
    activation: str,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The results of up to MOST_RATES of (weight, scale, shift, dilation), or that of one with mean and variance."""
    x = native.channels_last(x)
    # Alive until the launch, so that no copy takes another's place.
    kept = [[None if t is None else t.contiguous() for t in rate[:3]] for rate in rates]
    results = [_empty(x, stride) for _ in rates]
    module, (device, stream) = native.kernels(), native.device_and_stream(x)
    arguments = (
        *(x.data_ptr(), native.CUDA_FLOAT_DTYPES.index(x.dtype), x.shape, rates[0][0].shape[-1], stride),
        native.ACTIVATIONS.index(activation),
        [
            (*(0 if t is None else t.data_ptr() for t in tensors), y.data_ptr(), rate[3])
            for tensors, y, rate in zip(kept, results, rates, strict=True)
        ],
    )
    moments: list[Tensor] = []
    if statistics:
        parts = module.depthwise_conv_cuda_parts(*arguments, device)
        sizes = ((parts,), (parts, x.shape[1]), (parts, x.shape[1]))
        moments = [*statistics, *(x.new_empty(size, dtype=torch.float32) for size in sizes)]
        if x.shape[0] == 0:
            for moment in statistics:
                moment.fill_(torch.nan)
    module.depthwise_conv_cuda(*arguments, [m.data_ptr() for m in moments] or [0] * 5, device, stream)
    return results


def _native_rates(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    activation: str,
) -> list[Tensor]:
    """On a CPU one after the other: arithmetic binds, so that a kernel that read x once for all was no faster."""
    x = native.channels_last(x)
    rates = list(zip(weights, scales, shifts, dilations, strict=True))
    if x.is_cuda:
        parts = [rates[i : i + MOST_RATES] for i in range(0, len(rates), MOST_RATES)]
        return [y for part in parts for y in _cuda(x, part, 1, activation)]
    return [_native(x, weight, scale, shift, 1, dilation, activation) for weight, scale, shift, dilation in rates]


def _native_statistics(x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return _native(x, weight, None, None, stride, dilation, "none", (mean, variance)), mean, variance


def _triton(x: Tensor, *rest: Any) -> Tensor:
    from ..kernels import depthwise_conv as kernels

    return kernels.depthwise_conv(native.channels_last(x), *rest)


def _triton_rates(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    activation: str,
) -> list[Tensor]:
    from ..kernels import depthwise_conv as kernels

    rates = list(zip(weights, scales, shifts, dilations, strict=True))
    return kernels.depthwise_conv_rates(native.channels_last(x), rates, 1, activation)


def _triton_statistics(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import depthwise_conv as kernels

    return kernels.depthwise_conv_statistics(native.channels_last(x), *rest)


# No GPU has timed Triton or the CUDA kernel behind "native" yet, which has no backward; the latter runs in an emulator
# (tests/test_cuda_emulator_depthwise.py).
# AMD EPYC (AVX-512), 2 threads, torch 2.13, convolution + affine + ReLU of 2048 x 32 x 64 at dilation 1 / 12 / 18:
# native 1.9 / 1.4 / 1.3 ms in fp32 and .91 / .82 / .78 in bf16, eager 3.0 / 26 / 27 and 3.8 / 54 / 114 times as long.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton, _triton_why_not, measured=()),
    "reference": dispatch.Backend(depthwise_conv_reference, dispatch.always, measured=("cpu", "cuda")),
}
# Three rates of that are three calls of it: a kernel that read x once was 1.01 (fp32) and .75 (bf16) times as fast.
RATES_BACKENDS = {
    "native": dispatch.Backend(_native_rates, _native_rates_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton_rates, _triton_rates_why_not, measured=()),
    "reference": dispatch.Backend(depthwise_conv_rates_reference, dispatch.always, measured=("cpu", "cuda")),
}
STATISTICS_BACKENDS = {
    "native": dispatch.Backend(_native_statistics, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton_statistics, _triton_why_not, measured=()),
    "reference": dispatch.Backend(depthwise_conv_statistics_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(x: Tensor, weight: Tensor, scale: Any, shift: Any, stride: int, *_: object) -> Tensor:
    return _empty(x, stride)


def _rates_fake(x: Tensor, weights: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [_empty(x) for _ in weights]


def _statistics_fake(x: Tensor, weight: Tensor, stride: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return _empty(x, stride), mean, variance


def _example_tensors(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(size, device=device) for size in ((1, 2, 3, 3), (2, 1, 3, 3), (2,)))


def _example(device: torch.device) -> tuple[Any, ...]:
    x, weight, vector = _example_tensors(device)
    return x, weight, vector, vector, 1, 1, "relu"


def _rates_example(device: torch.device) -> tuple[Any, ...]:
    x, weight, vector = _example_tensors(device)
    return x, [weight] * 2, [vector] * 2, [vector] * 2, [1, 2], "relu"


def _statistics_example(device: torch.device) -> tuple[Any, ...]:
    x, weight, _ = _example_tensors(device)
    return x, weight, 1, 1


def _conv_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor | None]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    if not need_x and not need_weight:
        return [None, None]
    backward = torch.ops.deeplab_fast.depthwise_conv_backward.default
    grads = backward(grad, x, weight, ctx.stride, ctx.dilation, need_x, need_weight, ctx.backend)
    return [g if needed else None for g, needed in zip(grads, (need_x, need_weight), strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, ctx.stride, ctx.dilation, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(x, weight, scale, None if ctx.activation == "none" else output)
    ctx.has_shift = shift is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, y = ctx.saved_tensors
    if ctx.activation != "none":
        passes = (y > 0) & (y < 6) if ctx.activation == "relu6" else y > 0
        grad = torch.where(passes, grad, 0)
    grad_scale = grad_shift = None
    if ctx.needs_input_grad[2]:
        raw = torch.ops.deeplab_fast.depthwise_conv.default(
            x, weight, None, None, ctx.stride, ctx.dilation, "none", ctx.backend
        )
        grad_scale = (grad.to(scale.dtype) * raw).sum((0, 2, 3))
    if ctx.needs_input_grad[3]:
        grad_shift = grad.sum((0, 2, 3), dtype=compute_dtype(x.dtype))
    if scale is not None:
        grad = (grad * scale[:, None, None]).to(x.dtype)
    return *_conv_gradients(ctx, grad, x, weight), grad_scale, grad_shift, None, None, None, None


def _statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.stride, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(*output[1:])


def _statistics_backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    return *_conv_gradients(ctx, grad, *ctx.saved_tensors), None, None, None


dispatch.register(
    "depthwise_conv",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int stride, int dilation, str activation, str backend)"
    " -> Tensor",
    BACKENDS,
    _fake,
    _example,
)
dispatch.register_autograd("depthwise_conv", _backward, _setup)

dispatch.register(
    "depthwise_conv_rates",
    "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] shifts, int[] dilations, str activation, str backend)"
    " -> Tensor[]",
    RATES_BACKENDS,
    _rates_fake,
    _rates_example,
)
dispatch.forbid_gradient("depthwise_conv_rates", "has no gradient: it is for inference")

dispatch.register(
    "depthwise_conv_statistics",
    "(Tensor x, Tensor weight, int stride, int dilation, str backend) -> (Tensor, Tensor, Tensor)",
    STATISTICS_BACKENDS,
    _statistics_fake,
    _statistics_example,
)
dispatch.register_autograd("depthwise_conv_statistics", _statistics_backward, _statistics_setup)

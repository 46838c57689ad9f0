"""Depthwise 3x3 convolution, affine and activation, then pointwise convolution, affine and activation.

    y = act(scale * (P @ act_dw(depthwise_scale * dwconv(x) + depthwise_shift)) + shift)

The scales and shifts are folded batch norms; the zero padding is the dilation. Eager writes and reads the depthwise
result three times (convolution, norm, activation); here a tile of it is multiplied out of the cache and never written.
On a GPU the depthwise pass runs again for every 256 output channels. Beyond 768, x is read more often than the two
kernels (depthwise_conv, then torch's product) read x and write and read the depthwise result; and few pixels, such as
33 x 33 of one image, leave most of a large chip idle. There the two kernels should win.
Forward only: the training form is built from depthwise_conv and batch_norm_act.
separable_conv_concat is ASPP's concatenation: each branch is written straight into its channels of the result.
Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", section 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native
from .precision import autocast, compute_dtype

MOST_PIXELS = 2**31 - 2**8  # of a result on a GPU: the kernel numbers them in 32 bits, in tiles of up to 128
TRAINING = "has no gradient: the training form is built from depthwise_conv and batch_norm_act"


def separable_conv_reference(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None = None,
    depthwise_shift: Tensor | None = None,
    depthwise_activation: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    dilation: int = 1,
    stride: int = 1,
) -> Tensor:
    """The specification, in plain PyTorch. The depthwise result stays in fp32 (fp64 for fp64)."""
    dtype = compute_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x.to(dtype), depthwise_weight.to(dtype), None, stride, dilation, dilation, x.shape[1])
        y = _affine_act(y, depthwise_scale, depthwise_shift, depthwise_activation)
        y = F.conv2d(y, pointwise_weight.to(dtype)[:, :, None, None])
        y = _affine_act(y, scale, shift, activation)
    # `contiguous` would leave the strides of one channel or one pixel as they are.
    return torch.empty_like(y, dtype=x.dtype, memory_format=torch.channels_last).copy_(y)


def separable_conv_concat_reference(
    x: Tensor,
    first: Tensor,
    last: Tensor | None,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    depthwise_scales: Sequence[Tensor],
    depthwise_shifts: Sequence[Tensor],
    depthwise_activation: str,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    activation: str,
    dilations: Sequence[int],
) -> Tensor:
    """The specification, in plain PyTorch."""
    branches = _branches(
        *(depthwise_weights, pointwise_weights, depthwise_scales, depthwise_shifts, depthwise_activation),
        *(scales, shifts, activation, dilations),
    )
    parts = [first, *(separable_conv_reference(x, *branch) for branch in branches)]
    if last is not None:
        parts.append(last.expand(-1, -1, *x.shape[2:]))
    y = torch.cat(parts, dim=1)
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def _branches(
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    depthwise_scales: Sequence[Tensor],
    depthwise_shifts: Sequence[Tensor],
    depthwise_activation: str,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    activation: str,
    dilations: Sequence[int],
) -> Iterator[tuple[Any, ...]]:
    """For each dilation what separable_conv takes after x, at stride 1."""
    for i, dilation in enumerate(dilations):
        norm = (depthwise_scales[i], depthwise_shifts[i]) if depthwise_scales else (None, None)
        weights = depthwise_weights[i], pointwise_weights[i]
        yield (*weights, *norm, depthwise_activation, scales[i], shifts[i], activation, dilation, 1)


def _affine_act(y: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    if scale is not None:
        y = y * scale.to(y.dtype)[:, None, None]
    if shift is not None:
        y = y + shift.to(y.dtype)[:, None, None]
    return {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[activation](y)


def separable_conv(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    depthwise_scale: Tensor | None = None,
    depthwise_shift: Tensor | None = None,
    depthwise_activation: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    dilation: int = 1,
    stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """A separable convolution with its norms folded in, for inference.

    x: (N, C, H, W), any strides
    depthwise_weight: (C, 1, 3, 3); pointwise_weight: (M, C, 1, 1) or (M, C); both of x's dtype
    depthwise_scale, depthwise_shift: (C,) fp32, or fp64 for fp64; scale, shift: (M,) likewise; None: 1 and 0
    depthwise_activation, activation: none, relu or relu6
    Returns (N, M, (H - 1) // stride + 1, (W - 1) // stride + 1) of x's dtype, channels-last.
    The kernels sum in fp32 and round the depthwise result to x's dtype before the product, as two
    convolutions do. Under autocast x and the weights are cast, scales and shifts are not.
    Raises ValueError on shapes, dtypes and devices, RuntimeError where an input asks for a gradient, UserError where
    a named backend cannot run.
    """
    x, depthwise_weight, pointwise_weight = autocast(x, depthwise_weight, pointwise_weight)
    norms = (depthwise_scale, depthwise_shift, depthwise_activation, scale, shift, activation)
    _check(x, depthwise_weight, pointwise_weight, *norms, dilation, stride)
    weights = (depthwise_weight, pointwise_weight.flatten(1))
    return dispatch.run("separable_conv", x, *weights, *norms, dilation, stride, backend=backend)


def separable_conv_concat(
    x: Tensor,
    first: Tensor,
    last: Tensor | None,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    dilations: Sequence[int],
    depthwise_scales: Sequence[Tensor] = (),
    depthwise_shifts: Sequence[Tensor] = (),
    depthwise_activation: str = "none",
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """torch.cat((first, a separable_conv of x at stride 1 for each of `dilations`, last)), for inference.

    x: (N, C, H, W); first: (N, M', H, W); last: (N, M", 1, 1), the same at every pixel, or None; all of one dtype
    The lists hold for each dilation what `separable_conv` takes; depthwise_scales and depthwise_shifts may be empty.
    Returns (N, M' + sum of M + M", H, W) of x's dtype, channels-last. Under autocast x, first, last and the weights are
    cast. Raises as `separable_conv`.
    """
    x, first, *depthwise_weights = autocast(x, first, *depthwise_weights)
    last = None if last is None else autocast(last)[0]
    pointwise_weights = autocast(*pointwise_weights)
    lists = {"depthwise_weights": depthwise_weights, "pointwise_weights": pointwise_weights}
    lists |= {"scales": scales, "shifts": shifts}
    if depthwise_scales or depthwise_shifts:
        lists |= {"depthwise_scales": depthwise_scales, "depthwise_shifts": depthwise_shifts}
    for name, values in lists.items():
        if len(values) != len(dilations) or not dilations:
            raise ValueError(f"{name} are {len(values)} and dilations {len(dilations)}; expected as many, at least one")
    norms = (list(depthwise_scales), list(depthwise_shifts), depthwise_activation)
    norms = (*norms, list(scales), list(shifts), activation)
    for branch in _branches(depthwise_weights, pointwise_weights, *norms, dilations):
        _check(x, *branch)
    for name, part, size in (("first", first, x.shape[2:]), ("last", last, (1, 1))):
        if part is None:
            continue
        if part.dim() != 4 or part.shape[0] != x.shape[0] or part.shape[2:] != size:
            raise ValueError(f"{name} is {tuple(part.shape)}; expected {(x.shape[0], 'M', *size)}")
        if part.dtype != x.dtype or part.device != x.device:
            raise ValueError(f"{name} is {part.dtype} on {part.device} and x {x.dtype} on {x.device}")
        if torch.is_grad_enabled() and part.requires_grad:
            raise RuntimeError(f"separable_conv_concat {TRAINING}; call it under torch.no_grad()")
    weights = (list(depthwise_weights), [weight.flatten(1) for weight in pointwise_weights])
    return dispatch.run("separable_conv_concat", x, first, last, *weights, *norms, list(dilations), backend=backend)


def _check(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_shift: Tensor | None,
    depthwise_activation: str,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dilation: int,
    stride: int,
) -> None:
    _check_tensors(x, depthwise_weight, pointwise_weight)
    for name, value in (("dilation", dilation), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    channels, out_channels = x.shape[1], pointwise_weight.shape[0]
    vectors = {"depthwise_scale": depthwise_scale, "depthwise_shift": depthwise_shift, "scale": scale, "shift": shift}
    for name, vector in vectors.items():
        if vector is not None:
            _check_vector(name, vector, channels if name.startswith("depthwise") else out_channels, x)
    for name, value in (("depthwise_activation", depthwise_activation), ("activation", activation)):
        if value not in native.ACTIVATIONS:
            raise ValueError(f"{name} is {value!r}; expected {', '.join(native.ACTIVATIONS)}")
    tensors = (x, depthwise_weight, pointwise_weight, *vectors.values())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"separable_conv {TRAINING}; call it under torch.no_grad()")


def _check_tensors(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x is {tuple(x.shape)}; expected (N, C, H, W) with C, H and W of at least 1")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating-point type")
    channels = x.shape[1]
    if depthwise_weight.shape != (channels, 1, 3, 3):
        shape = tuple(depthwise_weight.shape)
        raise ValueError(f"depthwise_weight is {shape}; expected {(channels, 1, 3, 3)} for x {tuple(x.shape)}")
    shape = tuple(pointwise_weight.shape)
    if shape[:1] == (0,) or shape[1:] not in ((channels,), (channels, 1, 1)):
        expected = f"(M, {channels}, 1, 1) or (M, {channels})"
        raise ValueError(f"pointwise_weight is {shape}; expected {expected} for x {tuple(x.shape)}")
    for name, weight in (("depthwise_weight", depthwise_weight), ("pointwise_weight", pointwise_weight)):
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(f"{name} is {weight.dtype} on {weight.device} and x {x.dtype} on {x.device}")


def _check_vector(name: str, vector: Tensor, size: int, x: Tensor) -> None:
    if vector.shape != (size,):
        raise ValueError(f"{name} is {tuple(vector.shape)}; expected {(size,)}")
    if vector.dtype not in (torch.float32, torch.float64) or (
        vector.dtype != torch.float32 and vector.dtype != x.dtype
    ):
        raise ValueError(f"{name} is {vector.dtype}; expected torch.float32")
    if vector.device != x.device:
        raise ValueError(f"{name} is on {vector.device} and x on {x.device}")


@functools.cache
def _has_amx() -> bool:
    return torch.cpu.get_capabilities().get("amx_bf16", False)


def _native_why_not(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *_: object) -> str | None:
    if reason := native.cpu_why_not(x, depthwise_weight, pointwise_weight):
        return reason
    if x.dtype == torch.bfloat16 and _has_amx():
        return "this CPU has AMX, which multiplies bf16 faster: take depthwise_conv and torch's product"
    return None


def _native_into(
    y: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_shift: Tensor | None,
    depthwise_activation: str,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dilation: int,
    stride: int,
) -> None:
    """y: channels-last, or some channels of such a tensor; x: channels-last."""
    tensors = _contiguous(depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, scale, shift)
    weights, norm, out_norm = ([0 if t is None else t.data_ptr() for t in tensors[i : i + 2]] for i in (0, 2, 4))
    native.kernels().separable_conv_cpu(
        *(native.FLOAT_DTYPES.index(x.dtype), x.data_ptr(), *weights),
        *(*norm, native.ACTIVATIONS.index(depthwise_activation)),
        *(*out_norm, native.ACTIVATIONS.index(activation)),
        *(y.data_ptr(), y.stride(3), tuple(x.shape), tuple(y.shape[1:]), stride, dilation, torch.get_num_threads()),
    )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _triton_why_not(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *rest: object) -> str | None:
    if reason := gpu.triton_why_not(x, depthwise_weight, pointwise_weight):
        return reason
    if x.shape[0] * _height(x, rest[-1]) * _width(x, rest[-1]) > MOST_PIXELS:
        return f"the result of x {tuple(x.shape)} has more than {MOST_PIXELS} pixels"
    return None


def _triton_into(
    y: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_shift: Tensor | None,
    depthwise_activation: str,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dilation: int,
    stride: int,
) -> None:
    from ..kernels import separable_conv as kernels

    weights = _contiguous(depthwise_weight, pointwise_weight)
    depthwise_scale, depthwise_shift, scale, shift = _contiguous(depthwise_scale, depthwise_shift, scale, shift)
    norms = (depthwise_scale, depthwise_shift, depthwise_activation, scale, shift, activation)
    kernels.separable_conv(x, *weights, *norms, dilation, stride, y)


Into = Callable[..., None]


def _alone(into: Into, x: Tensor, *branch: Any) -> Tensor:
    x = native.channels_last(x)
    y = _output(x, branch[1], branch[-1])
    into(y, x, *branch)
    return y


def _concat(into: Into, x: Tensor, first: Tensor, last: Tensor | None, *rest: Any) -> Tensor:
    x = native.channels_last(x)
    y = _concat_output(x, first, last, rest[1])
    end = first.shape[1]
    y[:, :end] = first
    for branch in _branches(*rest):
        begin, end = end, end + branch[1].shape[0]
        into(y[:, begin:end], x, *branch)
    if last is not None:
        y[:, end:] = last
    return y


def _concat_why_not(why_not: Callable[..., str | None], x: Tensor, _: Tensor, __: object, *rest: Any) -> str | None:
    return next(filter(None, (why_not(x, *branch) for branch in _branches(*rest))), None)


# AMD EPYC (AVX-512), 2 threads, torch 2.13, bf16, 2048 -> 256 at 32 x 64, dilation 12: native 5.7 ms, the product alone
# 5.0, eager 42, torch.compile 49; fp32: 12.8, 10.2, 45, 42. 304 -> 256 at 128 x 256, bf16: 13.9, 12.9, 22, 20.
# triton was not timed on a GPU yet.
BACKENDS = {
    "native": dispatch.Backend(functools.partial(_alone, _native_into), _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(functools.partial(_alone, _triton_into), _triton_why_not, measured=()),
    "reference": dispatch.Backend(separable_conv_reference, dispatch.always, measured=("cpu", "cuda")),
}
# All of ASPP's branches at 32 x 64, same CPU: 0.99 to 1.1 times as fast as torch.cat of them, the products being what
# takes the time (benchmarks/results/amd_epyc_threshold_and_concat.md).
CONCAT_BACKENDS = {
    "native": dispatch.Backend(
        functools.partial(_concat, _native_into),
        functools.partial(_concat_why_not, _native_why_not),
        measured=("cpu",),
    ),
    "triton": dispatch.Backend(
        functools.partial(_concat, _triton_into), functools.partial(_concat_why_not, _triton_why_not), measured=()
    ),
    "reference": dispatch.Backend(separable_conv_concat_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _height(x: Tensor, stride: int) -> int:
    return (x.shape[2] - 1) // stride + 1


def _width(x: Tensor, stride: int) -> int:
    return (x.shape[3] - 1) // stride + 1


def _output(x: Tensor, pointwise_weight: Tensor, stride: int) -> Tensor:
    size = (x.shape[0], pointwise_weight.shape[0], _height(x, stride), _width(x, stride))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _concat_output(x: Tensor, first: Tensor, last: Tensor | None, pointwise_weights: Sequence[Tensor]) -> Tensor:
    sizes = [first.shape[1], *(weight.shape[0] for weight in pointwise_weights), 0 if last is None else last.shape[1]]
    size = (x.shape[0], sum(sizes), *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _concat_fake(x: Tensor, first: Tensor, last: Tensor | None, *rest: Any) -> Tensor:
    return _concat_output(x, first, last, rest[1])


def _fake(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *rest: object) -> Tensor:
    return _output(x, pointwise_weight, rest[-2])


def _example(device: torch.device) -> tuple[object, ...]:
    x = torch.zeros((1, 2, 3, 3), device=device)
    norms = (None, None, "none", None, None, "relu")
    return x, torch.zeros((2, 1, 3, 3), device=device), torch.zeros((4, 2), device=device), *norms, 1, 1


def _concat_example(device: torch.device) -> tuple[Any, ...]:
    x, depthwise, pointwise, *_ = _example(device)
    vectors = [torch.ones(4, device=device)]
    return x, x, x[:, :, :1, :1], [depthwise], [pointwise], [], [], "none", vectors, vectors, "relu", [1]


dispatch.register(
    "separable_conv",
    "(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_scale, Tensor? depthwise_shift, "
    "str depthwise_activation, Tensor? scale, Tensor? shift, str activation, int dilation, int stride, str backend) "
    "-> Tensor",
    BACKENDS,
    _fake,
    _example,
)
dispatch.forbid_gradient("separable_conv", TRAINING)
dispatch.register(
    "separable_conv_concat",
    "(Tensor x, Tensor first, Tensor? last, Tensor[] depthwise_weights, Tensor[] pointwise_weights, "
    "Tensor[] depthwise_scales, Tensor[] depthwise_shifts, str depthwise_activation, Tensor[] scales, Tensor[] shifts, "
    "str activation, int[] dilations, str backend) -> Tensor",
    CONCAT_BACKENDS,
    _concat_fake,
    _concat_example,
)
dispatch.forbid_gradient("separable_conv_concat", TRAINING)

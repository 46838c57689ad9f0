"""Batch norm, residual addition and activation in one pass; its statistics and its frozen form.

    y = act((x - mean) * rsqrt(var + eps) * weight + bias + residual)

The gradient is in batch_norm_act_backward. Eager keeps x and the activation's output, and reads and writes a tensor for
each of norm, addition and activation, both ways. Here only x is kept, and y where there are a residual and an
activation: else the mask is computed again from x. Between statistics and application, and between the two halves of
the gradient, lies one message of a few numbers a channel for synchronised batch norm. A module updates its buffers by
`running_var += momentum * (var * n / (n - 1) - running_var)` with n = N H W, and by mean likewise.
Source: Ioffe, Szegedy, "Batch Normalization", algorithm 1; Chan, Golub, LeVeque, 1979, for the statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, gpu, native
from .batch_norm_common import CHANNELS, example_tensors, launch_native, like, like_channels, packed, row, table, wide
from .precision import autocast, compute_dtype


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    return torch.relu(x) if activation == "relu" else torch.nn.functional.relu6(x)


def batch_norm_act_statistics_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    x = wide(x)
    mean = x.mean((0, 2, 3))
    return mean, (x - row(mean)).square().mean((0, 2, 3))


def batch_norm_act_merge_reference(partials: Tensor) -> tuple[Tensor, Tensor]:
    count, mean, squares = partials.unbind(1)
    total = count.sum(0)
    whole = (count * mean).sum(0) / total
    return whole, (squares + count * (mean - whole).square()).sum(0) / total


def batch_norm_act_reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Takes the given mean and var; where x needs a gradient, they are differentiated as what they are of x."""
    z = wide(x)  # once: the parts of its gradient cancel, and must not be rounded before they are added
    if not x.numel():  # has statistics of NaN, which the gradients of weight and bias, both 0, must not meet
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    elif x.requires_grad and torch.is_grad_enabled():
        own_mean, own_var = batch_norm_act_statistics_reference(z)
        mean = mean.detach() + (own_mean - own_mean.detach())  # the given value with the gradient of x's own
        var = var.detach() + (own_var - own_var.detach())
    z = (z - row(mean)) * row(torch.rsqrt(var + eps) * weight) + row(bias)
    y = _activate(z if residual is None else z + residual, activation)
    return torch.empty_like(y, dtype=x.dtype, memory_format=torch.channels_last).copy_(y)


def batch_norm_act_inference_reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    z = wide(x) * row(scale) + row(shift)
    y = _activate(z if residual is None else z + residual, activation)
    return torch.empty_like(y, dtype=x.dtype, memory_format=torch.channels_last).copy_(y)


def batch_norm_statistics(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """mean and biased variance (C,) of x (N, C, H, W) over N, H and W; fp32, and fp64 for fp64.

    Not differentiable by itself: `batch_norm_act` counts what x does to them in its own gradient. NaN where x is empty.
    """
    _check_image(x)
    return dispatch.run("batch_norm_act_statistics", x.detach(), backend=backend)


def batch_norm_merge(partials: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """mean and biased variance (C,) of disjoint groups of pixels, from (groups, 3, C): count, mean, count * variance.

    fp32 or fp64, as the result; a group of none is zeros. NaN where all are of none.
    """
    if partials.dim() != 3 or partials.shape[1] != 3 or partials.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"partials is {partials.dtype} {tuple(partials.shape)}; expected fp32 or fp64 (groups, 3, C)")
    return dispatch.run("batch_norm_act_merge", partials.detach(), backend=backend)


def batch_norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """act((x - mean) * rsqrt(var + eps) * weight + bias + residual), (N, C, H, W) in x's dtype, channels-last.

    x, residual: (N, C, H, W) of one floating dtype, any strides; residual may be None
    mean, var: (C,) fp32 (fp64 for fp64), the statistics of x over N, H, W: grad_x is that of training-mode batch norm,
        and they themselves get no gradient
    weight, bias: (C,) as mean; activation: "none", "relu" or "relu6"
    Raises ValueError on shapes, dtypes, devices and activations, UserError where a named backend cannot run.
    """
    x, *rest = autocast(x, *([] if residual is None else [residual]))
    residual = rest[0] if rest else None
    _check(x, residual, activation, mean=mean, var=var, weight=weight, bias=bias)
    inputs = (x, mean.detach(), var.detach(), weight, bias, residual, eps, activation)
    return dispatch.run("batch_norm_act", *inputs, backend=backend)


def batch_norm_act_inference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """act(x * scale + shift + residual), for running statistics; shapes and dtypes as in `batch_norm_act`.

    scale = weight * rsqrt(running_var + eps), shift = bias - running_mean * scale. x and residual get their gradients
    natively; where scale or shift asks for one, the reference runs.
    """
    x, *rest = autocast(x, *([] if residual is None else [residual]))
    residual = rest[0] if rest else None
    _check(x, residual, activation, scale=scale, shift=shift)
    return dispatch.run("batch_norm_act_inference", x, scale, shift, residual, activation, backend=backend)


def _check_image(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected a floating (N, C, H, W)")


def _check(x: Tensor, residual: Tensor | None, activation: str, **channels: Tensor) -> None:
    _check_image(x)
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(native.ACTIVATIONS)}")
    wanted = compute_dtype(x.dtype)
    for name, values in channels.items():
        if values.shape != (x.shape[1],) or values.dtype != wanted:
            raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)}; expected {wanted} ({x.shape[1]},)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        given = f"{residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"residual is {given}; expected as x, {x.dtype} {tuple(x.shape)}")
    for name, values in (channels | {"residual": x if residual is None else residual}).items():
        if values.device != x.device:
            raise ValueError(f"{name} is on {values.device} and x on {x.device}")


def _statistics_why_not(x: Tensor) -> str | None:
    return native.cpu_why_not(x)


def _statistics_triton_why_not(x: Tensor) -> str | None:
    return gpu.triton_why_not(x)


def _merge_triton_why_not(partials: Tensor) -> str | None:
    if partials.dtype != torch.float32:
        return f"the Triton kernel takes float32, and got {str(partials.dtype).removeprefix('torch.')}"
    return gpu.triton_why_not(partials)


def _native_why_not(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *_: object
) -> str | None:
    return native.cpu_why_not(x, residual)


def _triton_why_not(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *_: object
) -> str | None:
    return gpu.triton_why_not(x, residual)


def _scale_why_not(scale: Tensor, shift: Tensor) -> str | None:
    if torch.is_grad_enabled() and (scale.requires_grad or shift.requires_grad):
        return "scale or shift asks for a gradient, which only the reference has"
    return None


def _inference_why_not(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, *_: object) -> str | None:
    return _scale_why_not(scale, shift) or native.cpu_why_not(x, residual)


def _inference_triton_why_not(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, *_: object
) -> str | None:
    return _scale_why_not(scale, shift) or gpu.triton_why_not(x, residual)


def _native_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    launch_native("statistics", x, x=x, first=mean, second=var)
    return mean, var


def _native(x: Tensor, *rest: Any) -> Tensor:
    mean, var, weight, bias, residual, eps, activation = rest
    result = like(x)
    given = {"mean": mean, "var": var, "weight": weight, "bias": bias, "residual": residual}
    launch_native("forward", x, eps, activation, x=x, result=result, **given)
    return result


def _native_inference(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return _native(x, None, None, scale, shift, residual, 0.0, activation)


def _triton_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels import batch_norm_act as kernels

    return kernels.statistics(native.channels_last(x))


def _triton_merge(partials: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels import batch_norm_act as kernels

    return kernels.merge_statistics(partials.contiguous())


def _triton(x: Tensor, *rest: Any) -> Tensor:
    from ..kernels import batch_norm_act as kernels

    *tensors, eps, activation = rest
    return kernels.forward(native.channels_last(x), *map(packed, tensors), eps, activation)


def _triton_inference(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return _triton(x, None, None, scale, shift, residual, 0.0, activation)


BACKENDS = table((_native, _native_why_not), (_triton, _triton_why_not), batch_norm_act_reference)
STATISTICS_BACKENDS = table(
    (_native_statistics, _statistics_why_not),
    (_triton_statistics, _statistics_triton_why_not),
    batch_norm_act_statistics_reference,
)
# A few numbers a channel: on a CPU torch's own steps are as good.
MERGE_BACKENDS = {
    "triton": dispatch.Backend(_triton_merge, _merge_triton_why_not, measured=()),
    "reference": dispatch.Backend(batch_norm_act_merge_reference, dispatch.always, measured=("cpu", "cuda")),
}
INFERENCE_BACKENDS = table(
    (_native_inference, _inference_why_not),
    (_triton_inference, _inference_triton_why_not),
    batch_norm_act_inference_reference,
)


def _example(device: torch.device) -> tuple[Any, ...]:
    x, c = example_tensors(device)
    return x, c, c, c, c, None, 1e-5, "relu"


def _example_merge(device: torch.device) -> tuple[Any, ...]:
    return (torch.ones(2, 3, 3, device=device),)


def _example_inference(device: torch.device) -> tuple[Any, ...]:
    x, c = example_tensors(device)
    return x, c, c, None, "relu"


dispatch.register(
    "batch_norm_act_statistics",
    "(Tensor x, str backend) -> (Tensor, Tensor)",
    STATISTICS_BACKENDS,
    lambda x, backend: like_channels(x),
    lambda device: example_tensors(device)[:1],
)
dispatch.register(
    "batch_norm_act_merge",
    "(Tensor partials, str backend) -> (Tensor, Tensor)",
    MERGE_BACKENDS,
    lambda partials, backend: (partials.new_empty(partials.shape[2]), partials.new_empty(partials.shape[2])),
    _example_merge,
)
dispatch.register(
    "batch_norm_act",
    f"(Tensor x, {CHANNELS}, Tensor? residual, float eps, str activation, str backend) -> Tensor",
    BACKENDS,
    lambda x, *_: like(x),
    _example,
)
dispatch.register(
    "batch_norm_act_inference",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation, str backend) -> Tensor",
    INFERENCE_BACKENDS,
    lambda x, *_: like(x),
    _example_inference,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, ctx.eps, ctx.activation, ctx.backend = inputs
    keeps_y = residual is not None and ctx.activation != "none"
    ctx.save_for_backward(x, output if keeps_y else None, mean, var, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *channels = ctx.saved_tensors
    ops = torch.ops.deeplab_fast
    sums = ops.batch_norm_act_backward_reduce(grad, x, y, *channels, ctx.eps, ctx.activation, ctx.backend)
    needs_x, *_, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:6]
    found: list[Tensor | None] = [None, grad if needs_residual else None]
    if needs_x or (needs_residual and y is not None):
        masks = needs_residual and y is not None
        count = x.numel() // x.shape[1]
        rest = (count, ctx.eps, ctx.activation, masks, ctx.backend)
        given = ops.batch_norm_act_backward(grad, x, y, *channels, *sums, *rest)
        found = [given[0], given[1] if masks else found[1]]
    grad_x, grad_residual = found
    return (
        grad_x,
        None,
        None,
        sums[1] if needs_weight else None,
        sums[0] if needs_bias else None,
        grad_residual,
        *[None] * 3,
    )


def _setup_inference(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, scale, _, _, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(scale, None if ctx.activation == "none" else output)


def _backward_inference(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scale, y = ctx.saved_tensors
    _, needs_scale, needs_shift, needs_residual, *_ = ctx.needs_input_grad
    if needs_scale or needs_shift:
        raise RuntimeError("deeplab_fast.batch_norm_act_inference has no gradient of scale and shift in a graph")
    masks = needs_residual and y is not None
    backward = torch.ops.deeplab_fast.batch_norm_act_backward_inference
    grad_x, *rest = backward(grad, y, scale, ctx.activation, masks, ctx.backend)
    return grad_x, None, None, rest[0] if masks else grad if needs_residual else None, None, None


dispatch.register_autograd("batch_norm_act", _backward, _setup)
dispatch.register_autograd("batch_norm_act_inference", _backward_inference, _setup_inference)
dispatch.forbid_gradient("batch_norm_act_merge", "has no gradient: batch_norm_act counts it in its own")
dispatch.forbid_gradient("batch_norm_act_statistics", "has no gradient: batch_norm_act counts it in its own")

"""Batch norm, residual addition and activation in one pass; its statistics, its gradient and its frozen form.

    y = act((x - mean) * rsqrt(var + eps) * weight + bias + residual)
    g = grad_y where act let y pass;  sum_grad = sum g;  sum_grad_xhat = sum g * (x - mean) * rsqrt(var + eps)
    grad_x = weight * rsqrt(var + eps) * (g - sum_grad / n - xhat * sum_grad_xhat / n)

Eager keeps x and the activation's output, and reads and writes a tensor for each of norm, addition and activation,
both ways. Here only x is kept, and y where there are a residual and an activation: else the mask is computed again
from x. Between statistics and application, and between the two halves of the gradient, lies one message of 2 C
numbers for synchronised batch norm. A module updates its buffers by
`running_var += momentum * (var * n / (n - 1) - running_var)` with n = N H W, and by mean likewise.
Source: Ioffe, Szegedy, "Batch Normalization", algorithm 1; Chan, Golub, LeVeque, 1979, for the statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, native
from .precision import autocast, compute_dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _row(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    return torch.relu(x) if activation == "relu" else torch.nn.functional.relu6(x)


def batch_norm_act_statistics_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _wide(x)
    mean = x.mean((0, 2, 3))
    return mean, (x - _row(mean)).square().mean((0, 2, 3))


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
    wide = _wide(x)  # once: the parts of its gradient cancel, and must not be rounded before they are added
    if x.requires_grad and torch.is_grad_enabled():
        own_mean, own_var = batch_norm_act_statistics_reference(wide)
        mean = mean.detach() + (own_mean - own_mean.detach())  # the given value with the gradient of x's own
        var = var.detach() + (own_var - own_var.detach())
    z = (wide - _row(mean)) * _row(torch.rsqrt(var + eps) * weight) + _row(bias)
    y = _activate(z if residual is None else z + residual, activation)
    return torch.empty_like(y, dtype=x.dtype, memory_format=torch.channels_last).copy_(y)


def batch_norm_act_inference_reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    z = _wide(x) * _row(scale) + _row(shift)
    y = _activate(z if residual is None else z + residual, activation)
    return torch.empty_like(y, dtype=x.dtype, memory_format=torch.channels_last).copy_(y)


def _masked(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return _wide(grad)
    passed = (y > 0) & (y < 6) if activation == "relu6" else y > 0
    return torch.where(passed, _wide(grad), 0)


def _masked_and_xhat(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    xhat = (_wide(x) - _row(mean)) * _row(torch.rsqrt(var + eps))
    return _masked(grad, xhat * _row(weight) + _row(bias) if y is None else y, activation), xhat


def batch_norm_act_backward_reduce_reference(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    g, xhat = _masked_and_xhat(grad, x, y, mean, var, weight, bias, eps, activation)
    return g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))


def batch_norm_act_backward_apply_reference(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
    count: int,
    eps: float,
    activation: str,
    residual: bool,
) -> list[Tensor]:
    g, xhat = _masked_and_xhat(grad, x, y, mean, var, weight, bias, eps, activation)
    mean_grad = (_row(sum_grad) + xhat * _row(sum_grad_xhat)) / max(count, 1)
    grad_x = _row(weight * torch.rsqrt(var + eps)) * (g - mean_grad)
    found = [grad_x, g] if residual else [grad_x]
    return [_like(x).copy_(value) for value in found]


def batch_norm_act_inference_backward_reference(
    grad: Tensor, y: Tensor | None, scale: Tensor, activation: str, residual: bool
) -> list[Tensor]:
    g = _wide(grad) if y is None else _masked(grad, y, activation)
    return [_like(grad).copy_(value) for value in ([g * _row(scale), g] if residual else [g * _row(scale)])]


def batch_norm_statistics(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """mean and biased variance (C,) of x (N, C, H, W) over N, H and W; fp32, and fp64 for fp64.

    Not differentiable by itself: `batch_norm_act` counts what x does to them in its own gradient. NaN where x is empty.
    """
    _check_image(x)
    return dispatch.run("batch_norm_act_statistics", x.detach(), backend=backend)


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


def _native_why_not(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *_: object
) -> str | None:
    return native.cpu_why_not(x, residual)


def _inference_why_not(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, *_: object) -> str | None:
    if torch.is_grad_enabled() and (scale.requires_grad or shift.requires_grad):
        return "scale or shift asks for a gradient, which only the reference has"
    return native.cpu_why_not(x, residual)


def _backward_why_not(grad: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(grad)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch(
    kernel: str, like: Tensor, eps: float = 0.0, activation: str = "none", count: int = 0, **tensors: Tensor | None
) -> None:
    """csrc/bind/batch_norm_act.cpp; what is not named is null."""
    n, c, h, w = like.shape
    # Held until the kernel has returned: some are copies.
    held = {k: v if v is None or v.dim() == 4 else v.contiguous() for k, v in tensors.items()}
    at = lambda *names: [0 if held.get(k) is None else held[k].data_ptr() for k in names]  # noqa: E731
    getattr(native.kernels(), f"batch_norm_act_{kernel}_cpu")(
        *(native.FLOAT_DTYPES.index(like.dtype), native.ACTIVATIONS.index(activation), n * h * w, c),
        *at("x", "y", "grad", "residual", "mean", "var", "weight", "bias"),
        *(eps, *at("sum_grad", "sum_grad_xhat"), count),
        *(*at("result", "masked", "first", "second"), torch.get_num_threads()),
    )


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else native.channels_last(x)


def _native_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    _launch("statistics", x, x=_packed(x), first=mean, second=var)
    return mean, var


def _native(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    result = _like(x)
    given = {"mean": mean, "var": var, "weight": weight, "bias": bias, "residual": _packed(residual)}
    _launch("forward", x, eps, activation, x=_packed(x), result=result, **given)
    return result


def _native_reduce(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    first, second = torch.empty_like(mean), torch.empty_like(mean)
    given = {"mean": mean, "var": var, "weight": weight, "bias": bias, "x": _packed(x), "y": _packed(y)}
    _launch("reduce", x, eps, activation, grad=_packed(grad), first=first, second=second, **given)
    return first, second


def _native_apply(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
    count: int,
    eps: float,
    activation: str,
    residual: bool,
) -> list[Tensor]:
    found = [_like(x) for _ in range(1 + residual)]
    given = {"mean": mean, "var": var, "weight": weight, "bias": bias, "x": _packed(x), "y": _packed(y)}
    sums = {"sum_grad": sum_grad, "sum_grad_xhat": sum_grad_xhat}
    results = {"result": found[0], "masked": found[-1] if residual else None}
    _launch("apply", x, eps, activation, count, grad=_packed(grad), **given, **sums, **results)
    return found


def _native_inference(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    result = _like(x)
    given = {"weight": scale, "bias": shift, "residual": _packed(residual)}
    _launch("forward", x, 0.0, activation, x=_packed(x), result=result, **given)
    return result


def _native_inference_backward(
    grad: Tensor, y: Tensor | None, scale: Tensor, activation: str, residual: bool
) -> list[Tensor]:
    found = [_like(grad) for _ in range(1 + residual)]
    results = {"result": found[0], "masked": found[-1] if residual else None}
    _launch("apply", grad, 0.0, activation, grad=_packed(grad), y=_packed(y), weight=scale, **results)
    return found


# AMD EPYC (AVX-512), 2 threads, torch 2.13, forward and backward with ReLU, 8 x 256 x 64 x 64: native 11 ms in fp32 and
# 6.3 in bf16, eager 1.3 and 1.4 times as long, torch.compile 5.3 and 7.6 times.
def _table(run: Any, why_not: Any, reference: Any) -> dict[str, dispatch.Backend]:
    return {
        "native": dispatch.Backend(run, why_not, measured=("cpu",)),
        "reference": dispatch.Backend(reference, dispatch.always, measured=("cpu", "cuda")),
    }


BACKENDS = _table(_native, _native_why_not, batch_norm_act_reference)


def _like_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    wanted = compute_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=wanted), x.new_empty(x.shape[1], dtype=wanted)


def _example_tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(2, 3, 4, 5, device=device), torch.ones(3, device=device)


def _example(device: torch.device) -> tuple[Any, ...]:
    x, c = _example_tensors(device)
    return x, c, c, c, c, None, 1e-5, "relu"


def _example_reduce(device: torch.device) -> tuple[Any, ...]:
    x, c = _example_tensors(device)
    return x, x, None, c, c, c, c, 1e-5, "relu"


def _example_apply(device: torch.device) -> tuple[Any, ...]:
    x, c = _example_tensors(device)
    return x, x, None, c, c, c, c, c, c, 40, 1e-5, "relu", False


def _example_inference(device: torch.device) -> tuple[Any, ...]:
    x, c = _example_tensors(device)
    return x, c, c, None, "relu"


def _example_inference_backward(device: torch.device) -> tuple[Any, ...]:
    x, c = _example_tensors(device)
    return x, x, c, "relu", False


_CHANNELS = "Tensor mean, Tensor var, Tensor weight, Tensor bias"
dispatch.register(
    "batch_norm_act_statistics",
    "(Tensor x, str backend) -> (Tensor, Tensor)",
    _table(_native_statistics, _statistics_why_not, batch_norm_act_statistics_reference),
    lambda x, backend: _like_channels(x),
    lambda device: _example_tensors(device)[:1],
)
dispatch.register(
    "batch_norm_act",
    f"(Tensor x, {_CHANNELS}, Tensor? residual, float eps, str activation, str backend) -> Tensor",
    BACKENDS,
    lambda x, *_: _like(x),
    _example,
)
_backward_reduce = dispatch.register(
    "batch_norm_act_backward_reduce",
    f"(Tensor grad_y, Tensor x, Tensor? y, {_CHANNELS}, float eps, str activation, str backend) -> (Tensor, Tensor)",
    _table(_native_reduce, _backward_why_not, batch_norm_act_backward_reduce_reference),
    lambda grad_y, x, *_: _like_channels(x),
    _example_reduce,
)
_backward_apply = dispatch.register(
    "batch_norm_act_backward_apply",
    f"(Tensor grad_y, Tensor x, Tensor? y, {_CHANNELS}, Tensor sum_grad, Tensor sum_grad_xhat, SymInt count,"
    " float eps, str activation, bool residual, str backend) -> Tensor[]",
    _table(_native_apply, _backward_why_not, batch_norm_act_backward_apply_reference),
    lambda grad_y, x, *rest: [_like(x) for _ in range(1 + rest[-2])],
    _example_apply,
)
dispatch.register(
    "batch_norm_act_inference",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation, str backend) -> Tensor",
    _table(_native_inference, _inference_why_not, batch_norm_act_inference_reference),
    lambda x, *_: _like(x),
    _example_inference,
)
_inference_backward = dispatch.register(
    "batch_norm_act_inference_backward",
    "(Tensor grad_y, Tensor? y, Tensor scale, str activation, bool residual, str backend) -> Tensor[]",
    _table(_native_inference_backward, _backward_why_not, batch_norm_act_inference_backward_reference),
    lambda grad_y, *rest: [_like(grad_y) for _ in range(1 + rest[-2])],
    _example_inference_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, ctx.eps, ctx.activation, ctx.backend = inputs
    keeps_y = residual is not None and ctx.activation != "none"
    ctx.save_for_backward(x, output if keeps_y else None, mean, var, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *channels = ctx.saved_tensors
    sums = _backward_reduce(grad, x, y, *channels, ctx.eps, ctx.activation, ctx.backend)
    needs_x, *_, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:6]
    found: list[Tensor | None] = [None, grad if needs_residual else None]
    if needs_x or (needs_residual and y is not None):
        masks = needs_residual and y is not None
        count = x.numel() // x.shape[1]
        given = _backward_apply(grad, x, y, *channels, *sums, count, ctx.eps, ctx.activation, masks, ctx.backend)
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
    grad_x, *rest = _inference_backward(grad, y, scale, ctx.activation, masks, ctx.backend)
    return grad_x, None, None, rest[0] if masks else grad if needs_residual else None, None, None


dispatch.register_autograd("batch_norm_act", _backward, _setup)
dispatch.register_autograd("batch_norm_act_inference", _backward_inference, _setup_inference)
dispatch.forbid_gradient("batch_norm_act_statistics", "has no gradient: batch_norm_act counts it in its own")
for _name in ("batch_norm_act_backward_reduce", "batch_norm_act_backward_apply", "batch_norm_act_inference_backward"):
    dispatch.forbid_gradient(_name, "has no second derivative")

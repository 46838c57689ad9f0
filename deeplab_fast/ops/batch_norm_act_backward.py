"""The gradient of batch_norm_act in two passes, and of its frozen form in one.

    g = grad_y where act let y pass;  sum_grad = sum g;  sum_grad_xhat = sum g * (x - mean) * rsqrt(var + eps)
    grad_x = weight * rsqrt(var + eps) * (g - sum_grad / n - xhat * sum_grad_xhat / n)

`batch_norm_act_backward_reduce` gives both sums, the gradients of bias and weight; `batch_norm_act_backward` takes them
and n, which in synchronised batch norm are those of all processes: one message of 2 C numbers lies between. Eager
writes g and reads it twice; here x (and y where a residual hides the mask) and grad_y are read by both, and only the
results are written.
Source: Ioffe, Szegedy, "Batch Normalization", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, gpu, native
from .batch_norm_common import CHANNELS, example_tensors, launch_native, like, like_channels, packed, row, table, wide


def _masked(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return wide(grad)
    passed = (y > 0) & (y < 6) if activation == "relu6" else y > 0
    return torch.where(passed, wide(grad), 0)


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
    xhat = (wide(x) - row(mean)) * row(torch.rsqrt(var + eps))
    return _masked(grad, xhat * row(weight) + row(bias) if y is None else y, activation), xhat


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


def batch_norm_act_backward_reference(
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
    mean_grad = (row(sum_grad) + xhat * row(sum_grad_xhat)) / max(count, 1)
    grad_x = row(weight * torch.rsqrt(var + eps)) * (g - mean_grad)
    found = [grad_x, g] if residual else [grad_x]
    return [like(x).copy_(value) for value in found]


def batch_norm_act_backward_inference_reference(
    grad: Tensor, y: Tensor | None, scale: Tensor, activation: str, residual: bool
) -> list[Tensor]:
    g = wide(grad) if y is None else _masked(grad, y, activation)
    return [like(grad).copy_(value) for value in ([g * row(scale), g] if residual else [g * row(scale)])]


def batch_norm_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    activation: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """sum_grad and sum_grad_xhat (C,), fp32 (fp64 for fp64): over this x alone, the gradients of bias and weight.

    grad: (N, C, H, W) of x's dtype; y: the result where a residual and an activation made it, else None; the others as
    `batch_norm_act` has checked them.
    """
    inputs = (grad, x, y, mean, var, weight, bias, eps, activation)
    return dispatch.run("batch_norm_act_backward_reduce", *inputs, backend=backend)


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
    *,
    count: int,
    eps: float,
    activation: str,
    residual: bool,
    backend: str = "auto",
) -> list[Tensor]:
    """[grad_x], and the gradient of the residual where it is asked for, as x; count: the pixels behind the sums."""
    inputs = (grad, x, y, mean, var, weight, bias, sum_grad, sum_grad_xhat, count, eps, activation, residual)
    return dispatch.run("batch_norm_act_backward", *inputs, backend=backend)


def _native_why_not(grad: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(grad)


def _triton_why_not(grad: Tensor, x: Tensor, y: Tensor | None, *_: object) -> str | None:
    return gpu.triton_why_not(grad, x, y)


def _inference_triton_why_not(grad: Tensor, y: Tensor | None, *_: object) -> str | None:
    return gpu.triton_why_not(grad, y)


def _native_reduce(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, eps, activation = given
    names = ("grad", "x", "y", "mean", "var", "weight", "bias")
    named = dict(zip(names, tensors, strict=True))
    first, second = torch.empty_like(named["mean"]), torch.empty_like(named["mean"])
    launch_native("reduce", named["x"], eps, activation, first=first, second=second, **named)
    return first, second


def _native(*given: Any) -> list[Tensor]:
    *tensors, count, eps, activation, residual = given
    names = ("grad", "x", "y", "mean", "var", "weight", "bias", "sum_grad", "sum_grad_xhat")
    named = dict(zip(names, tensors, strict=True))
    found = [like(named["grad"]) for _ in range(1 + residual)]
    results = {"result": found[0], "masked": found[-1] if residual else None}
    launch_native("apply", named["grad"], eps, activation, count, **named, **results)
    return found


def _native_inference(grad: Tensor, y: Tensor | None, scale: Tensor, activation: str, residual: bool) -> list[Tensor]:
    return _native(grad, None, y, None, None, scale, None, None, None, 0, 0.0, activation, residual)


def _triton_reduce(*given: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import batch_norm_act_backward as kernels

    *tensors, eps, activation = given
    return kernels.reduce(*map(packed, tensors), eps, activation)


def _triton(*given: Any) -> list[Tensor]:
    from ..kernels import batch_norm_act_backward as kernels

    *tensors, count, eps, activation, residual = given
    return kernels.apply(*map(packed, tensors), count, eps, activation, residual)


def _triton_inference(grad: Tensor, y: Tensor | None, scale: Tensor, activation: str, residual: bool) -> list[Tensor]:
    return _triton(grad, None, y, None, None, scale, None, None, None, 0, 0.0, activation, residual)


BACKENDS = table((_native, _native_why_not), (_triton, _triton_why_not), batch_norm_act_backward_reference)
REDUCE_BACKENDS = table(
    (_native_reduce, _native_why_not), (_triton_reduce, _triton_why_not), batch_norm_act_backward_reduce_reference
)
INFERENCE_BACKENDS = table(
    (_native_inference, _native_why_not),
    (_triton_inference, _inference_triton_why_not),
    batch_norm_act_backward_inference_reference,
)


def _example_reduce(device: torch.device) -> tuple[Any, ...]:
    x, c = example_tensors(device)
    return x, x, None, c, c, c, c, 1e-5, "relu"


def _example(device: torch.device) -> tuple[Any, ...]:
    x, c = example_tensors(device)
    return x, x, None, c, c, c, c, c, c, 40, 1e-5, "relu", False


def _example_inference(device: torch.device) -> tuple[Any, ...]:
    x, c = example_tensors(device)
    return x, x, c, "relu", False


dispatch.register(
    "batch_norm_act_backward_reduce",
    f"(Tensor grad_y, Tensor x, Tensor? y, {CHANNELS}, float eps, str activation, str backend) -> (Tensor, Tensor)",
    REDUCE_BACKENDS,
    lambda grad_y, x, *_: like_channels(x),
    _example_reduce,
)
dispatch.register(
    "batch_norm_act_backward",
    f"(Tensor grad_y, Tensor x, Tensor? y, {CHANNELS}, Tensor sum_grad, Tensor sum_grad_xhat, SymInt count,"
    " float eps, str activation, bool residual, str backend) -> Tensor[]",
    BACKENDS,
    lambda grad_y, x, *rest: [like(x) for _ in range(1 + rest[-2])],
    _example,
)
dispatch.register(
    "batch_norm_act_backward_inference",
    "(Tensor grad_y, Tensor? y, Tensor scale, str activation, bool residual, str backend) -> Tensor[]",
    INFERENCE_BACKENDS,
    lambda grad_y, *rest: [like(grad_y) for _ in range(1 + rest[-2])],
    _example_inference,
)
for _name in ("batch_norm_act_backward", "batch_norm_act_backward_reduce", "batch_norm_act_backward_inference"):
    dispatch.forbid_gradient(_name, "has no second derivative")

"""Cross entropy at the resolution of the labels, from logits at a lower one.

    x = upsample(logits)                     # bilinear, never written
    nll[c] = log(sum_k exp(x[k])) - x[c]
    loss = (1 - e) w[y] nll[y] + e / K sum_c w[c] nll[c]

Eager writes the upsampled logits in fp32, their transpose and their log-softmax, keeps the last for the backward
and writes two gradients of that size: over twenty bytes an upsampled logit, 3 of 5 alive at once. Here the logits
and the labels are read once, and the gradient of the sum is written at the logits' own size in the same pass.
Source: Hsu et al., "Liger Kernel", section 3.3 (the gradient together with the loss).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native

OP = "upsample_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def upsample_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    per_pixel: bool = False,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in plain PyTorch: loss () or (N, H, W), weight_sum () fp32, out_of_range () int64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.long()  # in uint8, -100 would be 156
    known = (target >= 0) & (target < logits.shape[1])
    labelled = known & (target != ignore_index)
    out_of_range = (~known & (target != ignore_index)).sum()
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
    weight_sum = torch.where(labelled, weight[target * labelled], 0).sum().float()
    with torch.autocast(logits.device.type, enabled=False):
        full = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=align_corners)
        loss = F.cross_entropy(
            full,
            torch.where(labelled, target, -100),
            weight,
            ignore_index=-100,
            label_smoothing=label_smoothing,
            reduction="none" if per_pixel else "sum",
        )
    return loss, weight_sum, out_of_range


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the bilinearly upsampled logits, in fp32 (fp64 for fp64) under autocast too.

    logits: (N, K, h, w), any float dtype and strides; their gradient has the same dtype
    target: (N, H, W), any integer dtype; ignore_index and labels that are not in 0..K-1 are left out
    weight: (K,) fp32 class weights
    Returns loss, weight_sum () fp32: the sum of weight[y] over the pixels that carry a label, and out_of_range ()
    int64: the labels that are neither a class nor ignore_index. loss is () for the reductions "sum" and "mean" = sum
    / weight_sum, 0 with gradient 0 where nothing carries a label; (N, H, W) for "none", 0 at pixels left out.
    Only logits have a gradient. Raises ValueError on shapes, dtypes, devices and values, UserError where a named
    backend cannot run.
    """
    _check(logits, target, weight, label_smoothing, reduction)
    if target.dtype not in (torch.uint8, torch.int64):
        target = target.long()
    weight = None if weight is None else weight.float()
    per_pixel = reduction == "none"
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    options = (ignore_index, float(label_smoothing), per_pixel, align_corners, needs_grad)
    loss, weight_sum, out_of_range, _ = dispatch.run(OP, logits, target, weight, *options, backend=backend)
    if reduction == "mean":
        some = weight_sum > 0
        loss = torch.where(some, loss / torch.where(some, weight_sum, 1.0), 0.0)
    return loss, weight_sum, out_of_range


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str) -> None:
    if logits.ndim != 4 or not logits.is_floating_point() or 0 in logits.shape[1:]:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}; expected (N, K, h, w) floats")
    if target.ndim != 3 or target.shape[0] != logits.shape[0] or 0 in target.shape[1:]:
        raise ValueError(f"target is {tuple(target.shape)}; expected (N, H, W) with N = {logits.shape[0]}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target is {target.dtype}; expected integers")
    if weight is not None:
        if weight.shape != logits.shape[1:2] or not weight.is_floating_point():
            raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}; expected ({logits.shape[1]},) floats")
        if weight.requires_grad:
            raise ValueError("weight requires a gradient; only logits have one")
    for name, x in (("target", target), ("weight", weight)):
        if x is not None and x.device != logits.device:
            raise ValueError(f"{name} is on {x.device} and logits on {logits.device}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected mean, sum or none")


def _native_why_not(logits: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(logits)


def _backward_native_why_not(grad_loss: Tensor, logits: Tensor, *_: object) -> str | None:
    return native.cpu_why_not(logits)


def _launch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    options: tuple[int, float, bool],
    losses: Tensor | None,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills losses and grad where they are given; returns the sum of the losses, weight_sum and out_of_range."""
    logits, target = native.channels_last(logits), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    sums, out_of_range = logits.new_empty(2, dtype=torch.float32), target.new_empty((), dtype=torch.int64)
    batch, classes, height, width = logits.shape
    address = [0 if x is None else x.data_ptr() for x in (weight, grad_loss, losses, grad)]
    native.kernels().upsample_cross_entropy_cpu(
        *(logits.data_ptr(), native.FLOAT_DTYPES.index(logits.dtype)),
        *(target.data_ptr(), target.dtype == torch.int64, *address[:2]),
        *(batch, classes, height, width, target.shape[1], target.shape[2], *options, *address[2:]),
        *(sums[0].data_ptr(), sums[1].data_ptr(), out_of_range.data_ptr(), torch.get_num_threads()),
    )
    return sums[0].clone(), sums[1].clone(), out_of_range


def _native(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    per_pixel: bool,
    align_corners: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device) if per_pixel else None
    grad = _grad_buffer(logits, needs_grad and not per_pixel)
    loss, weight_sum, out_of_range = _launch(
        *(logits, target, weight, None, (ignore_index, label_smoothing, align_corners)),
        *(losses, grad if grad.ndim == 4 else None),
    )
    return loss if losses is None else losses, weight_sum, out_of_range, grad


def _triton_why_not(logits: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(logits)


def _triton(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    per_pixel: bool,
    align_corners: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import upsample_cross_entropy as kernels

    losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device) if per_pixel else None
    grad = _grad_buffer(logits, needs_grad and not per_pixel)
    loss, weight_sum, out_of_range = kernels.forward(
        *(native.channels_last(logits), target.contiguous(), None if weight is None else weight.contiguous()),
        *(losses, grad if grad.ndim == 4 else None, ignore_index, label_smoothing, align_corners),
    )
    return loss if losses is None else losses, weight_sum, out_of_range, grad


def _grad_buffer(logits: Tensor, wanted: bool) -> Tensor:
    """The gradient that the forward pass hands to the backward, (0,) where it has none. Never narrower than fp32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not wanted:
        return logits.new_empty((0,), dtype=dtype)
    return torch.empty(logits.shape, dtype=dtype, device=logits.device, memory_format=torch.channels_last)


def _reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, needs_grad = options
    per_pixel = options[2]
    loss, weight_sum, out_of_range = upsample_cross_entropy_reference(logits, target, weight, *options)
    grad = _grad_buffer(logits, needs_grad and not per_pixel and not loss.requires_grad)
    if grad.ndim == 4:  # inside the op nobody records the steps above
        ignore_index, label_smoothing, _, align_corners = options
        ones = grad.new_ones(target.shape)
        grad.copy_(_reference_gradient(ones, logits, target, weight, ignore_index, label_smoothing, align_corners))
    return loss, weight_sum, out_of_range, grad


def _reference_gradient(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    """(N, K, h, w) gradient of (grad_loss * losses).sum(), written out: inside an op torch records nothing."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes, size = logits.shape[1], target.shape[-2:]
    weight = logits.new_ones(classes) if weight is None else weight.to(logits.dtype)
    target = target.long()
    labelled = (target >= 0) & (target < classes) & (target != ignore_index)
    index = target * labelled
    grad_loss = grad_loss * labelled
    own = (1 - label_smoothing) * weight[index] * grad_loss
    each = label_smoothing / classes * grad_loss
    full = F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
    grad = full.softmax(1) * (own + each * weight.sum())[:, None] - each[:, None] * weight[:, None, None]
    grad.scatter_add_(1, index[:, None], -own[:, None])
    return torch.ops.aten.upsample_bilinear2d_backward(grad, list(size), list(logits.shape), align_corners)


# AMD EPYC (AVX-512), 2 threads, torch 2.13, 2 x 19 x 128 x 256 to 512 x 1024, forward + backward: native 12.6 ms (fp32)
# and 12.7 (bf16), eager 158 / 145, compiled eager 223; peak extra memory 14 MB, eager 236. Forward: 5.7 and 95.
# Triton is not timed on a GPU yet.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton, _triton_why_not, measured=()),
    "reference": dispatch.Backend(_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    per_pixel: bool,
    align_corners: bool,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = logits.new_empty(target.shape if per_pixel else (), dtype=torch.promote_types(logits.dtype, torch.float32))
    weight_sum, out_of_range = loss.new_empty((), dtype=torch.float32), target.new_empty((), dtype=torch.int64)
    return loss, weight_sum, out_of_range, _grad_buffer(logits, needs_grad and not per_pixel)


def _example(device: torch.device) -> tuple[Any, ...]:
    logits = torch.zeros((1, 2, 2, 3), device=device).to(memory_format=torch.channels_last)
    return logits, torch.zeros((1, 4, 6), dtype=torch.uint8, device=device), None, 255, 0.0, False, False, True


_op = dispatch.register(
    OP,
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, bool per_pixel, "
    "bool align_corners, bool needs_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    BACKENDS,
    _fake,
    _example,
)


def _backward_native(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    grad = _grad_buffer(logits, True)
    options = (ignore_index, label_smoothing, align_corners)
    _launch(logits, target, weight, grad_loss.float().contiguous(), options, None, grad)
    return grad.to(logits.dtype)


def _backward_triton_why_not(grad_loss: Tensor, logits: Tensor, *_: object) -> str | None:
    return gpu.triton_why_not(logits)


def _backward_triton(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    from ..kernels import upsample_cross_entropy as kernels

    grad = torch.empty_like(logits, memory_format=torch.channels_last)
    kernels.backward(
        *(grad_loss.float().contiguous(), native.channels_last(logits), target.contiguous()),
        *(None if weight is None else weight.contiguous(), grad, ignore_index, label_smoothing, align_corners),
    )
    return grad


def _backward_reference(grad_loss: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    grad = _reference_gradient(grad_loss, logits, *inputs)
    return grad.to(logits.dtype, memory_format=torch.channels_last)


BACKWARD_BACKENDS = {
    "native": dispatch.Backend(_backward_native, _backward_native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_backward_triton, _backward_triton_why_not, measured=()),
    "reference": dispatch.Backend(_backward_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _backward_fake(grad_loss: Tensor, logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.channels_last)


def _backward_example(device: torch.device) -> tuple[Any, ...]:
    logits, target, weight, ignore_index, label_smoothing, _, align_corners, _ = _example(device)
    grad_loss = torch.ones(target.shape, device=device)
    return grad_loss, logits, target, weight, ignore_index, label_smoothing, align_corners


_backward_op = dispatch.register(
    f"{OP}_backward",
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "bool align_corners, str backend) -> Tensor",
    BACKWARD_BACKENDS,
    _backward_fake,
    _backward_example,
)


def _scaled(grad: Tensor, grad_loss: Tensor, logits: Tensor) -> Tensor:
    scaled = torch.empty_like(logits, memory_format=torch.channels_last)
    return torch.mul(grad, grad_loss, out=scaled)


def _scale_fake(grad: Tensor, grad_loss: Tensor, logits: Tensor, backend: str) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.channels_last)


def _scale_example(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.zeros((1, 2, 3, 3), device=device)
    return logits, torch.ones((), device=device), logits


# A product that is rounded as it is stored, on a GPU without a tensor between: nothing for another backend to win.
# The gradient that was saved is a constant to torch: an op that sees the logits tells it that there would be more.
_scale_op = dispatch.register(
    f"{OP}_scale",
    "(Tensor grad, Tensor grad_loss, Tensor logits, str backend) -> Tensor",
    {"reference": dispatch.Backend(_scaled, dispatch.always, measured=("cpu", "cuda"))},
    _scale_fake,
    _scale_example,
)
dispatch.forbid_gradient(f"{OP}_scale", "has no second derivative")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    if ctx.options[2]:
        ctx.save_for_backward(logits, target, weight)
    else:
        ctx.save_for_backward(output[3], logits)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    ignore_index, label_smoothing, per_pixel, align_corners, needs_grad, backend = ctx.options
    if per_pixel:
        # A backend that was asked for by name must be able to run the gradient too.
        grad = _backward_op(grad_loss, *ctx.saved_tensors, ignore_index, label_smoothing, align_corners, backend)
    else:
        if not needs_grad:
            raise RuntimeError(f"{OP} was called with needs_grad=False, so it has no gradient")
        grad = _scale_op(ctx.saved_tensors[0], grad_loss, ctx.saved_tensors[1], "auto")
    return grad, *[None] * 8


dispatch.register_autograd(OP, _backward, _setup_context)
dispatch.forbid_gradient(f"{OP}_backward", "has no second derivative")

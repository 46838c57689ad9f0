"""The two passes of batch norm's gradient, and the one of its frozen form.

    g = grad_y where act let y pass;  sum_grad = sum g;  sum_grad_xhat = sum g * xhat
    grad_x = scale * (g - sum_grad / n - xhat * sum_grad_xhat / n)

The mask comes from y where it is given, else from z computed again from x. With T the bytes of x, the sums read 2 T
(3 T with y) and grad_x moves 3 T (with y and the residual's gradient 5 T), the frozen form 2 T to 4 T. Memory should
bind: it is about ten instructions an element. The sums take two launches, as the statistics do: one sum per group of
pixels, then all of these in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .batch_norm_act import OP, affine, channel_block, like, tiling


@triton.jit
def _passed(grad, z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        grad = tl.where(z > 0.0, grad, 0.0)
    if ACTIVATION == "relu6":
        grad = tl.where((z > 0.0) & (z < 6.0), grad, 0.0)
    return grad


@triton.jit
def _sums(
    grad,  # (pixels, channels), as x and y
    x,
    y,
    mean,
    var,
    weight,
    bias,
    partials,  # (groups, 2, channels) fp32
    pixels,
    vectors,
    groups,
    eps,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = vectors * VEC
    blocks = tl.cdiv(channels, BLOCK)
    group = tl.program_id(0) // blocks
    c, inside = channel_block(tl.program_id(0) % blocks, channels, BLOCK)
    row = tl.arange(0, ROWS)
    offsets = row[:, None] * channels + c[None, :]
    start = group.to(tl.int64) * ROWS
    center, rstd, scale, shift = affine(mean, var, weight, bias, c, inside, eps)
    sum_grad = tl.zeros([ROWS, BLOCK], tl.float32)
    product = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in tl.range(group, tl.cdiv(pixels, ROWS), groups, num_stages=STAGES):
        valid = (row < pixels - start)[:, None] & inside[None, :]
        first = start * channels
        d = tl.load(x + first + offsets, mask=valid, other=0.0).to(tl.float32) - center[None, :]
        g = tl.load(grad + first + offsets, mask=valid, other=0.0).to(tl.float32)
        if y is not None:
            g = _passed(g, tl.load(y + first + offsets, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
        else:
            g = _passed(g, d * scale[None, :] + shift[None, :], ACTIVATION)
        sum_grad += g
        product += g * d
        start += groups * ROWS
    at = partials + group * 2 * channels + c
    tl.store(at, tl.sum(sum_grad, 0), mask=inside)
    tl.store(at + channels, tl.sum(product, 0) * rstd, mask=inside)


@triton.jit
def _add(
    partials,  # (parts, 2, channels)
    first,
    second,
    parts,
    channels,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c, inside = channel_block(tl.program_id(0), channels, BLOCK)
    part = tl.arange(0, PARTS)
    a = tl.zeros([PARTS, BLOCK], tl.float32)
    b = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        at = partials + (start + part)[:, None] * 2 * channels + c[None, :]
        valid = (start + part < parts)[:, None] & inside[None, :]
        a += tl.load(at, mask=valid, other=0.0)
        b += tl.load(at + channels, mask=valid, other=0.0)
    tl.store(first + c, tl.sum(a, 0), mask=inside)
    tl.store(second + c, tl.sum(b, 0), mask=inside)


@triton.jit
def _gradient(
    grad,
    x,
    y,
    mean,
    var,
    weight,
    bias,
    sum_grad,
    sum_grad_xhat,
    grad_x,
    grad_residual,
    pixels,
    vectors,
    over,  # 1 / n
    eps,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = vectors * VEC
    blocks = tl.cdiv(channels, BLOCK)
    tile = tl.cdiv(pixels, ROWS) - 1 - tl.program_id(0) // blocks  # from the end, where the sums ended
    c, inside = channel_block(tl.program_id(0) % blocks, channels, BLOCK)
    start = tile.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    valid = (row < pixels - start)[:, None] & inside[None, :]
    offsets = row[:, None] * channels + c[None, :]
    first = start * channels
    center, rstd, scale, shift = affine(mean, var, weight, bias, c, inside, eps)
    g = tl.load(grad + first + offsets, mask=valid, other=0.0).to(tl.float32)
    if y is not None:
        g = _passed(g, tl.load(y + first + offsets, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
    result = g * scale[None, :]
    if mean is not None:
        d = tl.load(x + first + offsets, mask=valid, other=0.0).to(tl.float32) - center[None, :]
        if y is None:
            g = _passed(g, d * scale[None, :] + shift[None, :], ACTIVATION)
        slope = -scale * rstd * (tl.load(sum_grad_xhat + c, mask=inside, other=0.0) * over)
        offset = -scale * (tl.load(sum_grad + c, mask=inside, other=0.0) * over)
        result = g * scale[None, :] + (d * slope[None, :] + offset[None, :])
    tl.store(grad_x + first + offsets, common.narrow(result, grad_x.dtype.element_ty), mask=valid)
    if grad_residual is not None:
        tl.store(grad_residual + first + offsets, common.narrow(g, grad_x.dtype.element_ty), mask=valid)


def reduce(
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
    """sum_grad and sum_grad_xhat (C,) fp32; grad, x and y packed, what is per channel contiguous fp32."""
    tiles, channels = tiling("backward_reduce", x), x.shape[1]
    partials = x.new_empty((tiles.groups, 2, channels), dtype=torch.float32)
    tensors = (grad, x, y, mean, var, weight, bias, partials)
    numbers = (*tiles.sizes, tiles.groups, eps)
    grid = (tiles.groups * tiles.blocks,)
    common.launch(_sums, grid, *tensors, *numbers, ACTIVATION=activation, **tiles.constants)
    given = common.configuration(OP, "merge", partials)
    sums = tuple(torch.empty_like(mean) for _ in range(2))
    common.launch(_add, (common.cdiv(channels, given["BLOCK"]),), partials, *sums, tiles.groups, channels, **given)
    return sums


def apply(
    grad: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_xhat: Tensor | None,
    count: int,
    eps: float,
    activation: str,
    residual: bool,
) -> list[Tensor]:
    """grad_x, and grad_y behind the activation's mask where a residual wants it; count: pixels behind the sums.

    Without x, mean, var, bias and sums it is the gradient of the frozen form, y there unless activation is "none".
    """
    tiles = tiling("backward_apply", grad)
    found = [like(grad) for _ in range(1 + residual)]
    tensors = (grad, x, y, mean, var, weight, bias, sum_grad, sum_grad_xhat, found[0], found[1] if residual else None)
    numbers = (*tiles.sizes, 1.0 / max(count, 1), eps)
    grid = (tiles.tiles * tiles.blocks,)
    common.launch(_gradient, grid, *tensors, *numbers, ACTIVATION=activation, **tiles.constants)
    return found

"""Gradients of a depthwise convolution: for 3 x 3 and 1 x 1 one launch, which takes grad_y from memory once.

Bytes: grad_y and x once, grad_x once, 3 T at stride 1, and 4 * K * K bytes, written and read, of grad_weight's parts
for the 256 to 512 pixels that a program has.
A program has its tiles of chains (depthwise_chains.py says what those are) and goes over them twice. First
grad_x: at stride 1 the convolution of grad_y with the taps in reverse; above it each of the stride * stride pixels of
x that belong to a pixel of grad_y gathers the taps that reach it, a choice made when the kernel is compiled.
Then grad_weight: K * K sums of products for each channel, with grad_y and what the tiles share of x from the cache; as
one pass over both they would need more registers than a thread has. The parts are added in a fixed order.
A pixel and channel cost 46 instructions in bf16 on sm_90, 18 of them multiply-adds, which take an H200 as long as its 6
bytes: it may be memory or these that binds.
Of z = act(batch norm of x), `Norm`: the same 3 T and two more sums a part, for which a pass of their own reads 2 T.
batch_norm_act_backward's 3 T follow. At stride 1 z is made once of each pixel in either pass, as grad_weight comes
there from grad_y's taps around x: 66 instructions, which should bind. At stride 2 a pixel of grad_y costs 131 for 18
bytes, and it may be both. A channel of x with NaN or Inf has no mean, and then no tap of grad_weight is spared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import narrow
from .depthwise_chains import (
    PHASED,
    Norm,
    add,
    columns_of,
    convolve,
    gate,
    load_norm,
    load_weights,
    normalised,
    packed,
    pixels,
    place,
    plan,
    save_sums,
)
from .depthwise_conv import LARGEST
from .depthwise_gather import gradients

OP = "depthwise_conv_backward"
LARGEST_STRIDE = 4  # above it, code for stride * stride pixels of x is more than it is worth


@triton.jit
def _spread(
    grad_y, grad_x, image, channels, c, row, column, there, height, width, out_height, out_width, taps,
    x, pixel, mean, scale, shift, sum_grad, product,
    DILATION: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """grad_x of the STRIDE x STRIDE pixels at (row, column) * STRIDE; with scale behind the gate, and its sums."""
    R: tl.constexpr = K // 2
    results = ()
    if scale is not None:
        values = ()
        for i in tl.static_range(STRIDE * STRIDE):
            h, w = row * STRIDE + i // STRIDE, column * STRIDE + i % STRIDE
            at = x + ((image * height + h) * width + w) * channels + c
            values = values + (tl.load(at, mask=there & (h < height) & (w < width), other=0),)
    for down in tl.static_range(STRIDE):
        for right in tl.static_range(STRIDE):
            total = tl.zeros(taps[0].shape, tl.float32)
            for a in tl.static_range(-R, R + 1):
                for b in tl.static_range(-R, R + 1):
                    if (down - a * DILATION) % STRIDE == 0 and (right - b * DILATION) % STRIDE == 0:
                        h = row + (down - a * DILATION) // STRIDE
                        w = column + (right - b * DILATION) // STRIDE
                        live = there & (h >= 0) & (h < out_height) & (w >= 0) & (w < out_width)
                        at = grad_y + ((image * out_height + h) * out_width + w) * channels + c
                        total += tl.load(at, mask=live, other=0).to(tl.float32) * taps[(a + R) * K + b + R]
            if scale is not None:
                inside = pixel & (row * STRIDE + down < height) & (column * STRIDE + right < width)
                value = values[down * STRIDE + right]
                total, sum_grad, product = gate(total, value, inside, mean, scale, shift, sum_grad, product, ACTIVATION)
            results = results + (narrow(total, grad_x.dtype.element_ty),)
    for i in tl.static_range(STRIDE * STRIDE):
        h, w = row * STRIDE + i // STRIDE, column * STRIDE + i % STRIDE
        to = grad_x + ((image * height + h) * width + w) * channels + c
        tl.store(to, results[i], mask=there & (h < height) & (w < width))
    return sum_grad, product


@triton.jit
def _multiply(
    sums, at, row, height, inside, row_pitch, column_pitch, grad_at, grad_row, grad_height, grad_pitch, there,
    scale, shift, bounds, pixel,
    DILATION: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    HALO: tl.constexpr, REACH: tl.constexpr, AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """sums, and to each tap's the products of ROWS results' gradients with what the tap read; see `convolve`.

    SWAP: x and grad_y are in each other's place, and so are the taps' sums, from the last to the first
    """
    LAST: tl.constexpr = (ROWS - 1) * RATIO + HALO
    R: tl.constexpr = K // 2
    window, grads = (), ()
    for t in tl.static_range(-HALO, LAST + 1 + AHEAD):
        if t <= LAST:
            live = (row + t * DILATION >= 0) & (row + t * DILATION < height)
            for b in tl.static_range(-REACH, REACH + 1):
                tap = at + (t * row_pitch + b * column_pitch)
                window = window + (tl.load(tap, mask=live & inside[b + REACH], other=0),)
            for j in tl.static_range(ROWS):
                if t == j * RATIO - R or (t == -HALO and j * RATIO - R < t):
                    live = there & (grad_row + j * STEP < grad_height)
                    grads = grads + (tl.load(grad_at + j * grad_pitch, mask=live, other=0),)
        if t - AHEAD >= -HALO:
            for b in tl.static_range(-REACH, REACH + 1):
                value = window[(t - AHEAD + HALO) * (2 * REACH + 1) + b + REACH].to(tl.float32)
                if scale is not None and not SWAP:
                    used = row + (t - AHEAD) * DILATION
                    seen = bounds[b + REACH] & (used >= 0) & (used < height)
                    value = normalised(value, scale, shift, seen, ACTIVATION)
                for j in tl.static_range(ROWS):
                    if t - AHEAD - j * RATIO >= -R and t - AHEAD - j * RATIO <= R:
                        grad = grads[j].to(tl.float32)
                        if SWAP:
                            live = pixel & (grad_row + j * STEP < grad_height)
                            grad = normalised(grad, scale, shift, live, ACTIVATION)
                        product = value * grad
                        sums = add(sums, (t - AHEAD - j * RATIO + R) * K + b + R, product)
    return sums


@triton.jit
def _chains(
    grad_y, x, weight, grad_x, parts, in_mean, in_var, in_scale, in_shift, eps,
    slots, height, width, out_height, out_width, groups,
    DILATION: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, PHASED: tl.constexpr,
    SPAN: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr, HALO: tl.constexpr, REACH: tl.constexpr,
    K: tl.constexpr, ACTIVATION: tl.constexpr, AHEAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, grad_x (N, H, W, C), grad_y (N, Ho, Wo, C), weight (K * K, C), parts (programs of a channel, K * K, C).

    With in_scale, of z, two more rows of parts; grad_x is then grad_z behind the gate.
    """
    OUT: tl.constexpr = tl.float32 if in_scale is not None else x.dtype.element_ty  # of `convolve`, before the gate
    SWAP: tl.constexpr = STRIDE == 1 and in_scale is not None
    WIDTH: tl.constexpr = K * K + (2 if in_scale is not None else 0)
    image, place_, channels, c = place(groups, VECTOR, BLOCK_C)
    mean, scale, shift, sum_grad, product = in_mean, in_scale, in_shift, None, None
    if in_scale is not None:
        mean, _, scale, shift = load_norm(in_mean, in_var, in_scale, in_shift, eps, c, channels, BLOCK_W)
        sum_grad = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        product = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    x_pitch = tl.cast(width, tl.int64) * channels * DILATION
    grad_pitch = tl.cast(out_width, tl.int64) * channels * STEP
    if grad_x is not None:
        taps = load_weights(weight, c, channels, K, STRIDE == 1, BLOCK_W)
        for i in range(TILES):
            first, column, pixel = pixels(place_ * TILES + i, slots, out_width, STEP, PHASED, SPAN * PIECES, BLOCK_W)
            there = pixel & (c < channels)
            if STRIDE == 1:
                inside = columns_of(column, width, there, DILATION, REACH)
                for piece in range(PIECES):
                    row = first + piece * (SPAN * STEP)
                    offset = ((image * height + row) * width + column) * channels + c
                    if in_scale is not None:
                        values = ()
                        for j in tl.static_range(SPAN):
                            live = there & (row + j * STEP < height)
                            values = values + (tl.load(x + offset + j * grad_pitch, mask=live, other=0),)
                    results = convolve(
                        grad_y + offset, row, height, inside, x_pitch, channels * DILATION, taps, None, None,
                        None, None, None, DILATION, 1, K, SPAN, HALO, REACH, "none", "none", AHEAD, OUT,
                    )  # fmt: skip
                    for j in tl.static_range(SPAN):
                        live = there & (row + j * STEP < height)
                        result = results[j]
                        if in_scale is not None:
                            result, sum_grad, product = gate(
                                result, values[j], pixel & (row + j * STEP < height), mean, scale, shift,
                                sum_grad, product, ACTIVATION,
                            )  # fmt: skip
                            result = narrow(result, grad_x.dtype.element_ty)
                        tl.store(grad_x + offset + j * grad_pitch, result, mask=live)
            else:
                for j in range(SPAN * PIECES):
                    sum_grad, product = _spread(
                        grad_y, grad_x, image, channels, c, first + j * STEP, column, there, height, width,
                        out_height, out_width, taps, x, pixel, mean, scale, shift, sum_grad, product,
                        DILATION, STRIDE, K, ACTIVATION,
                    )  # fmt: skip
    if in_scale is not None:
        _, rstd, _, _ = load_norm(in_mean, in_var, in_scale, in_shift, eps, c, channels, BLOCK_W)
        part = image * (tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)) + place_
        save_sums(parts, part, sum_grad, product, rstd, channels, c, WIDTH)
    if parts is not None:
        sums = ()
        for _ in tl.static_range(K * K):
            sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
        for i in range(TILES):
            first, column, pixel = pixels(place_ * TILES + i, slots, out_width, STEP, PHASED, SPAN * PIECES, BLOCK_W)
            there = pixel & (c < channels)
            inside = columns_of(column * STRIDE, width, there, DILATION, REACH)
            bounds = columns_of(column * STRIDE, width, pixel, DILATION, REACH)
            for piece in range(PIECES):
                row = first + piece * (SPAN * STEP)
                at = x + ((image * height + row * STRIDE) * width + column * STRIDE) * channels + c
                grad_at = grad_y + ((image * out_height + row) * out_width + column) * channels + c
                if SWAP:  # z, of each pixel once; the taps are those of grad_y, which needs nothing done to it
                    at, grad_at = grad_at, at
                sums = _multiply(
                    sums, at, row * STRIDE, height, inside, x_pitch, channels * DILATION,
                    grad_at, row, out_height, grad_pitch, there, scale, shift, bounds, pixel,
                    DILATION, RATIO, STEP, K, SPAN, HALO, REACH, AHEAD, ACTIVATION, SWAP,
                )  # fmt: skip
        part = image * (tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)) + place_
        for i in tl.static_range(K * K):
            to = parts + (part * WIDTH + i) * channels + c
            total = tl.sum(sums[K * K - 1 - i if SWAP else i], 0, keep_dims=True)
            tl.store(to, total, mask=c < channels)


def _run_chains(
    grad_y: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, need_weight: bool, stride: int, dilation: int,
    norm: Norm | None = None,
) -> list[Tensor]:  # fmt: skip
    """Writes grad_x and returns the parts of grad_weight, of what is needed; with norm, of the two sums as well."""
    (n, c, h, w), k = x.shape, weight.shape[-1]
    out_size = tuple(grad_y.shape[2:])
    config = common.configuration(OP, "normalised" if norm else "rows", x)
    how = plan(x, out_size, k, stride, [dilation], config)
    rows = k * k + (2 if norm else 0)
    parts = x.new_empty((n * how.programs, rows, c), dtype=torch.float32) if need_weight else None
    common.launch(
        _chains, how.grid, grad_y, x, None if grad_x is None else packed(weight), grad_x, parts, *(norm or Norm())[:5],
        how.slots, h, w, *out_size, c // how.block["VECTOR"],
        DILATION=dilation, STRIDE=stride, REACH=k // 2 if dilation < w else 0, K=k, PHASED=PHASED,
        ACTIVATION=norm.activation if norm else "none", **how.chains, **how.block, **config,
    )  # fmt: skip
    return [parts] if need_weight else []


def depthwise_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    stride: int,
    dilation: int,
) -> None:
    """Writes grad_x (N, C, H, W) and grad_weight (C, 1, k, k), those that are given.

    grad_y, x, grad_x: in packed channels-last memory
    """
    if grad_x is None and grad_weight is None:
        return
    for parts in _runner(weight, stride)(grad_y, x, weight, grad_x, grad_weight is not None, stride, dilation):
        grad_weight.copy_(parts.sum(0).t().reshape(grad_weight.shape))


def depthwise_conv_normalised_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    grad_z: Tensor,
    grad_weight: Tensor,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Writes grad_z where the activation let it pass, and grad_weight; returns sum_grad and sum_grad_xhat (C,) fp32."""
    found = _runner(weight, stride)(grad_y, x, weight, grad_z, True, stride, dilation, norm)
    taps = found[0][:, : weight[0].numel()].sum(0)
    grad_weight.copy_(taps.t().reshape(grad_weight.shape))
    return found[-1][:, -2].sum(0), found[-1][:, -1].sum(0)


def _runner(weight: Tensor, stride: int) -> Callable[..., list[Tensor]]:
    return _run_chains if weight.shape[-1] <= LARGEST and stride <= LARGEST_STRIDE else gradients

"""Gradients of a depthwise convolution: for 3 x 3 and 1 x 1 one launch, which takes grad_y from memory once.

Bytes: grad_y and x once, grad_x once, 3 T at stride 1, and 4 * K * K bytes, written and read, of grad_weight's parts
for the 256 to 512 pixels that a program has.
A program has its tiles of chains (depthwise_chains.py says what those are) and goes over them twice. First
grad_x: at stride 1 the convolution of grad_y with the taps in reverse; above it each of the stride * stride pixels of
x that belong to a pixel of grad_y gathers the taps that reach it, a choice made when the kernel is compiled.
Then grad_weight: K * K sums of products for each channel, with grad_y and what the tiles share of x from the cache; as
one pass over both they would need more registers than a thread has. The parts are added in a fixed order.
Device memory should bind; a pixel and channel cost about 30 instructions in bf16, 18 of them multiply-adds, as long as
its 6 bytes take on an H200, so that it may be both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import narrow
from .depthwise_chains import PHASED, add, blocks, columns_of, convolve, load_weights, packed, pixels, place, plan
from .depthwise_conv import LARGEST, gather

OP = "depthwise_conv_backward"
LARGEST_STRIDE = 4  # above it, code for stride * stride pixels of x is more than it is worth


@triton.jit
def _spread(
    grad_y, grad_x, image, channels, c, row, column, there, height, width, out_height, out_width, taps,
    DILATION: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """grad_x of the STRIDE x STRIDE pixels at (row, column) * STRIDE."""
    R: tl.constexpr = K // 2
    results = ()
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
            results = results + (narrow(total, grad_x.dtype.element_ty),)
    for i in tl.static_range(STRIDE * STRIDE):
        h, w = row * STRIDE + i // STRIDE, column * STRIDE + i % STRIDE
        to = grad_x + ((image * height + h) * width + w) * channels + c
        tl.store(to, results[i], mask=there & (h < height) & (w < width))


@triton.jit
def _multiply(
    sums, at, row, height, inside, row_pitch, column_pitch, grad_at, grad_row, grad_height, grad_pitch, there,
    DILATION: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    HALO: tl.constexpr, REACH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """sums, and to each tap's the products of ROWS results' gradients with what the tap read; see `convolve`."""
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
                for j in tl.static_range(ROWS):
                    if t - AHEAD - j * RATIO >= -R and t - AHEAD - j * RATIO <= R:
                        product = value * grads[j].to(tl.float32)
                        sums = add(sums, (t - AHEAD - j * RATIO + R) * K + b + R, product)
    return sums


@triton.jit
def _chains(
    grad_y, x, weight, grad_x, parts, slots, height, width, out_height, out_width, groups,
    DILATION: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, PHASED: tl.constexpr,
    SPAN: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr, HALO: tl.constexpr, REACH: tl.constexpr,
    K: tl.constexpr, AHEAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, grad_x (N, H, W, C), grad_y (N, Ho, Wo, C), weight (K * K, C), parts (programs of a channel, K * K, C)."""
    image, place_, channels, c = place(groups, VECTOR, BLOCK_C)
    x_pitch = tl.cast(width, tl.int64) * channels * DILATION
    grad_pitch = tl.cast(out_width, tl.int64) * channels * STEP
    if grad_x is not None:
        taps = load_weights(weight, c, channels, K, STRIDE == 1, BLOCK_W)
        for i in range(TILES):
            first, column, there = pixels(place_ * TILES + i, slots, out_width, STEP, PHASED, SPAN * PIECES, BLOCK_W)
            there = there & (c < channels)
            if STRIDE == 1:
                inside = columns_of(column, width, there, DILATION, REACH)
                for piece in range(PIECES):
                    row = first + piece * (SPAN * STEP)
                    offset = ((image * height + row) * width + column) * channels + c
                    results = convolve(
                        grad_y + offset, row, height, inside, x_pitch, channels * DILATION, taps, None, None,
                        DILATION, 1, K, SPAN, HALO, REACH, "none", AHEAD,
                    )  # fmt: skip
                    for j in tl.static_range(SPAN):
                        live = there & (row + j * STEP < height)
                        tl.store(grad_x + offset + j * grad_pitch, results[j], mask=live)
            else:
                for j in range(SPAN * PIECES):
                    _spread(
                        grad_y, grad_x, image, channels, c, first + j * STEP, column, there, height, width,
                        out_height, out_width, taps, DILATION, STRIDE, K,
                    )  # fmt: skip
    if parts is not None:
        sums = ()
        for _ in tl.static_range(K * K):
            sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
        for i in range(TILES):
            first, column, there = pixels(place_ * TILES + i, slots, out_width, STEP, PHASED, SPAN * PIECES, BLOCK_W)
            there = there & (c < channels)
            inside = columns_of(column * STRIDE, width, there, DILATION, REACH)
            for piece in range(PIECES):
                row = first + piece * (SPAN * STEP)
                at = x + ((image * height + row * STRIDE) * width + column * STRIDE) * channels + c
                grad_at = grad_y + ((image * out_height + row) * out_width + column) * channels + c
                sums = _multiply(
                    sums, at, row * STRIDE, height, inside, x_pitch, channels * DILATION,
                    grad_at, row, out_height, grad_pitch, there, DILATION, RATIO, STEP, K, SPAN, HALO, REACH, AHEAD,
                )  # fmt: skip
        part = image * (tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)) + place_
        for i in tl.static_range(K * K):
            to = parts + (part * (K * K) + i) * channels + c
            tl.store(to, tl.sum(sums[i], 0, keep_dims=True), mask=c < channels)


@triton.jit
def _products(
    grad_y, x, parts, total_pixels, height, width, out_height, out_width, groups, stride, dilation, tiles,
    K: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts (programs of a channel, K * K, C) of grad_weight for any K: one tap of `tiles` tiles."""
    channels = groups * VECTOR
    part = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % tl.cdiv(channels, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tap = tl.program_id(1)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(tiles):
        pixel = (part.to(tl.int64) * tiles + i) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        line = pixel // out_width
        h = (line % out_height) * stride + (tap // K - K // 2) * dilation
        w = (pixel % out_width) * stride + (tap % K - K // 2) * dilation
        live = (pixel < total_pixels) & (c < channels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        grad = tl.load(grad_y + pixel * channels + c, mask=live, other=0).to(tl.float32)
        at = x + ((line // out_height * height + h) * width + w) * channels + c
        total += grad * tl.load(at, mask=live, other=0).to(tl.float32)
    to = parts + (part.to(tl.int64) * (K * K) + tap) * channels + c
    tl.store(to, tl.sum(total, 0, keep_dims=True), mask=c < channels)


def _run_chains(
    grad_y: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, need_weight: bool, stride: int, dilation: int
) -> Tensor | None:
    """Writes grad_x and returns the parts of grad_weight, of what is needed."""
    (n, c, h, w), k = x.shape, weight.shape[-1]
    out_size = tuple(grad_y.shape[2:])
    config = common.configuration(OP, "rows", x)
    how = plan(x, out_size, k, stride, [dilation], config)
    parts = x.new_empty((n * how.programs, k * k, c), dtype=torch.float32) if need_weight else None
    common.launch(
        _chains, how.grid, grad_y, x, None if grad_x is None else packed(weight), grad_x, parts,
        how.slots, h, w, *out_size, c // how.block["VECTOR"],
        DILATION=dilation, STRIDE=stride, REACH=k // 2 if dilation < w else 0, K=k, PHASED=PHASED,
        **how.chains, **how.block, **config,
    )  # fmt: skip
    return parts


def _run_any(
    grad_y: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, need_weight: bool, stride: int, dilation: int
) -> Tensor | None:
    """The same for any kernel and stride, in two launches."""
    (n, c, h, w), k = x.shape, weight.shape[-1]
    out_size = tuple(grad_y.shape[2:])
    config = common.configuration(OP, "any", x)
    tiles = config.pop("TILES")
    block = blocks(c, x.dtype, config.pop("BLOCK_C"), config["num_warps"])
    if grad_x is not None:
        common.launch(
            gather, (common.cdiv(h * w, block["BLOCK_W"]) * common.cdiv(c, block["BLOCK_C"]), n),
            grad_y, grad_x, packed(weight), *[None] * 5,
            h * w, *out_size, h, w, c // block["VECTOR"], stride, dilation,
            K=k, TRANSPOSED=True, ACTIVATION="none", **block, **config,
        )  # fmt: skip
    if not need_weight:
        return None
    pixels_of_all = n * out_size[0] * out_size[1]
    tiles = min(tiles, max(1, common.cdiv(pixels_of_all, block["BLOCK_W"])))
    parts = x.new_empty((common.cdiv(pixels_of_all, block["BLOCK_W"] * tiles), k * k, c), dtype=torch.float32)
    common.launch(
        _products, (parts.shape[0] * common.cdiv(c, block["BLOCK_C"]), k * k), grad_y, x, parts, pixels_of_all,
        h, w, *out_size, c // block["VECTOR"], stride, dilation, tiles, K=k, **block, **config,
    )  # fmt: skip
    return parts


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
    small = weight.shape[-1] <= LARGEST and stride <= LARGEST_STRIDE
    run = _run_chains if small else _run_any
    parts = run(grad_y, x, weight, grad_x, grad_weight is not None, stride, dilation)
    if parts is not None:
        grad_weight.copy_(parts.sum(0).t().reshape(grad_weight.shape))

"""Depthwise convolution: 3 x 3 and 1 x 1 by chains (depthwise_chains.py), any other kernel by plain gathers.

Bytes: x once and each result once, 2 T for one dilation and (1 + R) T for R dilations of one x; weights are nothing
beside them. Device memory should bind: a result in bf16 is some 22 instructions (9 of them multiply-adds), two thirds
to three quarters of what an H200 issues in the time that its 4 bytes take.

Several dilations of one x: a chain's step is their greatest common divisor, and a program computes one result after
another for the same rows and columns, the first with x from memory, the others with x from the cache.
Statistics: counts, means and sums of squared deviations of each piece, 8 bytes for SPAN * BLOCK_W results of a channel,
merged by Chan's formula in a fixed order.
Of z = act(batch norm of x), `Norm`: 2 T, where a kernel of its own for that would make it 4 T. z is made of x at each
load, four and a half times for a result of 3 x 3 at stride 1, in a multiply-add and two bounds. With the statistics a
result is 56 instructions in bf16 on sm_90, 40 without z, nearly twice what an H200 issues in the time of its 4 bytes:
these should bind. At stride 2 it is 70 for 10 bytes, and it may be both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .depthwise_chains import (
    PHASED,
    Norm,
    blocks,
    columns_of,
    convolve,
    load_norm,
    load_weights,
    moments,
    packed,
    pixels,
    place,
    plan,
    save_moments,
)
from .depthwise_gather import gather

OP = "depthwise_conv"
LARGEST = 3  # kernel whose taps fit a thread's registers
MOST_RATES = 3  # results of one launch


@triton.jit
def _rate(
    x, y, weight, scale, shift, counts, means, squares, in_mean, in_var, in_scale, in_shift, eps,
    slots, height, width, out_height, out_width, groups,
    DILATION: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, PHASED: tl.constexpr,
    SPAN: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr, HALO: tl.constexpr, REACH: tl.constexpr,
    K: tl.constexpr, ACTIVATION: tl.constexpr, IN_ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's results of one dilation: in SPAN rows of a chain, every SKIP-th is a chain of its own."""
    SKIP: tl.constexpr = DILATION * RATIO // (STRIDE * STEP)
    ROWS: tl.constexpr = (SPAN + SKIP - 1) // SKIP
    CHAINS: tl.constexpr = SKIP if SKIP < SPAN else SPAN
    image, place_, channels, c = place(groups, VECTOR, BLOCK_C)
    taps = load_weights(weight, c, channels, K, False, BLOCK_W)
    vector = tl.broadcast_to(c, (BLOCK_W, BLOCK_C))
    if scale is not None:
        scale = tl.load(scale + vector, mask=vector < channels, other=0)
    if shift is not None:
        shift = tl.load(shift + vector, mask=vector < channels, other=0)
    if in_scale is not None:
        _, _, in_scale, in_shift = load_norm(in_mean, in_var, in_scale, in_shift, eps, c, channels, BLOCK_W)
    row_pitch = tl.cast(width, tl.int64) * channels * DILATION
    pitch = tl.cast(out_width, tl.int64) * channels * (SKIP * STEP)
    for i in range(TILES):
        first, column, pixel = pixels(place_ * TILES + i, slots, out_width, STEP, PHASED, SPAN * PIECES, BLOCK_W)
        there = pixel & (c < channels)
        inside = columns_of(column * STRIDE, width, there, DILATION, REACH)
        bounds = columns_of(column * STRIDE, width, pixel, DILATION, REACH)
        for part in range(PIECES * CHAINS):
            chain = part % CHAINS
            row = first + (part // CHAINS * SPAN + chain) * STEP
            at = x + ((image * height + row * STRIDE) * width + column * STRIDE) * channels + c
            results = convolve(
                at, row * STRIDE, height, inside, row_pitch, channels * DILATION, taps, scale, shift,
                in_scale, in_shift, bounds, DILATION, RATIO, K, ROWS, HALO, REACH, ACTIVATION, IN_ACTIVATION, AHEAD,
                y.dtype.element_ty,
            )  # fmt: skip
            to = y + ((image * out_height + row) * out_width + column) * channels + c
            for j in tl.static_range(ROWS):
                live = row + j * SKIP * STEP < tl.minimum(out_height, row + (SPAN - chain) * STEP)
                tl.store(to + j * pitch, results[j], mask=there & live)
            if counts is not None:
                count, mean, square = moments(results, row, pixel, out_height, STEP, ROWS)
                programs = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
                index = ((image * programs + place_) * TILES + i) * PIECES + part
                save_moments(counts, means, squares, index, channels, c, count, mean, square)


@triton.jit
def _rows(
    x, y0, y1, y2, weight0, weight1, weight2, scale0, scale1, scale2, shift0, shift1, shift2, counts, means, squares,
    in_mean, in_var, in_scale, in_shift, eps, slots, height, width, out_height, out_width, groups,
    DILATION0: tl.constexpr, DILATION1: tl.constexpr, DILATION2: tl.constexpr,
    REACH0: tl.constexpr, REACH1: tl.constexpr, REACH2: tl.constexpr,
    STRIDE: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, PHASED: tl.constexpr, SPAN: tl.constexpr,
    PIECES: tl.constexpr, TILES: tl.constexpr, HALO: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    IN_ACTIVATION: tl.constexpr, AHEAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x (N, H, W, C) and y (N, Ho, Wo, C), C = groups * VECTOR; weight (K * K, C) each; what is per channel (C,)."""
    _rate(
        x, y0, weight0, scale0, shift0, counts, means, squares, in_mean, in_var, in_scale, in_shift, eps,
        slots, height, width, out_height, out_width, groups, DILATION0, STRIDE, RATIO, STEP, PHASED, SPAN, PIECES,
        TILES, HALO, REACH0, K, ACTIVATION, IN_ACTIVATION, AHEAD, VECTOR, BLOCK_W, BLOCK_C,
    )  # fmt: skip
    if y1 is not None:
        _rate(
            x, y1, weight1, scale1, shift1, None, None, None, None, None, None, None, None,
            slots, height, width, out_height, out_width, groups, DILATION1, STRIDE, RATIO, STEP, PHASED, SPAN,
            PIECES, TILES, HALO, REACH1, K, ACTIVATION, "none", AHEAD, VECTOR, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    if y2 is not None:
        _rate(
            x, y2, weight2, scale2, shift2, None, None, None, None, None, None, None, None,
            slots, height, width, out_height, out_width, groups, DILATION2, STRIDE, RATIO, STEP, PHASED, SPAN,
            PIECES, TILES, HALO, REACH2, K, ACTIVATION, "none", AHEAD, VECTOR, BLOCK_W, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _merge(
    counts, means, squares, to_counts, to_means, to_squares, parts, channels,
    LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's formula for BLOCK_P parts at once, in a fixed order. LAST: the variance, not the sum of squares."""
    part = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    there = (part < parts) & (c < channels)
    at = part.to(tl.int64) * channels + c
    count = tl.load(counts + part, mask=part < parts, other=0)
    mean = tl.load(means + at, mask=there, other=0)
    total = tl.sum(count, 0, keep_dims=True)
    size = tl.maximum(total, 1)
    merged = tl.sum(mean * (count / size), 0, keep_dims=True)
    apart = tl.where(there, mean - merged, 0)
    square = tl.sum(tl.load(squares + at, mask=there, other=0) + count * apart * apart, 0, keep_dims=True)
    to = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(to_means + to, merged, mask=c < channels)
    tl.store(to_squares + to, square / size if LAST else square, mask=c < channels)
    if not LAST:
        tl.store(to_counts + tl.program_id(0) + tl.zeros_like(total).to(tl.int32), total)


def result_of(x: Tensor, stride: int) -> Tensor:
    n, c, h, w = x.shape
    size = (n, c, common.cdiv(h, stride), common.cdiv(w, stride))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _partials(x: Tensor, parts: int) -> list[Tensor]:
    """Counts (parts,), means and sums of squared deviations (parts, C)."""
    return [x.new_empty(size, dtype=torch.float32) for size in (parts, (parts, x.shape[1]), (parts, x.shape[1]))]


def _merged(partials: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,)."""
    while True:
        parts, c = partials[1].shape
        config = common.configuration(OP, "merge", partials[1])
        into = _partials(partials[1], common.cdiv(parts, config["BLOCK_P"]))
        last = into[1].shape[0] == 1
        grid = (into[1].shape[0], common.cdiv(c, config["BLOCK_C"]))
        common.launch(_merge, grid, *partials, *into, parts, c, LAST=last, **config)
        if last:
            return into[1][0], into[2][0]
        partials = into


Rate = tuple[Tensor, Tensor | None, Tensor | None, int]  # weight, scale, shift, dilation


def _run_rows(
    x: Tensor, rates: Sequence[Rate], stride: int, activation: str, statistics: bool, norm: Norm | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Up to MOST_RATES results of x in packed channels-last memory, and the parts of the first's statistics.

    norm: what is applied to x as it is loaded, of one rate
    """
    n, _, h, w = x.shape
    k = rates[0][0].shape[-1]
    results = [result_of(x, stride) for _ in rates]
    config = common.configuration(OP, "normalised" if norm else "rows" if len(rates) == 1 else "rates", x)
    out_size = tuple(results[0].shape[2:])
    how = plan(x, out_size, k, stride, [rate[3] for rate in rates], config)
    parts = n * how.programs * how.chains["TILES"] * how.chains["PIECES"]
    partials = _partials(x, parts) if statistics else []
    absent = [None] * (MOST_RATES - len(rates))
    kinds = results, [packed(rate[0]) for rate in rates], [rate[1] for rate in rates], [rate[2] for rate in rates]
    dilations = [*(rate[3] for rate in rates), *(1 for _ in absent)]
    common.launch(
        _rows, how.grid, x, *(tensor for kind in kinds for tensor in (*kind, *absent)), *(partials or [None] * 3),
        *(norm or Norm())[:5], how.slots, h, w, *out_size, x.shape[1] // how.block["VECTOR"],
        **{f"DILATION{i}": d for i, d in enumerate(dilations)},
        **{f"REACH{i}": k // 2 if d < w else 0 for i, d in enumerate(dilations)},
        STRIDE=stride, PHASED=PHASED, K=k, ACTIVATION=activation, IN_ACTIVATION=norm.activation if norm else "none",
        **how.chains, **how.block, **config,
    )  # fmt: skip
    return results, partials


def _run_gather(
    x: Tensor, rate: Rate, stride: int, activation: str, statistics: bool, norm: Norm | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The same for a kernel of any size."""
    weight, scale, shift, dilation = rate
    n, c, _, _ = x.shape
    result = result_of(x, stride)
    slots = result.shape[2] * result.shape[3]
    config = common.configuration(OP, "gather", x)
    block = blocks(c, x.dtype, config.pop("BLOCK_C"), config["num_warps"])
    tiles = common.cdiv(slots, block["BLOCK_W"])
    partials = _partials(x, n * tiles) if statistics else []
    common.launch(
        gather, (tiles * common.cdiv(c, block["BLOCK_C"]), n),
        x, result, packed(weight), scale, shift, *(partials or [None] * 3), *(norm or Norm())[:5], None, None,
        slots, *x.shape[2:], *result.shape[2:], c // block["VECTOR"], stride, dilation,
        K=weight.shape[-1], TRANSPOSED=False, ACTIVATION=activation,
        IN_ACTIVATION=norm.activation if norm else "none", **block, **config,
    )  # fmt: skip
    return result, partials


def depthwise_conv_rates(x: Tensor, rates: Sequence[Rate], stride: int, activation: str) -> list[Tensor]:
    """x: (N, C, H, W) in packed channels-last memory; rates: weight, scale, shift and dilation of each result."""
    results: list[Tensor] = []
    rates = [(weight, *(v if v is None else v.contiguous() for v in affine), d) for weight, *affine, d in rates]
    if rates[0][0].shape[-1] > LARGEST:
        return [_run_gather(x, rate, stride, activation, False)[0] for rate in rates]
    for i in range(0, len(rates), MOST_RATES):
        results += _run_rows(x, rates[i : i + MOST_RATES], stride, activation, False)[0]
    return results


def depthwise_conv(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, dilation: int, activation: str
) -> Tensor:
    return depthwise_conv_rates(x, [(weight, scale, shift, dilation)], stride, activation)[0]


def depthwise_conv_statistics(
    x: Tensor, weight: Tensor, stride: int, dilation: int, norm: Norm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and its mean and biased variance (C,) in fp32; with norm of z, which is made of x as x is loaded."""
    rate = weight, None, None, dilation
    if weight.shape[-1] > LARGEST:
        y, partials = _run_gather(x, rate, stride, "none", True, norm)
    else:
        (y,), partials = _run_rows(x, [rate], stride, "none", True, norm)
    if x.shape[0] == 0:
        return y, *(x.new_full((x.shape[1],), math.nan, dtype=torch.float32) for _ in range(2))
    return y, *_merged(partials)

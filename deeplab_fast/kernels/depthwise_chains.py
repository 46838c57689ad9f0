"""How kernels of depthwise convolutions cut an image: chains of rows, tiles of columns, blocks of channels.

Rows of the result that lie STEP = dilation / gcd(dilation, stride) apart read each other's taps: a chain. A thread has
16 bytes of channels of one column of a chain, takes SPAN of its rows at once and reads a row of x for all the results
that want it, (SPAN + 2) * 3 loads for SPAN results of a 3 x 3 kernel. Of the three loads of a row two find the
neighbours' columns in the first-level cache: above PHASED, columns are taken in the order 0, STEP, 2 STEP, ..., 1,
1 + STEP, ..., neighbours one tap apart.
A program has BLOCK_W columns of PIECES times SPAN rows, in TILES places, and takes weights and divisions once for all.
Where it has its chain to the end, taps in rows outside the image are no code; nor are those in columns where the
dilation reaches the width. A tap that is outside for some of the pixels multiplies a zero there, as torch's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .batch_norm_act import affine
from .common import narrow

PHASED = 4  # the longest step whose columns stay in their own order: a tile and the taps beside it overlap enough
LARGER = 32 if common.INTERPRET else 1  # programs, in the interpreter, whose time goes by their number


@triton.jit
def place(groups, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's image, place in it, and channels [1, BLOCK_C] of how many."""
    channels = groups * VECTOR
    blocks = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks
    c = (tl.program_id(0) - tile * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return tl.program_id(1).to(tl.int64), tile, channels, c


@triton.jit
def pixels(tile, slots, width, STEP: tl.constexpr, PHASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """A tile's slots: the first of a part's ROWS rows, the column, and whether there is one, each [BLOCK_W, 1]."""
    slot = tile * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    part = slot // width
    column = slot - part * width
    if STEP > PHASED:
        shorter = width // STEP  # columns of the later phases; the first width % STEP have one more
        ahead = (width % STEP) * (shorter + 1)
        early = column < ahead
        rest = tl.where(early, column, column - ahead)
        size = tl.where(early, shorter + 1, tl.maximum(shorter, 1))
        phase = rest // size
        column = tl.where(early, phase, width % STEP + phase) + (rest - phase * size) * STEP
    return part % STEP + (part // STEP) * (STEP * ROWS), column, slot < slots


@triton.jit
def load_weights(weight, c, channels, K: tl.constexpr, FLIP: tl.constexpr, BLOCK_W: tl.constexpr):
    """The taps of weight [K * K, C] in fp32, each for every pixel: loaded in the layout in which x is."""
    c = tl.broadcast_to(c, (BLOCK_W, c.shape[1]))
    taps = ()
    for i in tl.static_range(K * K):
        at = weight + (K * K - 1 - i if FLIP else i) * channels + c
        taps = taps + (tl.load(at, mask=c < channels, other=0).to(tl.float32),)
    return taps


@triton.jit
def columns_of(column, width, there, DILATION: tl.constexpr, REACH: tl.constexpr):
    """For each column of taps, where it is inside the image."""
    inside = ()
    for b in tl.static_range(-REACH, REACH + 1):
        at = column + b * DILATION
        inside = inside + (there & (at >= 0) & (at < width),)
    return inside


@triton.jit
def load_norm(mean, var, weight, bias, eps, c, channels, BLOCK_W: tl.constexpr):
    """(mean, rstd, scale, shift) [BLOCK_W, BLOCK_C] of z = x * scale + shift.

    The shift is rounded once, as if the mean were moved by half its last bit: no more than its own sum left it off.
    """
    c = tl.broadcast_to(c, (BLOCK_W, c.shape[1]))
    mean, rstd, scale, shift = affine(mean, var, weight, bias, c, c < channels, eps)
    return mean, rstd, scale, shift - mean * scale


@triton.jit
def normalised(value, scale, shift, inside, ACTIVATION: tl.constexpr):
    """z of x as it was loaded, in fp32; 0 where it is not inside, [BLOCK_W, 1]: one mask for a thread's channels."""
    z = value.to(tl.float32) * scale + shift
    if ACTIVATION != "none":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":  # both in one instruction
        z = tl.minimum(z, tl.where(inside, 6.0, 0.0), propagate_nan=tl.PropagateNan.ALL)
    else:
        z = tl.where(inside, z, 0.0)
    return z


@triton.jit
def gate(grad, value, inside, mean, scale, shift, sum_grad, product, ACTIVATION: tl.constexpr):
    """grad where x is inside and the activation let z pass, and the sums with it and it times x - mean added."""
    value = value.to(tl.float32)
    if ACTIVATION != "none":
        z = value * scale + shift
        inside = (z > 0.0) & (z < tl.where(inside, 6.0 if ACTIVATION == "relu6" else float("inf"), -1.0))
    grad = tl.where(inside, grad, 0.0)
    return grad, sum_grad + grad, product + grad * (value - mean)


@triton.jit
def save_sums(sums, part, sum_grad, product, rstd, channels, c, WIDTH: tl.constexpr):
    """The last two of WIDTH rows of a part: sum_grad and sum_grad_xhat."""
    to = sums + (part * WIDTH + (WIDTH - 2)) * channels + c
    tl.store(to, tl.sum(sum_grad, 0, keep_dims=True), mask=c < channels)
    tl.store(to + channels, tl.sum(product * rstd, 0, keep_dims=True), mask=c < channels)


@triton.jit
def finish(total, scale, shift, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    if scale is not None:
        total = total * scale
    if shift is not None:
        total = total + shift
    if ACTIVATION != "none":
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        total = tl.minimum(total, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return narrow(total, DTYPE)


@triton.jit
def moments(results, row, pixel, height, STEP: tl.constexpr, ROWS: tl.constexpr):
    """Count, and mean and sum of squared deviations [1, BLOCK_C], of a tile's results as they were rounded."""
    count = tl.zeros((1, 1), tl.float32)
    total = tl.zeros(results[0].shape, tl.float32)
    for j in tl.static_range(ROWS):
        live = pixel & (row + j * STEP < height)
        count += tl.sum(live.to(tl.float32), 0, keep_dims=True)
        total += tl.where(live, results[j].to(tl.float32), 0)
    mean = tl.sum(total, 0, keep_dims=True) / tl.maximum(count, 1)
    square = tl.zeros(results[0].shape, tl.float32)
    for j in tl.static_range(ROWS):
        deviation = results[j].to(tl.float32) - mean
        square += tl.where(pixel & (row + j * STEP < height), deviation * deviation, 0)
    return count, mean, tl.sum(square, 0, keep_dims=True)


@triton.jit
def save_moments(counts, means, squares, index, channels, c, count, mean, square):
    tl.store(counts + index + tl.zeros_like(count).to(tl.int32), count)
    tl.store(means + index * channels + c, mask=c < channels, value=mean)
    tl.store(squares + index * channels + c, mask=c < channels, value=square)


@triton.jit
def add(sums, AT: tl.constexpr, term):
    return sums[:AT] + (sums[AT] + term,) + sums[AT + 1 :]


@triton.jit
def convolve(
    at, row, height, inside, row_pitch, column_pitch, weights, scale, shift, in_scale, in_shift, bounds,
    DILATION: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HALO: tl.constexpr,
    REACH: tl.constexpr, ACTIVATION: tl.constexpr, IN_ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """ROWS results of a chain, in DTYPE; with in_scale of `normalised` x.

    at: where the middle tap of the first is in x, in row `row`; pitches: of one dilation
    inside, bounds: `columns_of` what is loaded, and of the image, [BLOCK_W, 1]
    RATIO: rows of x, in dilations, between two results; HALO: rows of x before the first and after the last
    AHEAD: rows that are on their way while one is used
    """
    LAST: tl.constexpr = (ROWS - 1) * RATIO + HALO
    R: tl.constexpr = K // 2
    window, sums, results = (), (), ()
    for t in tl.static_range(-HALO, LAST + 1 + AHEAD):
        if t <= LAST:
            live = (row + t * DILATION >= 0) & (row + t * DILATION < height)
            for b in tl.static_range(-REACH, REACH + 1):
                tap = at + (t * row_pitch + b * column_pitch)
                window = window + (tl.load(tap, mask=live & inside[b + REACH], other=0),)
        if t - AHEAD >= -HALO:
            for b in tl.static_range(-REACH, REACH + 1):
                value = window[(t - AHEAD + HALO) * (2 * REACH + 1) + b + REACH].to(tl.float32)
                if in_scale is not None:
                    used = row + (t - AHEAD) * DILATION
                    there = bounds[b + REACH] & (used >= 0) & (used < height)
                    value = normalised(value, in_scale, in_shift, there, IN_ACTIVATION)
                for j in tl.static_range(ROWS):
                    if t - AHEAD - j * RATIO >= -R and t - AHEAD - j * RATIO <= R:
                        term = value * weights[(t - AHEAD - j * RATIO + R) * K + b + R]
                        sums = sums + (term,) if len(sums) == j else add(sums, j, term)
            for j in tl.static_range(ROWS):
                if t - AHEAD == j * RATIO + R or (t - AHEAD == LAST and j * RATIO + R > LAST):
                    results = results + (finish(sums[j], scale, shift, ACTIVATION, DTYPE),)
    return results


class Norm(NamedTuple):
    """What is applied to x as it is loaded, act((x - mean) * rsqrt(var + eps) * weight + bias); (C,) fp32 each."""

    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    activation: str = "none"


class Plan(NamedTuple):
    """How an image is cut into programs; see the top of this file."""

    block: dict[str, int]  # VECTOR, BLOCK_C, BLOCK_W
    chains: dict[str, int]  # RATIO, STEP, SPAN, PIECES, TILES, HALO
    slots: int  # of an image: its columns times the parts of its chains
    programs: int  # of a block of channels of an image
    grid: tuple[int, int]


def plan(
    x: Tensor, out_size: tuple[int, int], k: int, stride: int, dilations: Sequence[int], config: dict[str, int]
) -> Plan:
    """Takes BLOCK_C, SPAN, REGION and PROGRAMS out of config: a program has up to REGION rows, in pieces of up to SPAN
    rows and then in several tiles, where there are PROGRAMS programs with so many."""
    (n, c, _, _), (height, width) = x.shape, out_size
    block = blocks(c, x.dtype, config.pop("BLOCK_C"), config["num_warps"])
    step = math.gcd(*(d // math.gcd(d, stride) for d in dilations))
    ratio = stride // math.gcd(stride, dilations[0])
    across, most = common.cdiv(c, block["BLOCK_C"]), config.pop("SPAN")
    rows = n * across * common.cdiv(height * width, block["BLOCK_W"])
    region = max(most, min(config.pop("REGION"), rows // config.pop("PROGRAMS")))
    chain = common.cdiv(height, step)
    parts = common.cdiv(chain, most if ratio < max(k, 2) else 1)
    span = common.cdiv(chain, parts)
    parts = common.cdiv(chain, span)
    halo = k // 2 if parts > 1 or ratio > 1 else 0
    pieces = common.cdiv(parts, common.cdiv(parts, max(1, region // span)))
    parts = common.cdiv(parts, pieces)
    slots = (parts * step if parts > 1 else min(step, height)) * width
    tiles = max(1, min(region // (span * pieces), common.cdiv(slots, block["BLOCK_W"])))
    programs = common.cdiv(slots, block["BLOCK_W"] * tiles)
    chains = {"RATIO": ratio, "STEP": step, "SPAN": span, "PIECES": pieces, "TILES": tiles, "HALO": halo}
    return Plan(block, chains, slots, programs, (programs * across, n))


def blocks(channels: int, dtype: torch.dtype, widest: int, num_warps: int) -> dict[str, int]:
    """VECTOR, BLOCK_C and BLOCK_W: a thread holds 16 bytes of one pixel, and no more than 1 channel in 8 is none."""
    vector = 16 // dtype.itemsize
    block = LARGER * widest
    while block > vector and common.cdiv(channels, block) * block > (1.125 if LARGER == 1 else 2) * channels:
        block //= 2
    threads = 32 * num_warps * LARGER
    return {
        "VECTOR": math.gcd(channels, vector),
        "BLOCK_C": block,
        "BLOCK_W": max(1, threads * vector // block),
    }


def packed(weight: Tensor) -> Tensor:
    """(C, 1, k, k) as (k * k, C): itself where it lies in memory so, else a copy in fp32, which saves conversions."""
    taps = weight.flatten(1).t()
    if taps.is_contiguous():
        return taps
    return torch.empty(taps.shape, dtype=torch.float32, device=taps.device).copy_(taps)

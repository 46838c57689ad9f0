"""Batch norm's passes forward: the statistics of x, and y = act((x - mean) * rsqrt(var + eps) * weight + bias + r).

x is a matrix (pixels, channels) in packed channels-last memory; a program takes ROWS pixels of BLOCK channels, 16 bytes
a thread. With T the bytes of x, the statistics move T, and y 2 T, 3 T with a residual. Memory should bind: Welford's
update is five instructions an element, and a Hopper chip issues about fifteen in the time of an element of bf16.

Statistics take two launches. A few programs per multiprocessor go through x in strides and leave (count, mean, squared
deviations) of their pixels; one small launch merges these in a fixed order. How many there are depends on the shape and
the chip alone, so two runs agree bit for bit. No sum of squares is taken, only of deviations from a mean, which fp32
loses nothing of where the mean is far from zero.

Sources: Welford, "Note on a method for calculating corrected sums of squares and products"; Chan, Golub, LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", for the merge.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

OP = "batch_norm_act"
MULTIPROCESSORS = 132  # where there is no device to ask: in the interpreter, and compiled ahead of time
SECTORS = 64  # bytes of a row that a program takes at least: two sectors of the cache


@triton.jit
def channel_block(block, channels, BLOCK: tl.constexpr):
    c = block * BLOCK + tl.arange(0, BLOCK)
    return c, c < channels


@triton.jit
def affine(mean, var, weight, bias, c, inside, eps):
    """(center, rstd, scale, shift) of z = (x - center) * scale + shift; without mean, weight and bias are all of it."""
    scale = tl.load(weight + c, mask=inside, other=0.0)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + c, mask=inside, other=0.0)
    center = tl.zeros_like(scale)
    rstd = center + 1.0
    if mean is not None:
        center = tl.load(mean + c, mask=inside, other=0.0)
        rstd = tl.rsqrt(tl.load(var + c, mask=inside, other=1.0) + eps)
        scale *= rstd
    return center, rstd, scale, shift


@triton.jit
def merged(count, mean, squares):
    """Chan's formula for all rows at once: (count, mean, squared deviations) of each column. No rows: zeros."""
    n = tl.sum(count, 0)
    whole = tl.sum(count * mean, 0) / tl.maximum(n, 1.0)
    d = mean - whole[None, :]
    return n, whole, tl.sum(squares + count * d * d, 0)


@triton.jit
def _statistics(
    x,  # (pixels, channels)
    partials,  # (groups, 3, channels) fp32
    pixels,
    vectors,
    groups,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    channels = vectors * VEC
    blocks = tl.cdiv(channels, BLOCK)
    group = tl.program_id(0) // blocks
    c, inside = channel_block(tl.program_id(0) % blocks, channels, BLOCK)
    row = tl.arange(0, ROWS)
    offsets = row[:, None] * channels + c[None, :]
    start = group.to(tl.int64) * ROWS
    count = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    steps = 0.0
    for _ in tl.range(group, tl.cdiv(pixels, ROWS), groups, num_stages=STAGES):
        here = row < pixels - start
        valid = here[:, None] & inside[None, :]
        value = tl.load(x + start * channels + offsets, mask=valid, other=0.0).to(tl.float32)
        steps += 1.0
        count += here.to(tl.float32)
        d = tl.where(valid, value - mean, 0.0)
        mean += d * (1.0 / steps)
        squares += d * (value - mean)
        start += groups * ROWS
    n, whole, deviations = merged(count[:, None], mean, squares)
    at = partials + group * 3 * channels + c
    tl.store(at, tl.zeros([BLOCK], tl.float32) + n, mask=inside)
    tl.store(at + channels, whole, mask=inside)
    tl.store(at + 2 * channels, deviations, mask=inside)


@triton.jit
def _merge(
    partials,  # (parts, 3, channels)
    mean,
    var,
    parts,
    channels,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c, inside = channel_block(tl.program_id(0), channels, BLOCK)
    part = tl.arange(0, PARTS)
    n = tl.zeros([PARTS, BLOCK], tl.float32)
    m = tl.zeros([PARTS, BLOCK], tl.float32)
    s = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        at = partials + (start + part)[:, None] * 3 * channels + c[None, :]
        valid = (start + part < parts)[:, None] & inside[None, :]
        count = tl.load(at, mask=valid, other=0.0)
        d = tl.load(at + channels, mask=valid, other=0.0) - m
        both = n + count
        share = count / tl.maximum(both, 1.0)
        d = tl.where(count > 0, d, 0.0)
        m += d * share
        s += tl.load(at + 2 * channels, mask=valid, other=0.0) + d * d * (n * share)
        n = both
    n, m, s = merged(n, m, s)
    empty = float("nan")
    tl.store(mean + c, tl.where(n > 0, m, empty), mask=inside)
    tl.store(var + c, tl.where(n > 0, s / tl.maximum(n, 1.0), empty), mask=inside)


@triton.jit
def _forward(
    x,
    residual,
    mean,
    var,
    weight,
    bias,
    y,
    pixels,
    vectors,
    eps,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = vectors * VEC
    blocks = tl.cdiv(channels, BLOCK)
    # From the end: what the statistics read last is still in the second-level cache.
    tile = tl.cdiv(pixels, ROWS) - 1 - tl.program_id(0) // blocks
    c, inside = channel_block(tl.program_id(0) % blocks, channels, BLOCK)
    start = tile.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    valid = (row < pixels - start)[:, None] & inside[None, :]
    offsets = row[:, None] * channels + c[None, :]
    center, _, scale, shift = affine(mean, var, weight, bias, c, inside, eps)
    value = tl.load(x + start * channels + offsets, mask=valid, other=0.0).to(tl.float32)
    z = (value - center[None, :]) * scale[None, :] + shift[None, :]
    if residual is not None:
        z += tl.load(residual + start * channels + offsets, mask=valid, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        z = tl.where(z < 0.0, 0.0, z)  # NaN stays
    if ACTIVATION == "relu6":
        z = tl.where(z > 6.0, 6.0, z)
    tl.store(y + start * channels + offsets, common.narrow(z, y.dtype.element_ty), mask=valid)


class Tiling(NamedTuple):
    """How a kernel goes over (pixels, channels): grids, and the arguments that say it to the kernel."""

    tiles: int  # of ROWS pixels
    blocks: int  # of BLOCK channels
    programs: int  # per multiprocessor; 0 for a kernel that has one for each tile
    sizes: tuple[int, int]  # pixels, vectors
    constants: dict[str, Any]

    @property
    def groups(self) -> int:
        """Into how many sums a reduction splits the pixels."""
        return min(self.tiles, max(1, self.programs // self.blocks))


def tiling(case: str, x: Tensor) -> Tiling:
    """By tuned.json's TILE (elements), CHANNELS (at most in a block) and, of a reduction, PROGRAMS."""
    given = common.configuration(OP, case, x)
    n, channels, h, w = x.shape
    elements, widest, programs = given.pop("TILE"), given.pop("CHANNELS"), given.pop("PROGRAMS", 0)
    block = _channels_of_a_block(channels, widest, SECTORS // x.element_size())
    # Channels as a multiple of a constant: so the compiler knows rows to start at 16 bytes, at any such multiple.
    vec = math.gcd(channels, 16 // x.element_size())
    rows, pixels = elements // block, n * h * w
    constants = {"VEC": vec, "ROWS": rows, "BLOCK": block, **given}
    programs *= _multiprocessors(x.device)
    return Tiling(
        common.cdiv(pixels, rows), common.cdiv(channels, block), programs, (pixels, channels // vec), constants
    )


def _channels_of_a_block(channels: int, widest: int, narrowest: int) -> int:
    """A power of two: that of least padding, then the widest."""
    found = min(widest, triton.next_power_of_2(channels))
    block = found // 2
    while block >= narrowest:
        if common.cdiv(channels, block) * block < common.cdiv(channels, found) * found:
            found = block
        block //= 2
    return found


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def partial_statistics(x: Tensor) -> Tensor:
    """(parts, 3, C) fp32: count, mean and squared deviations of disjoint groups of x's pixels; x packed."""
    tiles = tiling("statistics", x)
    partials = x.new_empty((tiles.groups, 3, x.shape[1]), dtype=torch.float32)
    common.launch(
        _statistics, (tiles.groups * tiles.blocks,), x, partials, *tiles.sizes, tiles.groups, **tiles.constants
    )
    return partials


def merge_statistics(partials: Tensor) -> tuple[Tensor, Tensor]:
    """mean and biased variance (C,) of what `partials` (parts, 3, C) count; NaN where they count nothing.

    For synchronised batch norm the message of a process is (n, mean, n * var), one row (3, C) with the n pixels of its
    own x: all of them gathered are (processes, 3, C), and this function gives every process the statistics of the
    whole, merged in the order of the ranks. A process without pixels sends zeros.
    """
    given = common.configuration(OP, "merge", partials)
    parts, _, channels = partials.shape
    mean, var = (partials.new_empty(channels) for _ in range(2))
    common.launch(_merge, (common.cdiv(channels, given["BLOCK"]),), partials, mean, var, parts, channels, **given)
    return mean, var


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and biased variance (C,) fp32 of x (N, C, H, W), packed; NaN where x is empty."""
    return merge_statistics(partial_statistics(x))


def forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """y like x; x and residual packed, what is per channel contiguous fp32. Without mean and var: x * weight + bias."""
    tiles, y = tiling("forward", x), like(x)
    tensors = (x, residual, mean, var, weight, bias, y)
    common.launch(
        _forward, (tiles.tiles * tiles.blocks,), *tensors, *tiles.sizes, eps, ACTIVATION=activation, **tiles.constants
    )
    return y

"""Depthwise 3x3 and pointwise product in one kernel: the depthwise result goes from registers to the matrix unit.

A program owns BLOCK_P pixels of y and BLOCK_M of its channels. In steps of BLOCK_C channels it computes the depthwise
result in fp32, rounds it to x's dtype, and multiplies it by the pointwise weights, while the next step begins. M up to
BLOCK_M: the depthwise result is computed once; beyond, once for every BLOCK_M of M.

Bytes: x is read and y written once. Out of the second-level cache come also x again for the edges of the tiles, and
C * M weights for each tile. For every multiplication of the product there are 9 / M of the depthwise pass and as many
conversions, on units an order of magnitude slower: at M = 256 these and the weights, not the matrix unit, should bind.
Tiles of 128 pixels would read the weights half as often; with all of M = 256 their sums leave too few registers for the
depthwise pass, which then spills.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import INTERPRET, narrow

BLOCK = tl.constexpr(128)  # of what `_prepare` writes


@triton.jit
def _class_of(index, size, each, CLASSES: tl.constexpr):
    """Deals 0 .. size - 1, each of them `each` long, into residue classes modulo CLASSES, class after class.

    Returns the class that `index` falls into, the index inside it, and how many the class has.
    """
    few, more = size // CLASSES, size % CLASSES  # the first `more` classes have one more
    first = more * (few + 1) * each
    large = index < first
    inside = tl.where(large, index, index - first)
    members = tl.where(large, few + 1, few)
    number = inside // tl.maximum(members * each, 1)
    return tl.where(large, number, number + more), inside - number * members * each, members


@triton.jit
def _prepare(
    weight, scale, packed, order,
    C, pixels, height, width, CLASSES: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The depthwise weights as the product wants them, and the order in which its tiles take the pixels of a map.

    packed: weight (C, 3, 3) times scale (C) as (9, C) fp32, so that the channels of a tap lie together
    order: (pixels) of y, each once. Map by map; in a map, pixels CLASSES apart, both ways, form a dense grid that the
    taps do not leave: one grid after the other, each in strips of STRIP columns, row by row. So the pixels of a tile
    share their taps, whatever the dilation.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < C
    factor = 1.0 if scale is None else tl.load(scale + index, valid)
    for tap in tl.static_range(9):
        value = tl.load(weight + index * 9 + tap, valid).to(tl.float32)
        tl.store(packed + tap * C + index, value * factor, valid)

    valid = index < pixels
    image = index // (height * width)
    row, inside, down = _class_of(index - image * height * width, height, width, CLASSES)
    column, inside, across = _class_of(inside, width, down, CLASSES)
    strip = inside // tl.maximum(down * STRIP, 1)
    inside -= strip * down * STRIP
    strip_width = tl.maximum(tl.minimum(across - strip * STRIP, STRIP), 1)
    line = inside // strip_width
    row += line * CLASSES
    column += (strip * STRIP + inside - line * strip_width) * CLASSES
    tl.store(order + index, (image * height + row) * width + column, valid)


@triton.jit
def _widen(x):
    """fp32. bf16 by its bits, one instruction each: the compiler's own conversion of every second one takes two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """none, relu or relu6; NaN stays."""
    if ACTIVATION != "none":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _separable_conv(
    x, packed, depthwise_shift, pointwise, scale, shift, order, y,
    pixels, M, height, width, out_height, out_width, y_pixel,
    DEPTHWISE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN_C: tl.constexpr, EVEN_M: tl.constexpr,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x (N, height, width, C), pointwise (M, C), y (N, out_height, out_width, M), its pixels y_pixel apart; the rest
    from `_prepare`. ROWS, COLUMNS: 0 where the taps above and below, left and right are all outside, else 1.

    C is a constant: were it possible that the loop never runs, the sums would be copied behind it, and ptxas would wait
    for the matrix unit at every step; and the offsets of the taps fold into the loads.
    """
    dtype = x.dtype.element_ty
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = p < pixels
    pixel = tl.load(order + p, there, 0)  # beyond the last pixel: the first, which is not stored again
    line = pixel // out_width
    image = line // out_height
    row = (line - image * out_height) * STRIDE
    column = (pixel - line * out_width) * STRIDE
    c = tl.arange(0, BLOCK_C)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    middle = ((image.to(tl.int64) * height + row) * width + column)[:, None] * C + c[None, :]
    weights = pointwise + m[:, None] * C + c[None, :]
    product = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for start in range(0, C, BLOCK_C):
        valid = c < C - start
        if EVEN_C and EVEN_M:
            weight = tl.load(weights + start)
        else:
            weight = tl.load(weights + start, (m[:, None] < M) & valid[None, :], 0.0)
        operand = tl.zeros((BLOCK_P, BLOCK_C), dtype)
        # Always so. Loads under a condition are not staged in shared memory, as those of the weights are: there is no
        # room for nine taps, and they are read once.
        if start < C:
            tile = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            if depthwise_shift is not None:
                tile += tl.load(depthwise_shift + start + c, valid, 0.0)[None, :]
            for i in tl.static_range(-ROWS, ROWS + 1):
                for j in tl.static_range(-COLUMNS, COLUMNS + 1):
                    down, right = i * DILATION, j * DILATION
                    inside = (row + down >= 0) & (row + down < height)
                    inside &= (column + right >= 0) & (column + right < width)
                    at = x + start + (down * width + right) * C + middle
                    factor = packed + ((i + 1) * 3 + j + 1) * C + start + c
                    if EVEN_C:
                        tile = tl.fma(_widen(tl.load(at, inside[:, None], 0.0)), tl.load(factor)[None, :], tile)
                    else:
                        value = _widen(tl.load(at, inside[:, None] & valid[None, :], 0.0))
                        tile = tl.fma(value, tl.load(factor, valid, 0.0)[None, :], tile)
            operand = narrow(_activate(tile, DEPTHWISE_ACTIVATION), dtype)
        if INTERPRET:
            operand, weight = operand.to(tl.float32), weight.to(tl.float32)
        product = tl.dot(operand, tl.trans(weight), product, input_precision="ieee")
    if scale is not None:
        product *= tl.load(scale + m, m < M, 0.0)[None, :]
    if shift is not None:
        product += tl.load(shift + m, m < M, 0.0)[None, :]
    # Looked up again, rather than held in registers all along.
    to = tl.load(order + p, there, 0).to(tl.int64)[:, None] * y_pixel + m[None, :]
    tl.store(y + to, narrow(_activate(product, ACTIVATION), dtype), there[:, None] & (m[None, :] < M))


def separable_conv(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_shift: Tensor | None,
    depthwise_activation: str,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dilation: int,
    stride: int,
    y: Tensor,
) -> None:
    """Writes y (N, M, H', W'), channels-last, or a slice of the channels of such a tensor.

    x: (N, C, H, W), channels-last; depthwise_weight: (C, 1, 3, 3); pointwise_weight: (M, C); the vectors: fp32.
    All of these are contiguous.
    """
    (n, c, height, width), (m, out_height, out_width) = x.shape, y.shape[1:]
    pixels = n * out_height * out_width
    if n == 0:
        return
    tuned = common.configuration("separable_conv", "tile", x)
    block_p, strip = tuned["BLOCK_P"], tuned.pop("STRIP")
    tuned["BLOCK_M"] = block_m = min(tuned["BLOCK_M"], max(16, triton.next_power_of_2(m)))
    tuned["BLOCK_C"] = block_c = min(tuned["BLOCK_C"], max(16, triton.next_power_of_2(c)))
    packed = torch.empty((9, c), dtype=torch.float32, device=x.device)
    order = torch.empty(pixels, dtype=torch.int32, device=x.device)
    common.launch(
        *(_prepare, (common.cdiv(max(c, pixels), BLOCK.value),), depthwise_weight, depthwise_scale, packed),
        *(order, c, pixels, out_height, out_width),
        **{"CLASSES": dilation // math.gcd(dilation, stride), "STRIP": strip, "num_warps": 4},
    )
    common.launch(
        *(_separable_conv, (common.cdiv(pixels, block_p), common.cdiv(m, block_m))),
        *(x, packed, depthwise_shift, pointwise_weight, scale, shift, order, y),
        *(pixels, m, height, width, out_height, out_width, y.stride(3)),
        DEPTHWISE_ACTIVATION=depthwise_activation,
        ACTIVATION=activation,
        DILATION=dilation,
        STRIDE=stride,
        ROWS=int(dilation < height),
        COLUMNS=int(dilation < width),
        C=c,
        EVEN_C=c % block_c == 0,
        EVEN_M=m % block_m == 0,
        **tuned,
    )

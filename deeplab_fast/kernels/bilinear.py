"""The taps of a bilinearly resized axis, for the kernels of every op that resizes: csrc/bilinear.h in Triton.

Cell i of an axis is what lies between position i of the source and position i + 1: the output's positions in it are
consecutive and read these two. There are cells -1 .. source - 1; of the first and of the last both positions are one.
Cell -1 is empty with align_corners and where the axis keeps its size.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import NamedTuple

import triton
import triton.language as tl


class Axis(NamedTuple):
    scale: float  # the source's step for one step in the output, as F.interpolate with a size has it
    inverse: float  # the output's step for one step in the source
    most: int  # positions of the output in one cell, at most


@functools.lru_cache(1024)
def axis(source: int, output: int, align_corners: bool) -> Axis:
    if source == output:
        return Axis(1.0, 1.0, 1)
    scale = source / output
    if align_corners:
        scale = (source - 1) / (output - 1) if output > 1 else 0.0
    # In fp32 a position may move over the edge of its cell, unless all its products are exact.
    slack = 0.0 if output <= 4096 and (scale * 1024).is_integer() else source * 2.0**-20
    count: Counter[int] = Counter()
    for position in range(output):
        at = scale * position if align_corners else scale * (position + 0.5) - 0.5
        count.update({math.floor(at - slack), math.floor(at + slack)})
    return Axis(scale, 1 / scale if scale else float(output), max(count.values()))


# HALF is 0.5, and 0.0 with align_corners: the source's coordinate of an output position is (position + HALF) * scale -
# HALF, as in torch.


@triton.jit
def first_of_cell(cell, output, inverse, HALF: tl.constexpr):
    """The output's first position in this cell or a later one; `output` where there is none.

    Where rounding puts a position into the cell beside its own, it is at that cell's edge, and reads the same.
    """
    edge = tl.ceil((cell + HALF) * inverse - HALF)
    return tl.minimum(tl.maximum(edge, 0.0), output).to(tl.int32)


@triton.jit
def weight_high(position, cell, scale, HALF: tl.constexpr):
    """The weight of the cell's second position; in cell -1 that is position 1, with 0, as torch reads it."""
    at = (position + HALF) * scale - HALF - cell
    return tl.where(cell < 0, 0.0, tl.minimum(tl.maximum(at, 0.0), 1.0))


@triton.jit
def share_high(position, cell, source, output, scale, HALF: tl.constexpr):
    """What position cell + 1 of the source takes of a gradient; position `cell` takes the rest."""
    at = tl.minimum(tl.maximum((position + HALF) * scale - HALF - cell, 0.0), 1.0)
    at = tl.where((cell >= source - 1) | (source == output), 0.0, at)
    return tl.where(cell < 0, 1.0, at)

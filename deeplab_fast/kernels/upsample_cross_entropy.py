"""upsample_cross_entropy and its gradient on a GPU: bound by arithmetic; no upsampled logit leaves a register.

A thread holds one position of a cell (see bilinear.py), a program BLOCK_CELLS x BLOCK_POSITIONS of them. Classes and a
cell's rows lie within the thread: the softmax takes no exchange between lanes. The logits of a tile are read once, in
order of memory, spread over the lanes through shared memory, and interpolated along the row once for all its rows.

Losses: blocks of BLOCK_K classes, one after another, with a running maximum and sum (Milakov & Gimelshein, "Online
normalizer calculation for softmax"), so that 150 classes take the registers of 8. About 11 instructions and 1.1
exponentials a class and pixel. Each program writes three partial sums, which one more program adds in order.

Gradient: a program owns BLOCK_CELLS - 1 columns, ROWS rows and BLOCK_K classes of the logits. It walks down the cells'
rows and adds p - onehot, each lane for itself, to the row above and the row below; a row that is complete is reduced
over the lanes to the two columns of each cell and written, once. No atomics. About 10 instructions and 1 exponential,
(ROWS + 1) / ROWS times for the cells that two programs share.

The logarithm of each pixel's sum is kept between the two, 4 bytes a pixel written and, by each block of classes, read.
Without it the gradient would run the losses' loop again in each block of classes: 3 times for 19 classes, 11
instructions a class against one load of 4 bytes for 8 classes.
    8 x 19 x 128 x 256 in bf16 to 512 x 1024: 80 M class-pixels, 1.7 G instructions of 32 lanes / 32 = 75 us of the
    H200's issue slots, 170 M exponentials 45 us beside them; 10 MB of logits and 4 of labels read, 17 of logarithms
    written and read, 20 of gradient written: 16 us at 4.3 TB/s. Memory at most 37 MB, logarithms and gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .bilinear import Axis, axis, first_of_cell, share_high, weight_high

OP = "upsample_cross_entropy"
MOST_POSITIONS = 32  # of a cell in one program
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tap(position, cell, source, output, scale, HALF: tl.constexpr):
    """The weight of the second of the two positions that a cell reads; where they are one, a half: not 0, which would
    make NaN of infinity."""
    both = (cell >= 0) & (cell < source - 1) & (source != output)
    return tl.where(both, weight_high(position, cell, scale, HALF), 0.5)


@triton.jit
def _second(cell, source, output):
    """The second position that a cell reads."""
    return tl.minimum(tl.maximum(cell + tl.where(source == output, 0, 1), 0), source - 1)


@triton.jit
def _interpolated(row, left, right, tap, k, CLASSES: tl.constexpr):
    """(BLOCK_K, BLOCK_CELLS, BLOCK_POSITIONS) in fp32 from one row of logits; 0 beyond the classes."""
    mask = (k < CLASSES)[:, None]
    at_left = tl.load(row + left[None, :] * CLASSES + k[:, None], mask, 0.0).to(tl.float32)
    at_right = tl.load(row + right[None, :] * CLASSES + k[:, None], mask, 0.0).to(tl.float32)
    return at_left[:, :, None] * (1.0 - tap)[None, :, :] + at_right[:, :, None] * tap[None, :, :]


@triton.jit
def _labels(target, at, inside, ignore_index, CLASSES: tl.constexpr):
    """Class or -1, and whether the label is neither a class nor ignore_index."""
    label = tl.load(target + at, inside, 0).to(tl.int64)
    known = (label >= 0) & (label < CLASSES)
    counted = inside & (label != ignore_index)
    return tl.where(known & counted, label, -1).to(tl.int32), counted & (known == 0)


@triton.jit
def _shares(label, weight, total, smoothing, CLASSES: tl.constexpr):
    """Of a pixel's loss: the weight of its class, (1 - e) of it, e / K, and the sum of the factors of all nll."""
    labelled = label >= 0
    if weight is None:
        chosen = tl.where(labelled, 1.0, 0.0)
        every = CLASSES * 1.0
    else:
        chosen = tl.load(weight + label, labelled, 0.0)
        every = 0.0 if total is None else tl.load(total)
    own = chosen * (1.0 - smoothing)
    each = tl.where(labelled, smoothing / CLASSES, 0.0)
    return chosen, own, each, own + each * every


@triton.jit
def _add_classes(
    largest, total, chosen, others, top, bottom, left, right, tap_x, tap_y, first, label, weight,
    CLASSES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds BLOCK classes to a pixel's largest logit (times log2 e), sum of exponentials, own logit, weighted sum."""
    k = first + tl.arange(0, BLOCK)
    upper = _interpolated(top, left, right, tap_x, k, CLASSES)
    lower = _interpolated(bottom, left, right, tap_x, k, CLASSES)
    tap_y = tap_y[None, :, None, None]
    x = upper[:, None, :, :] * (1.0 - tap_y) + lower[:, None, :, :] * tap_y
    k = k[:, None, None, None]
    if CLASSES % BLOCK != 0:
        x = tl.where(k < CLASSES, x, float("-inf"))
    new = tl.maximum(largest, tl.max(x, 0) * LOG2_E)
    shift = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(x * LOG2_E - shift[None, :, :, :]), 0)
    chosen += tl.sum(tl.where(k == label[None, :, :, :], x, 0.0), 0)
    if SMOOTH:
        if weight is not None:
            x *= tl.load(weight + k, k < CLASSES, 0.0)
        others += tl.sum(tl.where(k < CLASSES, x, 0.0), 0)
    return new, total, chosen, others


@triton.jit
def losses_kernel(
    logits, target, weight, weight_total, losses, logarithms, sums, counts, height, width, out_height, out_width,
    scale_y, inverse_y, scale_x, inverse_x, column_blocks, ignore_index, smoothing,
    CLASSES: tl.constexpr, HALF: tl.constexpr, SMOOTH: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    POSITION_BLOCKS: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CELLS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """logits (N, h, w, K) in memory, target (N, H, W); losses and logarithms (to base 2) (N, H, W) fp32 or None.

    sums (programs, 2) fp32: of the losses, of the labels' weights; counts (programs,) int32: labels out of range.
    Programs: N, h + 1 cells down, ROW_BLOCKS, column_blocks of cells, POSITION_BLOCKS.
    """
    pid = tl.program_id(0)
    item = pid // POSITION_BLOCKS
    cells = item % column_blocks * BLOCK_CELLS - 1 + tl.arange(0, BLOCK_CELLS)
    item = item // column_blocks
    row_block = item % ROW_BLOCKS
    item = item // ROW_BLOCKS
    row = item % (height + 1) - 1
    image = (item // (height + 1)).to(tl.int64)

    y = first_of_cell(row, out_height, inverse_y, HALF) + row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    begin = first_of_cell(cells, out_width, inverse_x, HALF) + pid % POSITION_BLOCKS * BLOCK_POSITIONS
    position = begin[:, None] + tl.arange(0, BLOCK_POSITIONS)[None, :]
    inside = (position < first_of_cell(cells + 1, out_width, inverse_x, HALF)[:, None])[None, :, :]
    inside = inside & (y < first_of_cell(row + 1, out_height, inverse_y, HALF))[:, None, None]
    pixel = ((image * out_height + y) * out_width)[:, None, None] + position[None, :, :]
    label, wrong = _labels(target, pixel, inside, ignore_index, CLASSES)

    tap_y = _tap(y, row, height, out_height, scale_y, HALF)
    tap_x = _tap(position, cells[:, None], width, out_width, scale_x, HALF)
    left = tl.minimum(tl.maximum(cells, 0), width - 1)
    right = _second(cells, width, out_width)
    top = logits + (image * height + tl.maximum(row, 0)) * width * CLASSES
    bottom = logits + (image * height + _second(row, height, out_height)) * width * CLASSES
    zero = tl.zeros((BLOCK_ROWS, BLOCK_CELLS, BLOCK_POSITIONS), tl.float32)
    largest, total, chosen, others = zero + float("-inf"), zero, zero, zero
    for first in range(0, CLASSES // BLOCK_K * BLOCK_K, BLOCK_K):
        largest, total, chosen, others = _add_classes(
            largest, total, chosen, others, top, bottom, left, right, tap_x, tap_y, first, label, weight,
            CLASSES, SMOOTH, BLOCK_K,
        )  # fmt: skip
    if TAIL > 0:
        largest, total, chosen, others = _add_classes(
            largest, total, chosen, others, top, bottom, left, right, tap_x, tap_y, CLASSES // BLOCK_K * BLOCK_K,
            label, weight, CLASSES, SMOOTH, TAIL,
        )  # fmt: skip
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    logarithm = shift + tl.log2(total)
    if logarithms is not None:
        tl.store(logarithms + pixel, logarithm, inside)
    label_weight, own, each, every = _shares(label, weight, weight_total, smoothing, CLASSES)
    # In this order what the largest was rounded by cancels: of a sure pixel the loss is 0, however large its logits.
    loss = own * LN_2 * ((shift - chosen * LOG2_E) + tl.log2(total))
    if SMOOTH:
        loss += (every - own) * (logarithm * LN_2) - each * others
    loss = tl.where(label >= 0, loss, 0.0)
    if losses is not None:
        tl.store(losses + pixel, loss, inside)
    if sums is not None:
        tl.store(sums + 2 * pid, tl.sum(loss))
        tl.store(sums + 2 * pid + 1, tl.sum(label_weight))
        tl.store(counts + pid, tl.sum(wrong.to(tl.int32)))


@triton.jit
def finish_kernel(sums, counts, loss, weight_sum, out_of_range, programs, BLOCK: tl.constexpr):
    """The partial sums of all programs, by one."""
    total, weight = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, programs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(sums + 2 * i, i < programs, 0.0)
        weight += tl.load(sums + 2 * i + 1, i < programs, 0.0)
        count += tl.load(counts + i, i < programs, 0)
    tl.store(loss, tl.sum(total))
    tl.store(weight_sum, tl.sum(weight))
    tl.store(out_of_range, tl.sum(count))


@triton.jit
def _gradient(
    pid, first_class, logits, target, weight, weight_total, grad_loss, logarithms, grad, height, width, out_height,
    out_width, scale_y, inverse_y, scale_x, inverse_x, column_blocks, row_blocks, ignore_index, smoothing,
    CLASSES: tl.constexpr, HALF: tl.constexpr, SMOOTH: tl.constexpr, POSITION_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """BLOCK classes of one tile. Cell j - 1 gives to column j and to column j - 1: the first cell is a halo."""
    k = first_class + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK_CELLS)
    cells = pid % column_blocks * (BLOCK_CELLS - 1) - 1 + lane
    pid = pid // column_blocks
    first_row = pid % row_blocks * ROWS
    image = (pid // row_blocks).to(tl.int64)
    left = tl.minimum(tl.maximum(cells, 0), width - 1)
    right = _second(cells, width, out_width)
    before = tl.broadcast_to(tl.maximum(lane - 1, 0)[None, :], (BLOCK, BLOCK_CELLS))
    begin = first_of_cell(cells, out_width, inverse_x, HALF)
    end = first_of_cell(cells + 1, out_width, inverse_x, HALF)
    owned = (k < CLASSES)[:, None] & ((lane > 0) & (cells < width))[None, :]
    to = grad + image * height * width * CLASSES + cells[None, :] * CLASSES + k[:, None]
    class_weight = 1.0
    if SMOOTH and weight is not None:
        class_weight = tl.load(weight + k, k < CLASSES, 0.0)[:, None, None, None]

    for block in range(POSITION_BLOCKS):
        position = begin[:, None] + block * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[None, :]
        valid = position < end[:, None]
        tap_x = _tap(position, cells[:, None], width, out_width, scale_x, HALF)
        share_x = share_high(position, cells[:, None], width, out_width, scale_x, HALF)[None, :, :]
        carried = tl.zeros((BLOCK, BLOCK_CELLS, BLOCK_POSITIONS), tl.float32)  # from the cell above to its lower row
        for step in range(tl.where(height == out_height, 1, 0), tl.minimum(ROWS, height - first_row) + 1):
            row = first_row - 1 + step
            sum_upper, sum_lower = carried, tl.zeros((BLOCK, BLOCK_CELLS, BLOCK_POSITIONS), tl.float32)
            top = logits + (image * height + tl.maximum(row, 0)) * width * CLASSES
            bottom = logits + (image * height + _second(row, height, out_height)) * width * CLASSES
            # Lanes without a pixel compute with 0, not with what may be NaN.
            upper = tl.where(valid[None, :, :], _interpolated(top, left, right, tap_x, k, CLASSES), 0.0)
            lower = tl.where(valid[None, :, :], _interpolated(bottom, left, right, tap_x, k, CLASSES), 0.0)
            begin_y = first_of_cell(row, out_height, inverse_y, HALF)
            end_y = first_of_cell(row + 1, out_height, inverse_y, HALF)
            for start in range(0, end_y - begin_y, BLOCK_ROWS):
                y = begin_y + start + tl.arange(0, BLOCK_ROWS)
                inside = (y < end_y)[:, None, None] & valid[None, :, :]
                pixel = ((image * out_height + y) * out_width)[:, None, None] + position[None, :, :]
                label, _ = _labels(target, pixel, inside, ignore_index, CLASSES)
                _, own, each, every = _shares(label, weight, weight_total, smoothing, CLASSES)
                logarithm = tl.load(logarithms + pixel, label >= 0, float("inf"))
                if grad_loss is not None:
                    given = tl.load(grad_loss + pixel, label >= 0, 0.0)
                    own, each, every = own * given, each * given, every * given
                tap_y = _tap(y, row, height, out_height, scale_y, HALF)[None, :, None, None]
                x = upper[:, None, :, :] * (1.0 - tap_y) + lower[:, None, :, :] * tap_y
                g = tl.exp2(x * LOG2_E - logarithm[None, :, :, :]) * every[None, :, :, :]
                g -= tl.where(k[:, None, None, None] == label[None, :, :, :], own[None, :, :, :], 0.0)
                if SMOOTH:
                    g -= each[None, :, :, :] * class_weight
                share_y = share_high(y, row, height, out_height, scale_y, HALF)[None, :, None, None]
                sum_upper += tl.sum(g * (1.0 - share_y), 1)
                sum_lower += tl.sum(g * share_y, 1)
            if step > 0:
                value = tl.sum(sum_upper * (1.0 - share_x), 2)
                if width != out_width:
                    value += tl.gather(tl.sum(sum_upper * share_x, 2), before, 1)
                if block > 0:
                    value += tl.load(to + row * width * CLASSES, owned, 0.0)
                tl.store(to + row * width * CLASSES, common.narrow(value, grad.dtype.element_ty), owned)
            carried = sum_lower
            if height == out_height:
                carried = tl.zeros((BLOCK, BLOCK_CELLS, BLOCK_POSITIONS), tl.float32)
        if POSITION_BLOCKS > 1:
            tl.debug_barrier()


@triton.jit
def gradient_kernel(
    logits, target, weight, weight_total, grad_loss, logarithms, grad, height, width, out_height, out_width,
    scale_y, inverse_y, scale_x, inverse_x, column_blocks, row_blocks, ignore_index, smoothing,
    CLASSES: tl.constexpr, HALF: tl.constexpr, SMOOTH: tl.constexpr, POSITION_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CELLS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """grad (N, h, w, K) of the sum of grad_loss (or 1) * losses, from the logarithms of `losses_kernel`.

    Programs: N, row_blocks of ROWS rows of logits, column_blocks of BLOCK_CELLS - 1 columns, blocks of classes.
    """
    FULL: tl.constexpr = CLASSES // BLOCK_K
    CLASS_BLOCKS: tl.constexpr = FULL + (TAIL > 0)
    pid = tl.program_id(0)
    block = pid % CLASS_BLOCKS
    if FULL > 0:  # noqa: SIM102 (what is decided when it is compiled stands alone)
        if block < FULL:
            _gradient(
                pid // CLASS_BLOCKS, block * BLOCK_K, logits, target, weight, weight_total, grad_loss, logarithms,
                grad, height, width, out_height, out_width, scale_y, inverse_y, scale_x, inverse_x, column_blocks,
                row_blocks, ignore_index, smoothing, CLASSES, HALF, SMOOTH, POSITION_BLOCKS, BLOCK_K, ROWS,
                BLOCK_ROWS, BLOCK_CELLS, BLOCK_POSITIONS,
            )  # fmt: skip
    if TAIL > 0:  # noqa: SIM102
        if block == FULL:
            _gradient(
                pid // CLASS_BLOCKS, FULL * BLOCK_K, logits, target, weight, weight_total, grad_loss, logarithms,
                grad, height, width, out_height, out_width, scale_y, inverse_y, scale_x, inverse_x, column_blocks,
                row_blocks, ignore_index, smoothing, CLASSES, HALF, SMOOTH, POSITION_BLOCKS, TAIL, ROWS,
                BLOCK_ROWS, BLOCK_CELLS, BLOCK_POSITIONS,
            )  # fmt: skip


class _Problem:
    """What both kernels are launched with. logits packed channels-last, target and weight contiguous."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        align_corners: bool,
    ) -> None:
        self.batch, self.classes, self.height, self.width = logits.shape
        self.logits, self.target, self.weight = logits, target, weight
        self.weight_total = weight.sum() if weight is not None and label_smoothing else None
        self.rows: Axis = axis(self.height, target.shape[1], align_corners)
        self.columns: Axis = axis(self.width, target.shape[2], align_corners)
        self.sizes = (self.height, self.width, *target.shape[1:])
        self.scales = (*self.rows[:2], *self.columns[:2])
        self.options = (ignore_index, float(label_smoothing))
        self.constants = {
            "CLASSES": self.classes,
            "HALF": 0.0 if align_corners else 0.5,
            "SMOOTH": label_smoothing != 0.0,
        }

    def configuration(self, case: str) -> dict[str, int]:
        config = common.configuration(OP, case, self.logits)
        positions = min(triton.next_power_of_2(self.columns.most), MOST_POSITIONS)
        config["BLOCK_POSITIONS"] = positions
        config["POSITION_BLOCKS"] = common.cdiv(self.columns.most, positions)
        config["BLOCK_CELLS"] = max(2, config.pop("LANES") // positions)
        config["BLOCK_ROWS"] = min(config["BLOCK_ROWS"], triton.next_power_of_2(self.rows.most))
        tail = self.classes % config["BLOCK_K"]
        return {**self.constants, **config, "TAIL": triton.next_power_of_2(tail) if tail else 0}


def _losses(problem: _Problem, losses: Tensor | None, logarithms: Tensor | None, sums: bool) -> tuple[Tensor, ...]:
    """Fills losses and logarithms; with sums, returns those of the programs."""
    config = problem.configuration("losses")
    column_blocks = common.cdiv(problem.width + 1, config["BLOCK_CELLS"])
    row_blocks = common.cdiv(problem.rows.most, config["BLOCK_ROWS"])
    programs = problem.batch * (problem.height + 1) * row_blocks * column_blocks * config["POSITION_BLOCKS"]
    new = problem.logits.new_empty
    partial = (new((programs, 2), dtype=torch.float32), new((programs,), dtype=torch.int32)) if sums else (None, None)
    common.launch(
        losses_kernel,
        (programs,),
        *(problem.logits, problem.target, problem.weight, problem.weight_total, losses, logarithms, *partial),
        *(*problem.sizes, *problem.scales, column_blocks, *problem.options),
        ROW_BLOCKS=row_blocks,
        **config,
    )
    return partial


def _fill_gradient(problem: _Problem, grad_loss: Tensor | None, logarithms: Tensor, grad: Tensor) -> None:
    config = problem.configuration("gradient")
    # Sums of several blocks of positions meet in memory.
    whole = grad if config["POSITION_BLOCKS"] == 1 or grad.dtype == torch.float32 else grad.float()
    column_blocks = common.cdiv(problem.width, config["BLOCK_CELLS"] - 1)
    row_blocks = common.cdiv(problem.height, config["ROWS"])
    class_blocks = common.cdiv(problem.classes, config["BLOCK_K"])
    common.launch(
        gradient_kernel,
        (problem.batch * row_blocks * column_blocks * class_blocks,),
        *(problem.logits, problem.target, problem.weight, problem.weight_total, grad_loss, logarithms, whole),
        *(*problem.sizes, *problem.scales, column_blocks, row_blocks, *problem.options),
        **config,
    )
    if whole is not grad:
        grad.copy_(whole)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    losses: Tensor | None,
    grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills losses (N, H, W) fp32 and grad (N, K, h, w), of the sum of the losses, where they are given.

    Returns that sum () fp32, weight_sum () fp32 and out_of_range () int64.
    """
    problem = _Problem(logits, target, weight, ignore_index, label_smoothing, align_corners)
    logarithms = None if grad is None else logits.new_empty(target.shape, dtype=torch.float32)
    sums, counts = _losses(problem, losses, logarithms, sums=True)
    loss, weight_sum = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    out_of_range = logits.new_empty((), dtype=torch.int64)
    config = common.configuration(OP, "finish", logits)
    common.launch(finish_kernel, (1,), sums, counts, loss, weight_sum, out_of_range, len(counts), **config)
    if grad is not None:
        _fill_gradient(problem, None, logarithms, grad)
    return loss, weight_sum, out_of_range


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> None:
    """Fills grad (N, K, h, w), packed channels-last, of the sum of grad_loss * losses; grad_loss (N, H, W) fp32."""
    problem = _Problem(logits, target, weight, ignore_index, label_smoothing, align_corners)
    logarithms = logits.new_empty(target.shape, dtype=torch.float32)
    _losses(problem, None, logarithms, sums=False)
    _fill_gradient(problem, grad_loss, logarithms, grad)

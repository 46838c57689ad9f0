"""uint8 pixels to the network's input: normalised alone, or jittered and blurred before.

Bytes of a pixel, s those of an element of the result: plain reads 3 and writes 3 s, and the memory's bandwidth should
bind it. Jitter reads 3, or 6 where an image's mean is asked for, and writes 3 s. Its pixels of 3 elements fit no
vector, so that a warp's loads and stores are of single elements, every third; loads meet in the first-level cache,
stores do not, and the second-level cache's bandwidth may bind. Blur goes through fp32 rows in memory: 3 + 12 read,
12 + 3 s written, and past a radius of about 4 the arithmetic of its taps binds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

OP = "normalize_image"
MOST_PARTS = 128  # of an image's mean: about as many programs as a large GPU has multiprocessors


@triton.jit
def _plain(images, out, total, f0, f1, f2, b0, b1, b2, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Flat over the batch, in rows of VEC elements: 16 bytes of the result, which one thread has.

    The channel of a row's element k is (phase + k) % 3: the factors are chosen once a row, and by k at compile time.
    """
    begin = tl.program_id(0).to(tl.int64) * (ROWS * VEC)
    left = tl.minimum(total - begin, ROWS * VEC).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, VEC)[None, :]
    phase = ((begin % 3).to(tl.int32) + row * VEC) % 3
    offset = row * VEC + k
    whole = row < left // VEC
    x = tl.load(images + begin + offset, mask=whole, other=0).to(tl.float32)
    y = x * _by_channel(phase, k, f0, f1, f2) + _by_channel(phase, k, b0, b1, b2)
    tl.store(out + begin + offset, common.narrow(y, out.dtype.element_ty), mask=whole)
    if left % VEC != 0:  # the last program's last elements
        rest = left // VEC * VEC + tl.arange(0, VEC)
        channel = ((begin + rest) % 3).to(tl.int32)
        last = tl.load(images + begin + rest, mask=rest < left, other=0).to(tl.float32)
        last = last * _by_channel(channel, 0, f0, f1, f2) + _by_channel(channel, 0, b0, b1, b2)
        tl.store(out + begin + rest, common.narrow(last, out.dtype.element_ty), mask=rest < left)


@triton.jit
def _by_channel(phase, k, c0, c1, c2):
    """c of channel (phase + k) % 3."""
    at_0 = tl.where(phase == 0, c0, tl.where(phase == 1, c1, c2))
    at_1 = tl.where(phase == 0, c1, tl.where(phase == 1, c2, c0))
    at_2 = tl.where(phase == 0, c2, tl.where(phase == 1, c0, c1))
    return tl.where(k % 3 == 0, at_0, tl.where(k % 3 == 1, at_1, at_2))


@triton.jit
def _pixels(image, pixel, valid):
    """The three channels, fp32."""
    at = image + 3 * pixel
    r = tl.load(at, mask=valid, other=0).to(tl.float32)
    g = tl.load(at + 1, mask=valid, other=0).to(tl.float32)
    b = tl.load(at + 2, mask=valid, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _grey_sums(images, sums, size, g0, g1, g2, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """sums (N, PARTS): each program's share of an image's grey, in a fixed order."""
    part = tl.program_id(0)
    n = tl.program_id(1)
    image = images + n.to(tl.int64) * size * 3
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(part * BLOCK, size, PARTS * BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        r, g, b = _pixels(image, pixel, pixel < size)
        total += g0 * r + g1 * g + g2 * b
    tl.store(sums + n * PARTS + part, tl.sum(total))


@triton.jit
def _affine(row, sums, n, size, PARTS: tl.constexpr):
    """x's factor, its grey's, and what is added, of image n; PARTS = 0: no image asks for a mean."""
    of_x = tl.load(row)
    of_grey = tl.load(row + 1)
    added = tl.load(row + 2)
    if PARTS > 0:
        added *= tl.sum(tl.load(sums + n * PARTS + tl.arange(0, PARTS))) / size
    return of_x, of_grey, added


@triton.jit
def _jittered(image, pixel, valid, of_x, of_grey, added, g0, g1, g2):
    r, g, b = _pixels(image, pixel, valid)
    offset = of_grey * (g0 * r + g1 * g + g2 * b) + added
    r = tl.minimum(tl.maximum(of_x * r + offset, 0.0), 255.0)
    g = tl.minimum(tl.maximum(of_x * g + offset, 0.0), 255.0)
    b = tl.minimum(tl.maximum(of_x * b + offset, 0.0), 255.0)
    return r, g, b


@triton.jit
def _put(out, pixel, valid, r, g, b):
    at = out + 3 * pixel
    tl.store(at, common.narrow(r, out.dtype.element_ty), mask=valid)
    tl.store(at + 1, common.narrow(g, out.dtype.element_ty), mask=valid)
    tl.store(at + 2, common.narrow(b, out.dtype.element_ty), mask=valid)


@triton.jit
def _jitter(
    images, out, parameters, sums, size, stride, g0, g1, g2, f0, f1, f2, b0, b1, b2,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of the pixels, one write of the result."""
    n = tl.program_id(1)
    base = n.to(tl.int64) * size * 3
    of_x, of_grey, added = _affine(parameters + n * stride, sums, n, size, PARTS)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < size
    r, g, b = _jittered(images + base, pixel, valid, of_x, of_grey, added, g0, g1, g2)
    _put(out + base, pixel, valid, r * f0 + b0, g * f1 + b1, b * f2 + b2)


@triton.jit
def _blur_down(
    images, rows, parameters, sums, height, width, stride, radius, g0, g1, g2,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows (N, H W, 3), fp32: jittered pixels blurred along the columns; each is jittered again for every tap."""
    n = tl.program_id(1)
    size = height * width
    base = n.to(tl.int64) * size * 3
    row = parameters + n * stride
    of_x, of_grey, added = _affine(row, sums, n, size, PARTS)
    reach = tl.load(row + 3).to(tl.int32)  # 0 for an image without blur
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < size
    y = pixel // width
    x = pixel - y * width
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for tap in range(0, 2 * reach + 1):
        weight = tl.load(row + 4 + radius - reach + tap)
        at = tl.minimum(tl.maximum(y + tap - reach, 0), height - 1) * width + x
        r, g, b = _jittered(images + base, at, valid, of_x, of_grey, added, g0, g1, g2)
        red += weight * r
        green += weight * g
        blue += weight * b
    _put(rows + base, pixel, valid, red, green, blue)


@triton.jit
def _blur_across(
    rows, out, parameters, height, width, stride, radius, f0, f1, f2, b0, b1, b2, BLOCK: tl.constexpr
):  # fmt: skip
    """rows blurred along the rows, and normalised."""
    n = tl.program_id(1)
    size = height * width
    base = n.to(tl.int64) * size * 3
    row = parameters + n * stride
    reach = tl.load(row + 3).to(tl.int32)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < size
    first = pixel // width * width
    x = pixel - first
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for tap in range(0, 2 * reach + 1):
        weight = tl.load(row + 4 + radius - reach + tap)
        at = first + tl.minimum(tl.maximum(x + tap - reach, 0), width - 1)
        r, g, b = _pixels(rows + base, at, valid)
        red += weight * r
        green += weight * g
        blue += weight * b
    _put(out + base, pixel, valid, red * f0 + b0, green * f1 + b1, blue * f2 + b2)


def normalize(images: Tensor, dtype: torch.dtype, factor: list[float], bias: list[float]) -> Tensor:
    """Packed uint8 (N, H, W, 3) to channels-last (N, 3, H, W): x * factor + bias, of the three channels."""
    out = _result(images, dtype)
    constants = common.configuration(OP, "plain", out)
    vector = 16 // dtype.itemsize
    grid = (common.cdiv(images.numel(), constants["ROWS"] * vector),)
    common.launch(_plain, grid, images, out, images.numel(), *factor, *bias, VEC=vector, **constants)
    return out


def jitter_blur_normalize(
    images: Tensor,
    parameters: Tensor,
    radius: int,
    with_mean: bool,
    grey: tuple[float, ...],
    dtype: torch.dtype,
    factor: list[float],
    bias: list[float],
) -> Tensor:
    """The same of clamped of_x x + of_grey grey(x) + of_mean mean(grey(x)), blurred.

    parameters: fp32 (N, 4 + 2 radius + 1), on the device of `images`: of_x, of_grey, of_mean, the image's own radius,
        which is `radius` or 0, and the taps, in the middle where the radius is 0
    with_mean: whether any of_mean is not 0
    """
    n, height, width, _ = images.shape
    size = height * width
    out = _result(images, dtype)
    parts, sums = 0, parameters
    if with_mean:
        constants = common.configuration(OP, "mean", out)
        parts = min(MOST_PARTS, triton.next_power_of_2(common.cdiv(size, constants["BLOCK"])))
        sums = torch.empty((n, parts), dtype=torch.float32, device=images.device)
        common.launch(_grey_sums, (parts, n), images, sums, size, *grey, PARTS=parts, **constants)
    stride = parameters.shape[1]
    constants = common.configuration(OP, "blur" if radius else "jitter", out)
    grid = (common.cdiv(size, constants["BLOCK"]), n)
    if not radius:
        numbers = (size, stride, *grey, *factor, *bias)
        common.launch(_jitter, grid, images, out, parameters, sums, *numbers, PARTS=parts, **constants)
        return out
    rows = torch.empty((n, size, 3), dtype=torch.float32, device=images.device)
    numbers = (height, width, stride, radius)
    common.launch(_blur_down, grid, images, rows, parameters, sums, *numbers, *grey, PARTS=parts, **constants)
    common.launch(_blur_across, grid, rows, out, parameters, *numbers, *factor, *bias, **constants)
    return out


def _result(images: Tensor, dtype: torch.dtype) -> Tensor:
    n, height, width, _ = images.shape
    return torch.empty((n, 3, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last)

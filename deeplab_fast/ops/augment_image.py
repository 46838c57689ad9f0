"""A rectangle of a resized image, flipped or not, in one pass over uint8; and the same of its label map.

    image: out[y, x] = floor(1/2 + sum_r sum_c a[y, r] b[x, c] image[r, c])
    mask:  out[y, x] = mask[floor((y + 1/2) H / scaled_H), floor((x + 1/2) W / scaled_W)]

a and b are triangles 1 - |r + 1/2 - centre| / reach with centre = (y + 1/2) H / scaled_H and reach = max(1, H /
scaled_H), normalised to a sum of 1: bilinear, antialiased where it shrinks, axis by axis. It is the BILINEAR of Pillow
and the antialias=True of torch, which resize the whole image, or round twice to uint8, and leave crop, padding and flip
to three more copies. Here the source is read once where it is kept, and the result written once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import dispatch, native

PAD_VALUE = (124, 116, 104)  # ImageNet's mean colour
IGNORE = 255
LARGEST_SIDE = 1 << 24  # csrc: positions are 32-bit, in bytes of a row


def augment_image_reference(
    image: Tensor, scaled: list[int], window: list[int], flip: bool, pad_value: list[int]
) -> Tensor:
    """The specification, in plain PyTorch on any device; it gathers tap after tap, in fp32."""
    rows, columns, place = _inside(scaled, window)
    out = image.new_tensor(pad_value).repeat(window[1] - window[0], window[3] - window[2], 1)
    if rows and columns and tuple(scaled) == tuple(image.shape[:2]):
        out[place] = image[rows.start : rows.stop, columns.start : columns.stop]
    elif rows and columns:
        resized = _resize_axis(image.float(), scaled[0], rows)
        resized = _resize_axis(resized.transpose(0, 1), scaled[1], columns).transpose(0, 1)
        out[place] = (resized + 0.5).floor_().to(torch.uint8)
    return out.flip(1) if flip else out


def augment_image_mask_reference(mask: Tensor, scaled: list[int], window: list[int], flip: bool, ignore: int) -> Tensor:
    """The specification, in plain PyTorch on any device. Integers, so that no rounding shifts a row."""
    rows, columns, place = _inside(scaled, window)
    out = mask.new_full((window[1] - window[0], window[3] - window[2]), ignore)
    if rows and columns:
        row, column = (
            (2 * torch.arange(kept.start, kept.stop, device=mask.device) + 1) * mask.shape[axis] // (2 * scaled[axis])
            for axis, kept in enumerate((rows, columns))
        )
        out[place] = mask[row[:, None], column]
    return out.flip(1) if flip else out


def _inside(scaled: list[int], window: list[int]) -> tuple[range, range, tuple[slice, slice]]:
    """Rows and columns of the scaled image that the window keeps, and their place in the window."""
    top, bottom, left, right = window
    rows = range(max(0, top), min(bottom, scaled[0]))
    columns = range(max(0, left), min(right, scaled[1]))
    return rows, columns, (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))


def _resize_axis(x: Tensor, scaled: int, kept: range) -> Tensor:
    """fp32 (L, M, 3) to (len(kept), M, 3): the positions `kept` of the first axis resized to `scaled`."""
    length = x.shape[0]
    ratio = length / scaled
    reach = max(1.0, ratio)
    centre = (torch.arange(kept.start, kept.stop, dtype=torch.float64, device=x.device) + 0.5) * ratio
    taps = torch.arange(min(length, 2 * math.ceil(reach) + 1), device=x.device)
    # The first tap moves inwards at the end of the axis; those that this adds weigh 0.
    first = (centre - reach + 0.5).long().clamp(0, max(0, length - len(taps)))
    index = first[:, None] + taps
    weight = (1 - (index + 0.5 - centre[:, None]).abs() / reach).clamp(min=0)
    weight = (weight / weight.sum(1, keepdim=True)).float()
    out = x.new_zeros(len(kept), *x.shape[1:])
    for k in range(len(taps)):
        out.addcmul_(x[index[:, k]], weight[:, k, None, None])
    return out


def augment_image(
    image: Tensor,
    scaled: tuple[int, int],
    window: tuple[int, int, int, int],
    *,
    flip: bool = False,
    pad_value: tuple[int, int, int] = PAD_VALUE,
    backend: str = "auto",
) -> Tensor:
    """The rectangle `window` of `image` resized to `scaled`: bilinear, antialiased where it shrinks.

    image: uint8 (H, W, 3), any strides
    scaled: rows and columns of the whole resized image
    window: top, bottom, left, right in the resized image; where it lies outside, the result is `pad_value`
    flip: the result mirrored, left to right, padding and all
    Returns uint8 (bottom - top, right - left, 3), contiguous. Backends differ by at most 1. There is no gradient.
    Raises ValueError on shapes, dtypes and empty rectangles, UserError where a named backend cannot run.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.numel():
        raise ValueError(f"image is {image.dtype} {tuple(image.shape)}; expected uint8 (H, W, 3)")
    _check_window(image, scaled, window)
    if len(pad_value) != 3 or not all(0 <= value <= 255 for value in pad_value):
        raise ValueError(f"pad_value is {tuple(pad_value)}; expected three numbers from 0 to 255")
    return dispatch.run("augment_image", image, list(scaled), list(window), flip, list(pad_value), backend=backend)


def augment_image_mask(
    mask: Tensor,
    scaled: tuple[int, int],
    window: tuple[int, int, int, int],
    *,
    flip: bool = False,
    ignore: int = IGNORE,
    backend: str = "auto",
) -> Tensor:
    """What `augment_image` does, for the label map: each pixel takes the label that its centre falls on.

    mask: uint8 (H, W), any strides; scaled, window, flip as there; outside, the result is `ignore`
    Returns uint8 (bottom - top, right - left), contiguous; all backends give the same.
    """
    if mask.dtype != torch.uint8 or mask.ndim != 2 or not mask.numel():
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; expected uint8 (H, W)")
    _check_window(mask, scaled, window)
    if not 0 <= ignore <= 255:
        raise ValueError(f"ignore is {ignore}; expected 0 to 255")
    return dispatch.run("augment_image_mask", mask, list(scaled), list(window), flip, ignore, backend=backend)


def _check_window(source: Tensor, scaled: tuple[int, int], window: tuple[int, int, int, int]) -> None:
    if len(scaled) != 2 or min(scaled) < 1 or max(*scaled, *source.shape) > LARGEST_SIDE:
        raise ValueError(
            f"scaled is {tuple(scaled)} for a source of {tuple(source.shape)}; expected sides from 1 to {LARGEST_SIDE}"
        )
    if len(window) != 4 or window[0] >= window[1] or window[2] >= window[3]:
        raise ValueError(f"window is {tuple(window)}; expected top < bottom and left < right")


def _native_why_not(source: Tensor, *_: object) -> str | None:
    return native.why_not(source.device)


def _rows(source: Tensor) -> Tensor:
    """The source with packed rows, at whatever distance; itself where it has them."""
    return source if source[0].is_contiguous() else source.contiguous()


def _native(image: Tensor, scaled: list[int], window: list[int], flip: bool, pad_value: list[int]) -> Tensor:
    image = _rows(image)
    out = image.new_empty((window[1] - window[0], window[3] - window[2], 3))
    size = image.shape[:2]
    arguments = (image.data_ptr(), image.stride(0), size, scaled, window, flip, pad_value, out.data_ptr())
    if image.is_cuda:
        native.kernels().augment_image_cuda(*arguments, *native.device_and_stream(image))
    else:
        native.kernels().augment_image_cpu(*arguments, torch.get_num_threads())
    return out


def _native_mask(mask: Tensor, scaled: list[int], window: list[int], flip: bool, ignore: int) -> Tensor:
    mask = _rows(mask)
    out = mask.new_empty((window[1] - window[0], window[3] - window[2]))
    arguments = (mask.data_ptr(), mask.stride(0), mask.shape, scaled, window, flip, ignore, out.data_ptr())
    if mask.is_cuda:
        native.kernels().augment_image_mask_cuda(*arguments, *native.device_and_stream(mask))
    else:
        native.kernels().augment_image_mask_cpu(*arguments, torch.get_num_threads())
    return out


# AMD EPYC (AVX-512), 2 threads, torch 2.13, image and mask, 1024 x 2048 at scale .5 / 1 / 2 to 769 x 769: native .90 /
# .60 / .63 ms, Pillow and numpy 19 / 15 / 13, torch's antialiased resize 4.6 / 11 / 29, reference 27 / 28 / 26.
# The CUDA kernels run in an emulator (tests/test_cuda_emulator_augment.py) and have not been timed on a GPU.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "reference": dispatch.Backend(augment_image_reference, dispatch.always, measured=("cpu", "cuda")),
}
MASK_BACKENDS = {
    "native": dispatch.Backend(_native_mask, _native_why_not, measured=("cpu",)),
    "reference": dispatch.Backend(augment_image_mask_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(source: Tensor, scaled: list[int], window: list[int], *_: object) -> Tensor:
    return source.new_empty((window[1] - window[0], window[3] - window[2], *source.shape[2:]))


def _example(device: torch.device) -> tuple[Tensor, list[int], list[int], bool, list[int]]:
    return torch.zeros((2, 3, 3), dtype=torch.uint8, device=device), [3, 4], [0, 2, 0, 2], False, list(PAD_VALUE)


def _mask_example(device: torch.device) -> tuple[Tensor, list[int], list[int], bool, int]:
    return torch.zeros((2, 3), dtype=torch.uint8, device=device), [3, 4], [0, 2, 0, 2], False, IGNORE


_op = dispatch.register(
    "augment_image",
    "(Tensor image, int[] scaled, int[] window, bool flip, int[] pad_value, str backend) -> Tensor",
    BACKENDS,
    _fake,
    _example,
)
_mask_op = dispatch.register(
    "augment_image_mask",
    "(Tensor mask, int[] scaled, int[] window, bool flip, int ignore, str backend) -> Tensor",
    MASK_BACKENDS,
    _fake,
    _mask_example,
)

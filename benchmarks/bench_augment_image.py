"""Crop, scale and flip: Pillow and numpy, as loaders have it, and torch's antialiased resize, against the backends."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.shapes import CROPS
from deeplab_fast.ops import augment_image, augment_image_mask, dispatch

OP, MASK_OP = "augment_image", "augment_image_mask"
PAD, IGNORE = (124, 116, 104), 255
Crop = tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]


@functools.cache
def pair(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (*size, 3), generator=generator).byte()
    return image.to(device), torch.randint(0, 19, size, generator=generator).byte().to(device)


def kept(scaled: tuple[int, int], window: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[slice, slice]]:
    """The part of the window that lies in the scaled image, and its place in the window."""
    top, left = max(0, window[0]), max(0, window[2])
    bottom, right = min(window[1], scaled[0]), min(window[3], scaled[1])
    place = slice(top - window[0], bottom - window[0]), slice(left - window[2], right - window[2])
    return (top, bottom, left, right), place


def pillow(image: np.ndarray, mask: np.ndarray, scaled: tuple[int, int], window: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Only the region that is kept is resized; the mask by indexing."""
    (top, bottom, left, right), place = kept(scaled, window)
    ratios = image.shape[0] / scaled[0], image.shape[1] / scaled[1]
    slices, box = [], []
    for axis, (start, stop) in enumerate(((top, bottom), (left, right))):
        reach = math.ceil(max(1.0, ratios[axis])) + 1
        low = max(0, math.floor(start * ratios[axis]) - reach)
        high = min(image.shape[axis], math.ceil(stop * ratios[axis]) + reach)
        slices.append(slice(low, high))
        box.append((start * ratios[axis] - low, min(stop * ratios[axis] - low, high - low)))
    region = Image.fromarray(np.ascontiguousarray(image[tuple(slices)]))
    (y0, y1), (x0, x1) = box
    resized = region.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    out = np.full((window[1] - window[0], window[3] - window[2], 3), PAD, np.uint8)
    labels = np.full(out.shape[:2], IGNORE, np.uint8)
    out[place] = np.asarray(resized)
    rows, columns = (
        (2 * np.arange(start, stop) + 1) * mask.shape[axis] // (2 * scaled[axis])
        for axis, (start, stop) in enumerate(((top, bottom), (left, right)))
    )
    labels[place] = mask[rows[:, None], columns]
    return tuple(torch.from_numpy(np.ascontiguousarray(x[:, ::-1])) for x in (out, labels))


def eager(image: Tensor, mask: Tensor, scaled: tuple[int, int], window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The whole image is resized, then cropped."""
    (top, bottom, left, right), place = kept(scaled, window)
    whole = F.interpolate(image.permute(2, 0, 1)[None], scaled, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    labels = F.interpolate(mask[None, None], scaled, mode="nearest-exact")[0, 0]
    out = image.new_tensor(PAD).repeat(window[1] - window[0], window[3] - window[2], 1)
    out_labels = mask.new_full(out.shape[:2], IGNORE)
    out[place], out_labels[place] = whole[top:bottom, left:right], labels[top:bottom, left:right]
    return out.flip(1), out_labels.flip(1)


def eager_float(image: Tensor, mask: Tensor, scaled: tuple[int, int], window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same in fp32: on a GPU torch resizes no bytes."""
    resized, labels = eager(image.float(), mask, scaled, window)
    return (resized + 0.5).to(torch.uint8), labels


@functools.cache
def expected(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    source, scaled, window = CROPS[name]
    return eager_float(*pair(source, device), scaled, window)


@pytest.mark.parametrize("variant", ["native", "reference", "pillow", "eager"])
@pytest.mark.parametrize("name", CROPS)
def bench_augment_image(timed, device, name, variant):
    if variant == "pillow" and device.type != "cpu":
        pytest.skip("Pillow has no GPU")
    source, scaled, window = CROPS[name]
    image, mask = pair(source, device)
    if variant == "pillow":
        arrays = image.numpy(), mask.numpy()
        run = lambda: pillow(*arrays, scaled, window)  # noqa: E731
    elif variant == "eager":
        function = eager if device.type == "cpu" else eager_float
        run = lambda: function(image, mask, scaled, window)  # noqa: E731
    else:
        if reason := dispatch.explain(OP, image, scaled, window, True, PAD)[variant]:
            pytest.skip(reason)
        run = lambda: (  # noqa: E731
            augment_image(image, scaled, window, flip=True, pad_value=PAD, backend=variant),
            augment_image_mask(mask, scaled, window, flip=True, ignore=IGNORE, backend=variant),
        )

    def check(result: tuple[Tensor, Tensor]) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == dispatch.last_backend(MASK_OP) == variant
        assert (result[0].int() - expected(name, device)[0].int()).abs().max() <= 1
        assert torch.equal(result[1], expected(name, device)[1])

    # What the window needs of the source is read, and the window written: 4 bytes a pixel, image and mask.
    (top, bottom, left, right), _ = kept(scaled, window)
    share = (bottom - top) * (right - left) / (scaled[0] * scaled[1])
    bytes_moved = 4 * (round(share * mask.numel()) + (window[1] - window[0]) * (window[3] - window[2]))
    timed(f"{OP} {name} uint8", variant, run, check, bytes_moved)

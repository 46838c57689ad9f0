"""Training augmentation: geometry on uint8 in the workers, colour, blur and normalisation on the device."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import AugmentConfig
from .labels import IGNORE

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of pixels in 0 ... 1
STD = (0.229, 0.224, 0.225)
PAD_VALUE = (124, 116, 104)  # MEAN in 0 ... 255
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma


def crop_sample(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    config: AugmentConfig,
    pad_value: tuple[int, int, int] = PAD_VALUE,
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of the randomly scaled pair, flipped at random.

    Image uint8 (H, W, 3) and mask uint8 (H, W) to image uint8 (h, w, 3) and mask uint8 (h, w) of
    `config.crop_size`. Where the scaled image is smaller than the crop it is placed at random, amid
    `pad_value` and IGNORE. Only the region that is kept is resampled: the image bilinear, antialiased when
    shrinking, the mask by nearest neighbour; both map pixel centre to pixel centre.
    """
    scale = rng.uniform(config.scale_min, config.scale_max)
    scaled = tuple(max(1, round(length * scale)) for length in mask.shape)
    top, left = _corner(mask, scaled, rng, config)
    crop_h, crop_w = config.crop_size
    rows = slice(max(0, -top), min(crop_h, scaled[0] - top))  # of the crop, where there is image
    columns = slice(max(0, -left), min(crop_w, scaled[1] - left))

    out_image = np.empty((crop_h, crop_w, 3), np.uint8)
    out_mask = np.full((crop_h, crop_w), IGNORE, np.uint8)
    if rows.stop - rows.start < crop_h or columns.stop - columns.start < crop_w:
        out_image[:] = pad_value
    window = (top + rows.start, top + rows.stop, left + columns.start, left + columns.stop)
    out_image[rows, columns] = _resample_image(image, scaled, window)
    out_mask[rows, columns] = _resample_mask(mask, scaled, window)
    if rng.random() < config.flip:
        out_image = np.ascontiguousarray(out_image[:, ::-1])
        out_mask = np.ascontiguousarray(out_mask[:, ::-1])
    return out_image, out_mask


def _corner(
    mask: np.ndarray, scaled: tuple[int, int], rng: np.random.Generator, config: AugmentConfig
) -> tuple[int, int]:
    """Where the crop starts in the scaled image; negative where the image is placed inside a larger crop."""
    bounds = [sorted((0, length - crop)) for length, crop in zip(scaled, config.crop_size, strict=True)]
    if rng.random() >= config.rare_crop:
        return tuple(int(rng.integers(low, high + 1)) for low, high in bounds)
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:IGNORE])
    if not len(present):
        return tuple(int(rng.integers(low, high + 1)) for low, high in bounds)
    of_class = np.flatnonzero(mask == rng.choice(present))
    pixel = divmod(int(rng.choice(of_class)), mask.shape[1])
    corner = []
    for axis, (low, high) in enumerate(bounds):
        crop = config.crop_size[axis]
        centre = (pixel[axis] + 0.5) * scaled[axis] / mask.shape[axis]
        jittered = centre - crop * rng.uniform(0.25, 0.75)  # the pixel falls in the middle half of the crop
        corner.append(int(np.clip(round(jittered), low, high)))
    return tuple(corner)


def _resample_image(image: np.ndarray, scaled: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """uint8 rows window[0]:window[1] and columns window[2]:window[3] of `image` resized to `scaled`."""
    if scaled == image.shape[:2]:
        return image[window[0] : window[1], window[2] : window[3]]
    slices, box = [], []
    for axis in (0, 1):
        ratio = image.shape[axis] / scaled[axis]
        start, stop = (edge * ratio for edge in window[2 * axis : 2 * axis + 2])
        reach = math.ceil(max(1.0, ratio)) + 1  # the filter reads up to max(1, ratio) pixels outside the box
        low, high = max(0, math.floor(start) - reach), min(image.shape[axis], math.ceil(stop) + reach)
        slices.append(slice(low, high))
        box.append((start - low, min(stop - low, high - low)))
    region = Image.fromarray(np.ascontiguousarray(image[slices[0], slices[1]]))
    size = (window[3] - window[2], window[1] - window[0])
    (y0, y1), (x0, x1) = box
    return np.asarray(region.resize(size, Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)))


def _resample_mask(mask: np.ndarray, scaled: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """The same rows and columns of the mask: each takes the source pixel that its centre falls into."""
    if scaled == mask.shape:
        return mask[window[0] : window[1], window[2] : window[3]]
    # floor((i + 1/2) * length / scaled) in integers, so that no rounding shifts a row
    rows, columns = (
        (2 * np.arange(window[2 * axis], window[2 * axis + 1]) + 1) * mask.shape[axis] // (2 * scaled[axis])
        for axis in (0, 1)
    )
    return mask[rows[:, None], columns]


def draw_colour(rng: np.random.Generator, config: AugmentConfig) -> np.ndarray:
    """float32 (4,): factors of brightness, contrast and saturation, and sigma of the blur, 0 for none."""
    colour = np.ones(4, np.float32)
    colour[:3] = rng.uniform(1 - config.jitter, 1 + config.jitter, 3)
    colour[3] = rng.uniform(0, config.blur_sigma) if rng.random() < config.blur else 0
    return colour


def prepare(images: Tensor, colour: Tensor | None = None, *, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    """uint8 (N, H, W, 3) RGB on the device to the network's input (N, 3, H, W): jitter, blur, normalisation.

    The last subtracts ImageNet's mean and divides by its standard deviation. `colour` is float32 (N, 4), a
    `draw_colour` for each image, and stays on the CPU: its values choose what is computed, and reading them
    back from the device would stall it. None leaves out jitter and blur, as evaluation does. The arithmetic
    is in fp32; `dtype` is that of the result.
    """
    x = images.permute(0, 3, 1, 2).float()  # channels-last memory
    if colour is not None:
        if colour.device.type != "cpu":
            raise ValueError(f"colour is on {colour.device}; prepare reads it on the CPU")
        x = _blur(_jitter(x, colour[:, :3]), colour[:, 3])
    factor, bias = _normalisation(x.device)
    x = torch.addcmul(bias, x, factor)
    return x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 (3, 1, 1) factor and bias of (x / 255 - mean) / std; kept, as an upload would stall the device."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def _jitter(x: Tensor, factors: Tensor) -> Tensor:
    """Brightness b, contrast c, saturation s of `factors` (N, 3), each around 1, applied in this order.

    Brightness scales x, contrast blends with the image's mean grey, saturation with the pixel's own grey. All
    three are affine in x and leave grey weights summing to 1, so that together they are b c s x + b c (1 - s)
    grey(x) + b (1 - c) mean(grey(x)).
    """
    if bool((factors == 1).all()):
        return x
    b, c, s = factors.to(x.device, non_blocking=True).view(-1, 3, 1, 1, 1).unbind(1)
    grey = GREY[0] * x[:, 0:1] + GREY[1] * x[:, 1:2] + GREY[2] * x[:, 2:3]
    offset = b * c * (1 - s) * grey + b * (1 - c) * grey.mean((2, 3), keepdim=True)
    return torch.addcmul(offset, b * c * s, x).clamp_(0, 255)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, sigma (N,) pixels on the CPU, 0 for none; the border is repeated outwards.

    Weighted sums of shifted images: autocast and TF32, which would round a convolution, leave these alone.
    """
    chosen = sigma.nonzero().flatten()
    if not len(chosen):
        return x
    sigma = sigma[chosen, None]
    radius = math.ceil(3 * float(sigma.max()))
    taps = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))  # (n, 2 radius + 1)
    taps = (taps / taps.sum(1, keepdim=True)).to(x.device, non_blocking=True)
    chosen = chosen.to(x.device, non_blocking=True)
    blurred = x[chosen]
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(blurred, padding, mode="replicate")
        blurred = torch.zeros_like(blurred)
        for shift in range(2 * radius + 1):
            shifted = padded.narrow(axis, shift, x.shape[axis])
            blurred.addcmul_(shifted, taps[:, shift].view(-1, 1, 1, 1))
    return x.index_copy(0, chosen, blurred)

"""Training augmentation: geometry on uint8 in the workers, colour, blur and normalisation on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..config import AugmentConfig
from ..ops import augment_image, augment_image_mask, normalize_image
from ..ops.augment_image import PAD_VALUE
from ..ops.normalize_image import GREY, MEAN, STD
from .labels import IGNORE

__all__ = ["GREY", "MEAN", "PAD_VALUE", "STD", "crop_sample", "draw_colour", "draw_scale", "prepare"]


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
    scale = draw_scale(rng, config)
    if config.base_size:
        scale *= config.base_size / min(mask.shape)
    scaled = tuple(max(1, round(length * scale)) for length in mask.shape)
    top, left = _corner(mask, scaled, rng, config)
    crop_h, crop_w = config.crop_size
    window = (top, top + crop_h, left, left + crop_w)
    flip = bool(rng.random() < config.flip)
    out_image = augment_image(_tensor(image), scaled, window, flip=flip, pad_value=pad_value)
    out_mask = augment_image_mask(_tensor(mask), scaled, window, flip=flip, ignore=IGNORE)
    return out_image.numpy(), out_mask.numpy()


def draw_scale(rng: np.random.Generator, config: AugmentConfig) -> float:
    """A random scale from [scale_min, scale_max].

    Uniform (jfzhang95/pytorch-deeplab-xception), uniform in its logarithm (chenxi116/DeepLabv3.pytorch), or one of
    evenly spaced values with both ends, as near to `scale_step` apart as they go (TensorFlow's DeepLab).
    """
    low, high = config.scale_min, config.scale_max
    if config.scale_sampling == "step":
        last = max(1, round((high - low) / config.scale_step))
        return low + (high - low) * int(rng.integers(last + 1)) / last
    if config.scale_sampling == "log":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=("C", "W")))  # torch warns of arrays that are read-only


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
    return normalize_image(images, colour, dtype=dtype, channels_last=channels_last)

"""Crops: geometry shared by image and mask, padding, flip, rare classes; on the device jitter and blur."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast.config import AugmentConfig
from deeplab_fast.data.augment import GREY, MEAN, PAD_VALUE, STD, crop_sample, draw_colour, draw_scale, prepare
from deeplab_fast.data.labels import IGNORE

PLAIN = AugmentConfig(crop_size=(40, 56), scale_min=1.0, scale_max=1.0, flip=0.0)


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def noise(height: int = 60, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    draw = rng(7)
    image = draw.integers(0, 256, (height, width, 3), np.uint8)
    return image, draw.integers(0, 5, (height, width), np.uint8)


def at_scale(scale: float, crop: tuple[int, int] = (40, 56), **fields) -> AugmentConfig:
    return dataclasses.replace(PLAIN, crop_size=crop, scale_min=scale, scale_max=scale, **fields)


def test_crop_is_a_piece_of_the_pair():
    image, mask = noise()
    for key in range(20):
        crop, labels = crop_sample(image, mask, rng(key), PLAIN)
        assert crop.shape == (40, 56, 3) and crop.dtype == np.uint8
        assert labels.shape == (40, 56) and labels.dtype == np.uint8
        windows = np.lib.stride_tricks.sliding_window_view(mask, labels.shape)
        (top, left), *others = np.argwhere((windows == labels).all((2, 3)))
        assert not others
        np.testing.assert_array_equal(crop, image[top : top + 40, left : left + 56])


def test_crop_reaches_every_place():
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = mask[:, :, None].repeat(3, 2)
    config = dataclasses.replace(PLAIN, crop_size=(7, 7))
    corners = {int(crop_sample(image, mask, rng(key), config)[1][0, 0]) for key in range(60)}
    assert corners == {0, 1, 8, 9}


@pytest.mark.parametrize("scale", [0.5, 0.61, 0.83, 1.37, 2.0])
def test_only_the_region_is_resampled_but_nothing_shows_it(scale):
    """A crop equals a window of the whole resized image, so its borders are as good as its middle."""
    image, mask = noise(47, 61)
    height, width = (round(47 * scale), round(61 * scale))
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    for key in range(6):
        crop, labels = crop_sample(image, mask, rng(key), at_scale(scale, (20, 24)))
        windows = np.lib.stride_tricks.sliding_window_view(whole, crop.shape)[:, :, 0]
        difference = abs(windows - crop).max((2, 3, 4))
        assert difference.min() <= 1  # of 255: fixed-point weights
        top, left = np.unravel_index(difference.argmin(), difference.shape)
        rows = ((np.arange(top, top + 20) + 0.5) * 47 / height).astype(int)
        columns = ((np.arange(left, left + 24) + 0.5) * 61 / width).astype(int)
        np.testing.assert_array_equal(labels, mask[np.ix_(rows, columns)])


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.9, 1.0, 1.3, 1.7, 2.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_mask_edges_coincide(scale, axis):
    """The bilinear edge crosses half its height within half a pixel of the label's edge."""
    mask = np.zeros((80, 80), np.uint8)
    mask[41:] = 1
    mask = mask if axis == 0 else mask.T.copy()
    image = (mask * 200)[:, :, None].repeat(3, 2)
    found = 0
    for key in range(12):
        crop, labels = crop_sample(image, mask, rng(key), at_scale(scale, (32, 32)))
        profile, line = (crop[:, 16, 0], labels[:, 16]) if axis == 0 else (crop[16, :, 0], labels[16])
        if line[4] == 1 or line[-5] != 1:  # the edge is not well inside this crop
            continue
        found += 1
        after = int(np.argmax(profile >= 100))
        low, high = float(profile[after - 1]), float(profile[after])
        crossing = after - 1 + (100 - low) / (high - low)  # in pixel centres
        label_edge = int(np.argmax(line == 1)) - 0.5
        assert abs(crossing - label_edge) <= 0.5 + 1e-6
    assert found


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    crop, _ = crop_sample(stripes, np.zeros((64, 64), np.uint8), rng(0), at_scale(0.25, (8, 8)))
    assert abs(crop[2:-2, 2:-2].astype(int) - 100).max() <= 15


def test_flip_is_exact():
    image, mask = noise()
    plain = crop_sample(image, mask, rng(3), at_scale(0.9))
    flipped = crop_sample(image, mask, rng(3), at_scale(0.9, flip=1.0))
    for a, b in zip(plain, flipped, strict=True):
        np.testing.assert_array_equal(a[:, ::-1], b)


def test_padding_goes_all_round():
    mask = np.ones((10, 20), np.uint8)
    image = np.full((10, 20, 3), 9, np.uint8)
    places = set()
    for key in range(30):
        crop, labels = crop_sample(image, mask, rng(key), at_scale(1.5, (24, 32)))
        inside = labels == 1
        assert inside.sum() == 15 * 30
        assert (labels[~inside] == IGNORE).all()
        assert (crop[inside] == 9).all() and (crop[~inside] == PAD_VALUE).all()
        rows, columns = np.nonzero(inside)
        places.add((rows.min(), columns.min()))
        assert (np.ptp(rows), np.ptp(columns)) == (14, 29)
    assert {top for top, _ in places} >= {0, 9} and {left for _, left in places} == {0, 1, 2}


def test_a_large_scale_in_one_axis_pads_only_the_other():
    image, mask = noise(20, 100)
    crop, labels = crop_sample(image, mask, rng(0), at_scale(1.0, (40, 50)))
    assert (labels != IGNORE).sum() == 20 * 50
    assert crop.shape == (40, 50, 3)


def test_a_tiny_image_keeps_a_pixel():
    crop, labels = crop_sample(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), rng(0), at_scale(0.3, (4, 4)))
    assert crop.shape == (4, 4, 3) and (labels == 0).sum() == 1


def test_scales_span_their_range():
    mask = np.ones((20, 20), np.uint8)
    image = mask[:, :, None].repeat(3, 2)
    config = dataclasses.replace(PLAIN, crop_size=(50, 50), scale_min=0.5, scale_max=2.0)
    sides = [np.sqrt((crop_sample(image, mask, rng(key), config)[1] == 1).sum()) for key in range(200)]
    assert 10 <= min(sides) <= 11 and 39 <= max(sides) <= 40
    assert abs(np.mean(sides) - 25) < 1.5


def test_rare_crop_raises_the_share_of_rare_classes():
    mask = np.zeros((200, 300), np.uint8)
    mask[:, 150:] = 1
    mask[20:24, 280:284] = 2
    mask[150:, :20] = IGNORE
    image = mask[:, :, None].repeat(3, 2)

    def share(rare_crop: float) -> float:
        config = at_scale(0.9, (48, 48), rare_crop=rare_crop)
        return np.mean([2 in crop_sample(image, mask, rng(key), config)[1] for key in range(300)])

    assert share(0.0) < 0.12
    assert abs(share(1.0) - 1 / 3) < 0.1
    assert share(0.0) < share(0.5) < share(1.0)


def test_rare_crop_of_a_mask_without_labels_is_an_ordinary_one():
    image, mask = noise()
    mask[:] = IGNORE
    crop, labels = crop_sample(image, mask, rng(0), at_scale(1.0, rare_crop=1.0))
    assert crop.shape == (40, 56, 3) and (labels == IGNORE).all()


def test_the_generator_alone_decides():
    image, mask = noise()
    config = AugmentConfig(crop_size=(40, 56), rare_crop=0.5, jitter=0.3, blur=0.5)
    first, again = ([*crop_sample(image, mask, g, config), draw_colour(g, config)] for g in (rng(1), rng(1)))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (crop_sample(image, mask, rng(2), config)[0] != first[0]).any()


# On the device


def images(n: int = 3, height: int = 17, width: int = 23) -> torch.Tensor:
    return torch.from_numpy(rng(5).integers(0, 256, (n, height, width, 3), np.uint8))


def normalised(x: np.ndarray) -> torch.Tensor:
    """float64 (N, H, W, 3) in 0 ... 255 to (N, 3, H, W)."""
    return torch.from_numpy((x / 255 - MEAN) / STD).permute(0, 3, 1, 2).float()


def colour(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def test_draw_colour_stays_in_its_ranges():
    off = draw_colour(rng(0), AugmentConfig())
    assert off.dtype == np.float32 and off.tolist() == list(NEUTRAL)
    config = AugmentConfig(jitter=0.3, blur=0.25, blur_sigma=1.5)
    drawn = np.stack([draw_colour(rng(key), config) for key in range(400)])
    assert (abs(drawn[:, :3] - 1) <= 0.3 + 1e-6).all()
    assert drawn[:, :3].min() < 0.72 and drawn[:, :3].max() > 1.28
    assert 0.18 < (drawn[:, 3] > 0).mean() < 0.32
    assert 1.3 < drawn[:, 3].max() <= 1.5


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_normalises(dtype, channels_last):
    batch = images()
    x = prepare(batch, None, dtype=dtype, channels_last=channels_last)
    assert x.dtype == dtype and x.shape == (3, 3, 17, 23)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert x.is_contiguous(memory_format=layout)
    expected = normalised(batch.double().numpy()).to(dtype)
    torch.testing.assert_close(x, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    torch.testing.assert_close(
        prepare(batch, colour(*[NEUTRAL] * 3), dtype=dtype, channels_last=channels_last), x, rtol=0, atol=0
    )


def test_jitter_is_brightness_then_contrast_then_saturation():
    batch = images()
    factors = [(1.3, 0.8, 1.2), (0.7, 1.3, 0.6), (1.0, 1.0, 1.0)]
    x = prepare(batch, colour(*((*row, 0.0) for row in factors)), dtype=torch.float32)
    pixels = batch.double().numpy()
    for row, (brightness, contrast, saturation) in enumerate(factors):
        step = pixels[row] * brightness
        step = contrast * step + (1 - contrast) * (step @ GREY).mean()
        step = saturation * step + (1 - saturation) * (step @ GREY)[:, :, None]
        pixels[row] = step.clip(0, 255)
    assert (pixels == 0).any() and (pixels == 255).any()  # the clamp is exercised
    torch.testing.assert_close(x, normalised(pixels), rtol=1e-4, atol=1e-4)


def test_blur_is_gaussian_and_only_where_asked():
    batch = torch.zeros(2, 31, 31, 3, dtype=torch.uint8)
    batch[:, 15, 15] = 255
    sigma = 1.5
    x = prepare(batch, colour((1, 1, 1, sigma), NEUTRAL), dtype=torch.float32)
    at = np.arange(31) - 15
    bell = np.exp(-(at**2) / (2 * sigma**2)) * (abs(at) <= 5)
    bell /= bell.sum()
    expected = batch.double().numpy()
    expected[0] = 255 * np.outer(bell, bell)[:, :, None]
    torch.testing.assert_close(x, normalised(expected), rtol=1e-4, atol=1e-4)


def test_blur_keeps_a_flat_image_to_its_border():
    batch = torch.full((1, 9, 9, 3), 77, dtype=torch.uint8)
    x = prepare(batch, colour((1, 1, 1, 2.0)), dtype=torch.float32)
    torch.testing.assert_close(x, prepare(batch, None, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_prepare_leaves_its_input_alone_under_autocast():
    batch = images()
    before = batch.clone()
    factors = colour((1.2, 1.1, 0.8, 1.0), (1, 1, 1, 0.5), NEUTRAL)
    x = prepare(batch, factors, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prepare(batch, factors, dtype=torch.float32), x, rtol=0, atol=0)
    assert torch.equal(batch, before)


def test_prepare_wants_colour_on_the_cpu():
    with pytest.raises(ValueError, match="colour is on meta; expected it on the CPU, where it is read"):
        prepare(images(), torch.ones(3, 4, device="meta"), dtype=torch.float32)


def test_scales_are_drawn_as_asked():
    def draws(**fields) -> np.ndarray:
        config = AugmentConfig(**fields)
        generator = rng(0)
        return np.array([draw_scale(generator, config) for _ in range(4000)])

    steps, counts = np.unique(draws(scale_sampling="step"), return_counts=True)
    np.testing.assert_allclose(steps, [0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
    assert counts.min() > 4000 / 7 * 0.85
    logarithms = np.log2(draws(scale_sampling="log"))
    shares, _ = np.histogram(logarithms, 4, (-1, 1))
    assert logarithms.min() >= -1 and logarithms.max() <= 1 and shares.min() > 900
    uniform, _ = np.histogram(draws(), 3, (0.5, 2))
    assert uniform.min() > 1200
    assert set(draws(scale_sampling="step", scale_min=0.7, scale_max=0.7)) == {0.7}


def test_scale_1_is_the_base_size():
    """The 40 x 60 image's shorter side becomes 20 times the scale."""
    image, mask = np.full((40, 60, 3), 9, np.uint8), np.ones((40, 60), np.uint8)
    for scale in (0.5, 1.0, 2.0):
        _, labels = crop_sample(image, mask, rng(0), at_scale(scale, (100, 100), base_size=20))
        rows, columns = (np.count_nonzero((labels == 1).any(axis)) for axis in (1, 0))
        assert (rows, columns) == (20 * scale, 30 * scale)

"""Street scenes painted on the fly from a seed: the built-in data set. No file is read or kept.

A scene is a straight or bent street with pavements, perhaps a junction, houses or a park on either side,
traffic and people, under one light. Colour says little about the class (cars, clothes and signs have any,
walls are as grey as roads and overcast skies), and the horizon, the vanishing point and the place of the
street vary: shape and context have to be learnt. What is part of an object has its class: road markings are
road, windows are building, tyres are car; what shows through a fence is fence; shadows change nothing.

`scene_street` plans and populates a street, `scene_textures` and `scene_car` say what things look like,
`scene_paint` is the camera.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from .base import Dataset
from .scene_paint import TILE, Array, Canvas, between, develop, frac, noise, pick, shade_of
from .scene_street import BUILDING, PAVEMENT, ROAD, SCENES, SKY, VEGETATION, Street, draw_street, populate
from .scene_textures import LEAVES, WALLS

__all__ = ["SCENES", "Scenes", "paint"]

# How much the camera and the weather vary; scene_street has how many things there are.
HORIZON = (0.32, 0.56)  # row, as a share of the height
VANISHING = (-0.05, 1.05)  # column, as a share of the width
FOCAL = (0.62, 1.0)  # of the square root of the image's area
EYE = (1.3, 2.7)  # metres above the road
VISIBILITY = (80.0, 500.0)  # metres in which haze takes 63 %
EXPOSURE = (0.85, 1.2)  # on top of the automatic one
WHITE_BALANCE = 0.05  # largest change of a channel
BLUR = (0.03, 0.14)  # outer weight of the three-tap lens blur
GRAIN = (0.5, 4.0)  # standard deviation of the sensor's noise, in grey levels

SPLITS = ("train", "val", "test")  # the position is part of a scene's seed
FAR = 140.0  # metres to the skyline
MIN_SIDE = 32


class Scenes(Dataset):
    """`count` scenes of `size` (height, width); each depends on `seed`, `split`, its index and `size` alone.

    Raises UserError for an unknown split, a count under 1, a side under 32 pixels or a seed under 0.
    """

    name = "scenes"
    classes = SCENES

    def __init__(self, split: str, count: int, size: tuple[int, int] = (128, 256), seed: int = 0) -> None:
        if split not in SPLITS:
            raise UserError(f"there is no split {split} of scenes; expected one of {', '.join(SPLITS)}")
        if count < 1:
            raise UserError(f"{count} scenes were asked for; expected at least 1")
        if min(size) < MIN_SIDE:
            raise UserError(f"the scene size {size[0]}x{size[1]} is too small; expected {MIN_SIDE} or more a side")
        if seed < 0:
            raise UserError(f"the seed of the scenes is {seed}; expected 0 or more")
        self.split, self.count, self.size, self.seed = split, count, (int(size[0]), int(size[1])), seed

    def __len__(self) -> int:
        return self.count

    def stem(self, index: int) -> str:
        return f"{self.split}_{index:06d}"

    def load(self, index: int) -> tuple[Array, Array]:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return paint((self.seed, SPLITS.index(self.split), index), self.size)


def paint(key: int | tuple[int, ...], size: tuple[int, int]) -> tuple[Array, Array]:
    """Image uint8 (H, W, 3) RGB and mask uint8 (H, W) of the scene with this key of integers from 0 up."""
    rng = np.random.default_rng(key)
    height, width = size
    canvas = Canvas(
        size,
        focal=(height * width) ** 0.5 * between(rng, *FOCAL),
        centre=(width * between(rng, *VANISHING), height * between(rng, *HORIZON)),
        eye=between(rng, *EYE),
    )
    haze = _light(canvas, rng)
    street = draw_street(rng)
    _ground(canvas, street, rng)
    populate(canvas, street, rng)
    _skyline(canvas, rng)
    balance = 1 + WHITE_BALANCE * (2 * rng.random(3) - 1)
    image = develop(
        canvas,
        rng,
        haze=haze,
        visibility=VISIBILITY[0] * (VISIBILITY[1] / VISIBILITY[0]) ** rng.random(),
        exposure=(between(rng, *EXPOSURE) * balance).astype(np.float32),
        blur=between(rng, *BLUR),
        grain=between(rng, *GRAIN),
    )
    return image, canvas.mask


def _light(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Set the canvas's light, paint the sky, and return the haze's colour."""
    weather = pick(rng, ("clear", "clear", "cloudy", "overcast", "low sun"))
    strength = {"clear": 0.75, "cloudy": 0.45, "overcast": 0.0, "low sun": 0.7}[weather]
    azimuth = between(rng, 0, 2 * np.pi)
    elevation = np.radians(between(rng, 8, 20) if weather == "low sun" else between(rng, 25, 60))
    flat, up = np.cos(elevation), np.sin(elevation)
    canvas.to_sun = (float(flat * np.sin(azimuth)), float(up), float(flat * np.cos(azimuth)))
    warm = np.array((1.0, 0.72, 0.48) if weather == "low sun" else (1.0, 0.95, 0.86), np.float32)
    canvas.sun = strength * warm
    canvas.ambient = np.array((0.92, 0.98, 1.10), np.float32) * (0.98 - 0.5 * strength)
    cover = between(rng, 0.0, 0.45)
    if weather == "overcast":
        cover = 0.9
        zenith = np.array((0.98, 1.0, 1.03)) * between(rng, 0.7, 0.95)
        low = np.minimum(zenith * between(rng, 0.9, 1.15), 1)
    elif weather == "low sun":
        zenith, low = np.array((0.36, 0.46, 0.66)), np.array((0.98, 0.76, 0.52))
    else:
        cover += 0.4 * (weather == "cloudy")
        zenith = np.array((0.34, 0.54, 0.84)) * between(rng, 0.85, 1.2)
        low = np.array((0.74, 0.85, 0.95)) * between(rng, 0.9, 1.05)
    _sky(canvas, rng, zenith.astype(np.float32), low.astype(np.float32), cover)
    return (0.97 * low).astype(np.float32)


def _sky(canvas: Canvas, rng: np.random.Generator, zenith: Array, low: Array, cover: float) -> None:
    """A gradient, and clouds on a plane overhead so that they shrink towards the horizon."""
    rows = max(canvas.horizon, 1)
    canvas.mask[:rows] = SKY
    rise = np.maximum(-canvas.drop[:rows], 0)  # (rows, 1)
    t = np.minimum(rise * 1.6, 1) ** 0.7
    base = low + (zenith - low) * t[..., None]
    far = 1 / (rise + 0.12)
    i0, j0 = rng.integers(0, TILE, 2)
    cloud = noise(4, far * 26 + i0, canvas.rays * far * 13 + j0)
    cloud = np.clip((cloud - 0.85 + 0.7 * cover) * 3, 0, 1) * np.minimum(rise * 8, 1)
    white = np.minimum(low * 0.4 + 0.6, 1) if cover < 0.85 else low * 0.82
    canvas.image[:rows] = base + (white - base) * (0.85 * cloud[..., None])


SLABS = ((0.60, 0.58, 0.54), (0.68, 0.65, 0.60), (0.48, 0.47, 0.45), (0.62, 0.50, 0.43))
GRASS = ((0.32, 0.48, 0.18), (0.42, 0.50, 0.22), (0.26, 0.40, 0.14), (0.48, 0.48, 0.24))


def _ground(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Road with its markings, pavements with kerb and slabs, grass or yards behind them."""
    top = canvas.horizon
    z = canvas.eye / np.maximum(canvas.drop[top:], 1e-3)  # (h, 1)
    x = canvas.rays * z - street.bend * z * z  # (h, W), as if the street were straight
    left, right = street.sides
    outside = np.maximum(left.edge - x, x - right.edge)  # metres from the road, negative on it
    if street.junction:
        outside = np.where((z > street.junction[0]) & (z < street.junction[1]), np.float32(-1), outside)
    on_left = x < (left.edge + right.edge) / 2
    reach = [np.inf if side.paved else side.pavement for side in street.sides]
    is_road = outside <= 0
    is_pavement = ~is_road & (outside < np.where(on_left, *reach))

    part = np.full(x.shape, 2, np.uint8)
    part[is_road], part[is_pavement] = 0, 1
    canvas.mask[top:] = np.array((ROAD, PAVEMENT, VEGETATION), np.uint8)[part]
    part[is_pavement & (outside < 0.22)] = 3  # kerb
    part[is_road & _markings(rng, street, x, z, outside)] = 4
    asphalt = between(rng, 0.28, 0.42) * (1 + 0.04 * (2 * rng.random(3) - 1))
    slabs, grass = shade_of(rng, SLABS, 0.03), shade_of(rng, GRASS, 0.04)
    white = np.full(3, between(rng, 0.75, 0.95))
    colours = np.stack([asphalt, slabs, grass, slabs * 1.15 + 0.04, white])
    colours *= canvas.ambient + canvas.sun * canvas.to_sun[1]

    fine = np.minimum(canvas.focal / z / 24, 1)  # fades what is finer than a pixel
    shade = 0.86 + 0.28 * noise(5, z * 9, x * 9)
    shade += (noise(7, z * 22, x * 22) - 0.5) * fine * np.where(part == 2, np.float32(1.1), np.float32(0.3))
    slab = between(rng, 0.5, 1.1)
    joint = (frac(x / slab) < 0.08) | (frac(z / slab) < 0.08)
    shade -= (joint & (part == 1)) * (between(rng, 0.1, 0.3) * fine)
    shade -= (is_road & (outside > -0.3)) * np.float32(0.12)  # gutter
    canvas.image[top:] = colours.astype(np.float32)[part] * shade[..., None]
    canvas.depth[top:] = z * 1.001  # what stands on the ground is nearer
    canvas.ground[top:] = canvas.sunlit[top:] = True


def _markings(rng: np.random.Generator, street: Street, x: Array, z: Array, outside: Array) -> Array:
    """Where the road is painted, bool (h, W): lane lines, edge lines, a zebra crossing."""
    left, right = street.sides
    width = right.edge - left.edge
    painted = np.zeros(x.shape, bool)
    period, half = between(rng, 3.0, 7.0), between(rng, 0.06, 0.1)
    lanes = 3 if width > 9 and rng.random() < 0.5 else 2
    if rng.random() < 0.8:
        dash = frac(z / period) < 0.6
        for lane in range(1, lanes):
            painted |= (np.abs(x - (left.edge + width * lane / lanes)) < half) & dash
    if rng.random() < 0.35:
        painted |= np.abs(outside + 0.5) < half
    start = street.junction[0] - 4 if street.junction else between(rng, 6, 20)
    if rng.random() < (0.7 if street.junction else 0.25):
        zebra = (z > start) & (z < start + 3)
        painted = np.where(zebra, (frac(x) < 0.5) & (outside < -0.3), painted)
    if street.junction:
        painted &= (z < street.junction[0]) | (z > street.junction[1])
    return painted


def _skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    """Far houses or woods along the whole horizon."""
    towers = rng.random() < 0.6
    tall, step = between(rng, 4.0, 16.0 if towers else 10.0), between(rng, 6.0, 14.0)
    row = rng.integers(0, TILE)
    tint = shade_of(rng, WALLS if towers else LEAVES, 0.03)

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, float]:
        if towers:
            block = np.floor(a / step)
            outline = 0.3 + 0.9 * noise(7, block * 37 + row, block * 11)
        else:
            outline = 0.4 + 0.4 * noise(4, row + 0 * a, a * 1.2) + 0.35 * noise(6, 0 * a, a * 6)
        return (y < tall * outline).astype(np.uint8), np.stack([tint, tint]), 1

    wide = 1.3 * FAR * max(1.0, canvas.width / canvas.focal)
    canvas.panel((-wide, FAR), (wide, FAR), -1.0, 1.2 * tall, texture, BUILDING if towers else VEGETATION)

"""The painter of the scenes: a pinhole camera, vertical panels with a depth buffer, shadows, lens and sensor.

World coordinates are metres: X to the right, Y up from the road, Z forward; the camera stands at X = Z = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil, hypot
from typing import Any

import numpy as np

Array = np.ndarray
Point = tuple[float, float]  # (X, Z) on the ground
Texture = Callable[[Array, Array, Array], tuple[Array, Array, Any]]
"""Paints a panel: (a, y, ppm) -> (part, colours, shade).

a (1, w) are metres along the panel, y (h, w) metres above the road, ppm (1, w) pixels in a metre. part (h, w)
is 0 where the object is not and else a row of colours (P, 3), RGB in 0..1; shade, (h, w) or 1, multiplies
them.
"""

NEAR = 0.6  # metres; nothing closer is painted
TILE = 256  # side of the noise tile, a power of two


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """A uniform draw; several times faster than rng.uniform for a scalar."""
    return low + (high - low) * rng.random()


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def frac(x: Array) -> Array:
    """x mod 1, several times faster than np.mod."""
    return x - np.floor(x)


@lru_cache(maxsize=8)
def noise_tile(octaves: int) -> Array:
    """Noise that wraps around, float32 (256, 256) in 0..1 with mean near 0.5; more octaves, finer grain."""
    rng = np.random.default_rng(octaves)
    tile = np.zeros((TILE, TILE), np.float32)
    for octave in range(octaves):
        n = 4 << octave
        grid = rng.random((n, n), np.float32)
        at = np.arange(TILE) * n / TILE
        low = at.astype(int)
        t = (at - low).astype(np.float32)
        t = t * t * (3 - 2 * t)
        rows = grid[low] * (1 - t)[:, None] + grid[(low + 1) % n] * t[:, None]
        tile += (rows[:, low] * (1 - t) + rows[:, (low + 1) % n] * t) * 0.6**octave
    tile -= tile.min()
    return tile / tile.max()


def noise(octaves: int, i: Array, j: Array) -> Array:
    """The tile at integer parts of (i, j), which broadcast against each other."""
    return noise_tile(octaves)[i.astype(np.int32) & (TILE - 1), j.astype(np.int32) & (TILE - 1)]


class Canvas:
    """Camera, light, and what is painted: image float32 (H, W, 3), mask uint8 and depth float32 (H, W)."""

    def __init__(self, size: tuple[int, int], *, focal: float, centre: Point, eye: float) -> None:
        self.height, self.width = size
        self.focal, self.eye = focal, eye
        self.u0, self.v0 = centre  # vanishing point, in pixels
        columns = np.arange(self.width, dtype=np.float32)
        rows = np.arange(self.height, dtype=np.float32)[:, None]
        self.rays = (columns + 0.5 - self.u0) / focal  # (W,), X / Z of each column
        self.drop = (rows + 0.5 - self.v0) / focal  # (H, 1), (eye - Y) / Z of each row
        self.image = np.zeros((*size, 3), np.float32)
        self.mask = np.zeros(size, np.uint8)
        self.depth = np.full(size, np.inf, np.float32)
        self.ground = np.zeros(size, bool)  # ground that nothing covers yet
        self.sunlit = np.zeros(size, bool)
        self.ambient = np.ones(3, np.float32)
        self.sun = np.zeros(3, np.float32)
        self.to_sun = (0.0, 1.0, 0.0)  # unit vector (X, Y, Z)

    @property
    def horizon(self) -> int:
        """First row whose centre lies below the horizon."""
        return int(np.clip(np.ceil(self.v0 + 0.5), 0, self.height))

    def column(self, x: float, z: float) -> float:
        return self.u0 + self.focal * x / z

    def row(self, y: float, z: float) -> float:
        return self.v0 + self.focal * (self.eye - y) / z

    def outside(self, *points: Point) -> bool:
        """Nothing that stands between these points can be in the picture."""
        ahead = [p for p in points if p[1] > NEAR]
        if len(ahead) < len(points):
            return not ahead
        columns = [self.column(*p) for p in points]
        return max(columns) < 0 or min(columns) > self.width

    def light(self, p0: Point, p1: Point) -> Array:
        """RGB light on a vertical panel, on the side that faces the camera."""
        nx, nz = p1[1] - p0[1], p0[0] - p1[0]
        facing = (nx * self.to_sun[0] + nz * self.to_sun[2]) / (hypot(nx, nz) or 1.0)
        if nx * (p0[0] + p1[0]) + nz * (p0[1] + p1[1]) > 0:
            facing = -facing
        return self.ambient + self.sun * facing if facing > 0 else self.ambient

    def panel(self, p0: Point, p1: Point, base: float, top: float, texture: Texture, label: int) -> None:
        """Paint a vertical panel that stands between two points of the ground, where nothing nearer is."""
        (x0, z0), (x1, z1) = p0, p1
        if max(z0, z1) <= NEAR:
            return
        dx, dz = x1 - x0, z1 - z0
        ends = [(x, z) if z >= NEAR else (x0 + (NEAR - z0) / dz * dx, NEAR) for x, z in (p0, p1)]
        columns = [self.column(x, z) for x, z in ends]
        zs = [z for _, z in ends]
        box = self._box(columns, [self.row(base, z) for z in zs] + [self.row(top, z) for z in zs])
        if box is None:
            return
        rows, cols = box
        q = self.rays[cols][None]
        if dz:
            along = (q * z0 - x0) / (dx - q * dz)  # 0 at p0, 1 at p1; a panel seen edge-on covers no column
            z = np.maximum(z0 + along * dz, NEAR)
        else:
            along, z = (q * z0 - x0) / dx, np.full(q.shape, z0, np.float32)
        seen = z < self.depth[rows, cols]
        if not seen.any():
            return
        y = self.eye - self.drop[rows] * z
        seen &= y >= base
        seen &= y <= top
        part, colours, shade = texture(along * hypot(dx, dz), y, self.focal / z)
        seen &= part > 0
        colour = (colours * self.light(p0, p1)).astype(np.float32)[part[seen]]
        if isinstance(shade, np.ndarray):
            colour *= shade[seen][:, None]
        self.image[rows, cols][seen] = colour
        np.copyto(self.depth[rows, cols], z, where=seen)
        np.copyto(self.mask[rows, cols], np.uint8(label), where=seen)
        np.copyto(self.ground[rows, cols], False, where=seen)

    def upright(self, p: Point, width: float, base: float, top: float, texture: Texture, label: int) -> None:
        """Paint a panel that faces the camera and stands at p."""
        self.centred((p[0] - width / 2, p[1]), (p[0] + width / 2, p[1]), base, top, texture, label)

    def centred(self, p0: Point, p1: Point, base: float, top: float, texture: Texture, label: int) -> None:
        """Paint a panel whose texture has its a = 0 in the middle."""
        half = hypot(p1[0] - p0[0], p1[1] - p0[1]) / 2
        self.panel(p0, p1, base, top, lambda a, y, ppm: texture(a - half, y, ppm), label)

    def shadow(self, p0: Point, p1: Point, height: float) -> None:
        """The shadow on the ground of a vertical panel of this height."""
        if self.sun.max() > 0:
            reach = height / max(self.to_sun[1], 0.1)
            d = (-self.to_sun[0] * reach, -self.to_sun[2] * reach)
            factor = self.ambient / (self.ambient + self.sun * self.to_sun[1])
            self._darken(p0, p1, d, factor, self.sunlit)

    def contact(self, p0: Point, p1: Point, d: Point, factor: float) -> None:
        """Darken the ground under something, a parallelogram with sides p1 - p0 and d."""
        self._darken(p0, p1, d, np.float32(factor), self.ground)

    def _darken(self, p0: Point, p1: Point, d: Point, factor: Array, where: Array) -> None:
        corners = [p0, p1, (p1[0] + d[0], p1[1] + d[1]), (p0[0] + d[0], p0[1] + d[1])]
        if max(z for _, z in corners) <= NEAR:
            return
        if min(z for _, z in corners) > NEAR:
            columns = [self.column(x, z) for x, z in corners]
        else:
            columns = [0.0, float(self.width)]
        box = self._box(columns, [self.row(0, max(z, NEAR)) for _, z in corners])
        ex, ez = p1[0] - p0[0], p1[1] - p0[1]
        cross = ex * d[1] - ez * d[0]
        if box is None or abs(cross) < 1e-6:
            return
        rows, cols = box
        free = where[rows, cols] & self.ground[rows, cols]
        if not free.any():
            return
        z = self.eye / np.maximum(self.drop[rows], 1e-4)
        q = self.rays[cols]
        # A ground point is p0 + a (p1 - p0) + b d; both from -0.5 to 0.5 here.
        a = z * ((q * d[1] - d[0]) / cross) - ((p0[0] * d[1] - p0[1] * d[0]) / cross + 0.5)
        b = z * ((ex - q * ez) / cross) - ((p0[1] * ex - p0[0] * ez) / cross + 0.5)
        hit = free & (np.abs(a) <= 0.5) & (np.abs(b) <= 0.5)
        self.image[rows, cols][hit] *= factor
        np.copyto(self.sunlit[rows, cols], False, where=hit)

    def _box(self, columns: list[float], rows: list[float]) -> tuple[slice, slice] | None:
        """The pixels whose centres lie between these columns and rows, or None where there are none."""
        c0, c1 = (min(max(ceil(c - 0.5), 0), self.width) for c in (min(columns), max(columns)))
        r0, r1 = (min(max(ceil(r - 0.5), 0), self.height) for r in (min(rows), max(rows)))
        return (slice(r0, r1), slice(c0, c1)) if c0 < c1 and r0 < r1 else None


def develop(
    canvas: Canvas,
    rng: np.random.Generator,
    *,
    haze: Array,
    visibility: float,
    exposure: Array,
    blur: float,
    grain: float,
) -> Array:
    """The photograph, uint8 (H, W, 3): haze by depth, exposure and white balance, lens blur, sensor noise.

    `visibility`: metres in which haze takes 63 %; `exposure` (3,): factors on top of the automatic exposure;
    `blur`: outer weight of three taps; `grain`: standard deviation in grey levels.
    """
    clear = np.maximum(np.exp(canvas.depth * (-1 / visibility)), 0.3)
    clear[np.isinf(canvas.depth)] = 1  # the sky carries its own haze
    exposure = exposure * (0.5 / float(canvas.image.mean())) ** 0.7  # most of the way to an even brightness
    image = canvas.image - haze
    image *= clear[..., None]
    image += haze
    image *= exposure * 255
    for axis in (0, 1):
        _smooth(image, blur, axis)
    static = np.frombuffer(rng.bytes(image.size), np.int8).reshape(image.shape).astype(np.float32)
    static *= grain / 74  # 74: standard deviation of a random byte
    image += static
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _smooth(image: Array, weight: float, axis: int) -> None:
    """Three taps (weight, 1 - 2 weight, weight) along one axis, in place; the border keeps its value."""
    lines = image.swapaxes(0, axis)
    beside = lines[:-2] + lines[2:]
    beside *= weight
    lines[1:-1] *= 1 - 2 * weight
    lines[1:-1] += beside


def shade_of(rng: np.random.Generator, colours: Sequence[Sequence[float]], spread: float) -> Array:
    """One of these RGB colours, each channel moved by up to `spread` and kept in 0.03..1."""
    return np.minimum(np.maximum(pick(rng, colours) + spread * (2 * rng.random(3) - 1), 0.03), 1.0)

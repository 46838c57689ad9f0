"""Cars: boxes with a painted side, painted ends and a cabin that stands back from the ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scene_paint import Array, Canvas, Point, Texture, between, shade_of

PAINTS = (
    (0.85, 0.85, 0.86), (0.12, 0.12, 0.13), (0.45, 0.46, 0.48), (0.66, 0.67, 0.70), (0.62, 0.12, 0.12),
    (0.15, 0.25, 0.50), (0.30, 0.42, 0.55), (0.20, 0.34, 0.24), (0.75, 0.60, 0.15), (0.45, 0.33, 0.25),
)  # fmt: skip
TYRE, HUB, TAIL_LIGHT = (0.08, 0.08, 0.08), (0.5, 0.5, 0.5), (0.75, 0.1, 0.08)
HEAD_LIGHT, NUMBER_PLATE = (0.95, 0.94, 0.85), (0.9, 0.9, 0.9)
CAR_SHAPES = (  # the outline from rear to front: shares of the length, shares of the height
    ((0, 0.02, 0.16, 0.30, 0.60, 0.78, 0.97, 1), (0.45, 0.62, 0.66, 1.0, 1.0, 0.64, 0.55, 0.40)),  # saloon
    ((0, 0.02, 0.10, 0.20, 0.58, 0.76, 0.97, 1), (0.45, 0.68, 0.95, 1.0, 1.0, 0.66, 0.56, 0.40)),  # hatchback
    ((0, 0.01, 0.03, 0.30, 0.72, 0.88, 0.98, 1), (0.40, 0.95, 1.0, 1.0, 0.98, 0.62, 0.55, 0.40)),  # van
)


class Car:
    """One car: its size and the textures of its side, its ends and the ends of its cabin."""

    def __init__(self, rng: np.random.Generator) -> None:
        shape = int(rng.random() * 3)
        self.length = (4.5, 4.0, 4.6)[shape] * between(rng, 0.93, 1.07)
        self.height = (1.42, 1.5, 1.95)[shape] * between(rng, 0.96, 1.06)
        self.width = between(rng, 1.7, 1.9)
        self.outline = CAR_SHAPES[shape]
        self.rear_inset = (0.22, 0.14, 0.03)[shape]  # from the end to the cabin, as a share of the length
        self.front_inset = (0.32, 0.34, 0.2)[shape]
        self.waist = 0.62 * self.height if shape < 2 else 0.58 * self.height
        paint = shade_of(rng, PAINTS, 0.06)
        glass = shade_of(rng, ((0.10, 0.12, 0.14), (0.30, 0.36, 0.40)), 0.04)
        self.colours = np.stack(
            [paint, paint, paint * 0.78, glass, TYRE, HUB, TAIL_LIGHT, HEAD_LIGHT, NUMBER_PLATE]
        )  # by part: nothing, paint, lower paint, glass and so on

    def side(self, a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        """From the rear, a = 0, to the front."""
        f = np.clip(a / self.length, 0, 1)
        line = (np.interp(f, *self.outline) * self.height).astype(np.float32)
        part = np.zeros(y.shape, np.uint8)
        part[(y < line) & (y > 0.2)] = 1
        part[(part == 1) & (y < 0.36 * self.height)] = 2
        pillar = (np.abs(f - 0.46) < 0.012) | (np.abs(f - 0.27) < 0.012)
        part[(y > self.waist) & (y < line - 0.1) & (f > 0.1) & (f < 0.8) & ~pillar] = 3
        part[(f < 0.03) & (np.abs(y - 0.5 * self.height) < 0.1) & (part > 0)] = 6
        part[(f > 0.97) & (np.abs(y - 0.45 * self.height) < 0.08) & (part > 0)] = 7
        for axle in (0.19, 0.80):
            r = (a - axle * self.length) ** 2 + (y - 0.32) ** 2
            part[r < 0.33**2] = 4
            part[r < 0.18**2] = 5
        return part, self.colours, 0.82 + 0.22 * y / self.height

    def end(self, *, front: bool) -> Texture:
        """Bumper, lights and number plate below the waist; a is 0 at the middle."""

        def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
            s, t = np.abs(a) / (self.width / 2), y / self.height
            part = np.zeros(y.shape, np.uint8)
            part[(y > 0.22) & (t < 0.64 - 0.03 * s)] = 1
            part[(y > 0.22) & (t < 0.32)] = 2
            part[(s > 0.62) & (s < 0.96) & (y < 0.34)] = 4
            part[(s > 0.66) & (s < 0.97) & (np.abs(t - 0.47) < 0.06)] = 7 if front else 6
            part[(s < 0.3) & (np.abs(t - 0.36) < 0.04)] = 8
            if front:
                part[(s < 0.5) & (np.abs(t - 0.46) < 0.035)] = 4
            return part, self.colours, 0.85 + 0.2 * t

        return texture

    def cabin(self, a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        """The rear window or windscreen, its frame, and the paint under it."""
        s, t = np.abs(a) / (self.width / 2), y / self.height
        part = np.zeros(y.shape, np.uint8)
        edge = 1.0 - 0.5 * np.maximum(t - 0.62, 0)
        part[(s < edge) & (t > 0.4) & (t < 1)] = 1
        part[(s < edge - 0.1) & (t > 0.66) & (t < 0.94)] = 3
        return part, self.colours, 0.85 + 0.2 * t


def paint_car(canvas: Canvas, car: Car, x: float, z: float, heading: Point, label: int) -> None:
    """Paint a car whose middle stands at (x, z) and whose front points along the unit vector `heading`."""
    hx, hz = heading
    rx, rz = hz, -hx  # to the right of the heading

    def at(ahead: float, right: float) -> Point:
        return (x + hx * ahead + rx * right, z + hz * ahead + rz * right)

    half, wide = car.length / 2, car.width / 2
    sun_x, _, sun_z = canvas.to_sun
    if abs(sun_x * rx + sun_z * rz) > abs(sun_x * hx + sun_z * hz):
        canvas.shadow(at(-half, 0), at(half, 0), car.height)
    else:
        canvas.shadow(at(0, -wide), at(0, wide), car.height)
    length = car.length + 0.2
    left, right = at(-half - 0.1, -wide - 0.08), at(-half - 0.1, wide + 0.08)
    canvas.contact(left, right, (hx * length, hz * length), 0.45)
    for offset in (-wide, wide):
        middle = at(0, offset)
        if middle[0] * rx * offset + middle[1] * rz * offset < 0:
            canvas.panel(at(-half, offset), at(half, offset), 0, car.height, car.side, label)
    for ahead, inset in ((-half, car.rear_inset), (half, -car.front_inset)):
        middle = at(ahead, 0)
        if (middle[0] * hx + middle[1] * hz) * ahead >= 0:
            continue  # this end faces away
        end = car.end(front=ahead > 0)
        canvas.centred(at(ahead, -wide), at(ahead, wide), 0, car.height * 0.66, end, label)
        ahead += inset * car.length
        canvas.centred(at(ahead, -wide), at(ahead, wide), 0, car.height, car.cabin, label)

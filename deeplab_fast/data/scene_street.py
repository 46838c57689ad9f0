"""The plan of a street and what stands on it: houses, fences, trees, poles, signs, cars and people."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

import numpy as np

from . import scene_textures as textures
from .labels import Classes
from .scene_car import Car, paint_car
from .scene_paint import Canvas, Point, Texture, between, pick

SCENES = Classes(
    ("sky", "building", "road", "pavement", "vegetation", "car", "person", "pole", "sign", "fence"),
    (
        (112, 172, 222), (124, 104, 100), (96, 72, 120), (226, 150, 196), (98, 158, 72),
        (30, 60, 176), (226, 44, 62), (236, 196, 60), (252, 118, 28), (150, 220, 206),
    ),
)  # fmt: skip
SKY, BUILDING, ROAD, PAVEMENT, VEGETATION, CAR, PERSON, POLE, SIGN, FENCE = range(len(SCENES))

# How many there are and how small they get: least and most.
PEOPLE = (2, 7)  # in a scene
SIGNS = (0.2, 2.0)  # on a side of the street, rounded down
CARS = (0, 2)  # in each of two lanes
PARKED = (1, 4)  # on a side that has any
PERSON_AT, SIGN_AT, LAMPS_TO = (3.0, 9.0), (4.0, 9.0), 30.0  # metres from the camera
THIN = 6.0 / 128  # the narrowest pole, as a share of the image's height


@dataclass
class Side:
    """One side of the street; offsets are metres from the road's edge, outwards."""

    sign: int  # -1 left, 1 right
    edge: float  # X of the road's edge at Z = 0
    pavement: float  # width
    garden: float  # width of the ground between pavement and walls
    paved: bool  # that ground is pavement, not grass
    kind: str  # "town", "suburb", "park" or "works"


@dataclass
class Street:
    sides: tuple[Side, Side]
    bend: float  # X moves by bend * Z ** 2
    junction: tuple[float, float] | None  # Z where a side street begins and ends
    end: float  # Z where the street ends

    def at(self, side: Side, offset: float, z: float) -> Point:
        return (side.edge + side.sign * offset + self.bend * z * z, z)

    def across(self, share: float, z: float) -> Point:
        """A point of the road: share 0 at its left edge, 1 at its right."""
        left, right = self.sides
        return (left.edge + share * (right.edge - left.edge) + self.bend * z * z, z)

    def crossed(self, z0: float, z1: float) -> bool:
        """The side street meets what lies from z0 to z1."""
        return self.junction is not None and z0 < self.junction[1] and z1 > self.junction[0]


def draw_street(rng: np.random.Generator) -> Street:
    """A random plan; the camera stands on the road, or now and then on a pavement."""
    road = between(rng, 5.5, 11.0)
    left = -road * between(rng, 0.1, 0.9)
    if rng.random() < 0.25:
        left = pick(rng, (between(rng, 0.5, 2.5), -road - 1.5))
    kinds = ("town", "town", "suburb", "suburb", "park", "works")
    theme = pick(rng, kinds)
    sides = []
    for sign, edge in ((-1, left), (1, left + road)):
        kind = theme if rng.random() < 0.6 else pick(rng, kinds)
        garden = 0.0 if kind == "town" else between(rng, 2.0, 6.0)
        paved = kind == "works" and rng.random() < 0.5
        sides.append(Side(sign, edge, between(rng, 1.8, 4.0), garden, paved, kind))
    start = between(rng, 9.0, 30.0)
    return Street(
        sides=(sides[0], sides[1]),
        bend=between(rng, -0.004, 0.004) if rng.random() < 0.6 else 0.0,
        junction=(start, start + between(rng, 5.0, 9.0)) if rng.random() < 0.5 else None,
        end=between(rng, 35.0, 80.0),
    )


def populate(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Paint all that stands on the ground; near things first, since what they hide is then skipped."""
    _traffic(canvas, street, rng)
    _people(canvas, street, rng)
    for side in street.sides:
        _kerb(canvas, street, side, rng)
        _plots(canvas, street, side, rng)
    if rng.random() < 0.6:
        _end(canvas, street, rng)


def _traffic(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Cars in two lanes, and now and then one that crosses at the junction."""
    for share, forward in ((0.3, -1), (0.7, 1)):
        z = between(rng, 4.5, 20.0)
        for _ in range(rng.integers(CARS[0], CARS[1] + 1)):
            if not street.crossed(z - 2.5, z + 2.5):
                _car(canvas, street, Car(rng), street.across(share, z), forward)
            z += between(rng, 6.5, 18.0)
    if street.junction and rng.random() < 0.5:
        x, z = street.across(between(rng, -0.8, 1.8), sum(street.junction) / 2)
        paint_car(canvas, Car(rng), x, z, (pick(rng, (-1.0, 1.0)), 0.0), CAR)


def _car(canvas: Canvas, street: Street, car: Car, p: Point, forward: int) -> None:
    slope = 2 * street.bend * p[1]
    norm = hypot(slope, 1.0) * forward
    paint_car(canvas, car, *p, (slope / norm, 1 / norm), CAR)


def _people(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """On the pavements, some of them on the road."""
    for _ in range(rng.integers(PEOPLE[0], PEOPLE[1] + 1)):
        z, side = between(rng, *PERSON_AT), pick(rng, street.sides)
        x, _ = street.at(side, between(rng, 0.5, side.pavement), z)
        if rng.random() < 0.2:
            x, _ = street.across(rng.random(), z)
        tall = between(rng, 1.5, 1.92) if rng.random() < 0.85 else between(rng, 1.05, 1.4)
        if canvas.outside((x - 0.5, z), (x + 0.5, z)):
            continue
        canvas.shadow((x - 0.22, z), (x + 0.22, z), tall)
        canvas.contact((x - 0.35, z - 0.2), (x + 0.35, z - 0.2), (0.0, 0.4), 0.6)
        canvas.upright((x, z), 0.62 * tall, 0, tall, textures.person(rng, tall), PERSON)


def _kerb(canvas: Canvas, street: Street, side: Side, rng: np.random.Generator) -> None:
    """Lamps, trees, bollards or a railing, signs along the kerb, and cars parked beside it."""
    lamps, trees, arm = rng.random() < 0.8, rng.random() < 0.3, between(rng, 1.0, 2.2)
    tall, thick, gap = between(rng, 4.5, 8.0), between(rng, 0.16, 0.26), between(rng, 11.0, 18.0)
    z = between(rng, 4.0, 12.0)
    while z < LAMPS_TO:
        if lamps and not street.crossed(z, z):
            _post(canvas, rng, street.at(side, 0.6, z), thick, tall, -side.sign * arm)
        if trees and not street.crossed(z + gap / 2, z + gap / 2):
            _tree(canvas, street.at(side, 1.0, z + gap / 2), rng)
        z += gap
    furniture = rng.random()
    if furniture < 0.3:
        for z in np.arange(4.0, 20.0, 2.2).tolist():
            if not street.crossed(z, z):
                _post(canvas, rng, street.at(side, 0.4, z), 0.28, 1.0, 0.0)
    elif furniture < 0.55:
        _border(canvas, street, side, rng, 0.25, 1.1, textures.fence(rng, 1.1), FENCE)
    for _ in range(int(between(rng, *SIGNS))):
        z = between(rng, *SIGN_AT)
        if not street.crossed(z, z):
            _sign(canvas, street.at(side, between(rng, 0.3, 1.2), z), rng)
    if rng.random() < 0.45:
        z = between(rng, 5.0, 15.0)
        for _ in range(rng.integers(PARKED[0], PARKED[1] + 1)):
            car, forward = Car(rng), side.sign if rng.random() < 0.7 else -side.sign
            if not street.crossed(z - 3.0, z + 3.0):
                _car(canvas, street, car, street.at(side, -1.15, z), forward)
            z += car.length + between(rng, 0.8, 5.0)


def _post(canvas: Canvas, rng: np.random.Generator, p: Point, width: float, top: float, arm: float) -> None:
    """A pole, a bollard, or a street lamp with an arm of this signed length."""
    x, z = p
    width = max(width, THIN * canvas.height * z / canvas.focal)
    canvas.shadow((x - width / 2, z), (x + width / 2, z), top)
    canvas.upright(p, 1.6 * width, 0, top, textures.mast(rng, width), POLE)
    if arm:
        texture = textures.lamp(rng, abs(arm), width, top)
        canvas.panel(p, (x + arm, z), top - 2 * width, top, texture, POLE)


def _sign(canvas: Canvas, p: Point, rng: np.random.Generator) -> None:
    radius, middle = between(rng, 0.48, 0.70), between(rng, 2.5, 3.4)
    _post(canvas, rng, p, 0.12, middle - 0.2, 0.0)
    face = textures.plate(rng, radius, middle)
    canvas.upright((p[0], p[1] - 0.1), 2 * radius, middle - radius, middle + radius, face, SIGN)


def _tree(canvas: Canvas, p: Point, rng: np.random.Generator) -> None:
    x, z = p
    tall = between(rng, 4.0, 9.0)
    wide = tall * between(rng, 0.2, 0.36)
    if z < 3.5 or canvas.outside((x - 2 * wide, z), (x + 2 * wide, z)):
        return  # so near that it would fill the picture, or not in it
    if rng.random() < 0.2:  # a poplar or a conifer
        blobs = [(0.0, tall * f, wide * 0.9 * (1.15 - f), tall * 0.22) for f in (0.3, 0.5, 0.7, 0.85)]
    else:
        blobs = [(0.0, tall * 0.65, wide, tall * 0.28)]
        for _ in range(3):
            aside, up = between(rng, -0.8, 0.8) * wide, tall * between(rng, 0.5, 0.85)
            blobs.append((aside, up, wide * 0.6, tall * 0.2))
    canvas.shadow((x - wide * 0.7, z), (x + wide * 0.7, z), tall)
    texture = textures.foliage(rng, blobs, between(rng, 0.12, 0.22), canvas.to_sun[0])
    canvas.upright(p, 3.6 * wide, 0, tall * 1.1, texture, VEGETATION)


def _plots(canvas: Canvas, street: Street, side: Side, rng: np.random.Generator) -> None:
    """What stands behind the pavement, plot by plot, and the fence or hedge before it."""
    if rng.random() < {"town": 0.0, "suburb": 0.75, "park": 0.6, "works": 0.85}[side.kind]:
        tall = between(rng, 0.9, 1.7)
        fenced = rng.random() < 0.75
        texture, label = (textures.fence(rng, tall), FENCE) if fenced else (textures.hedge(rng, tall), VEGETATION)
        _border(canvas, street, side, rng, side.pavement - 0.05, tall, texture, label)
    z = between(rng, -8.0, 1.0)
    while z < street.end:
        far = z + between(rng, 7.0, 15.0) * (1.6 if side.kind == "works" else 1.0)
        following = far
        if side.kind != "town" or rng.random() < 0.15:
            following += between(rng, 1.0, 5.0)
        if street.junction and street.crossed(z - 1.5, far + 1.5):
            far, following = street.junction[0] - 1.5, street.junction[1] + 1.51
        if far - z > 4:
            _plot(canvas, street, side, rng, z, far)
        z = following


def _plot(canvas: Canvas, street: Street, side: Side, rng: np.random.Generator, z0: float, z1: float) -> None:
    """A house or shed, or trees."""
    offset = side.pavement + side.garden
    if side.kind == "park" or (side.kind == "suburb" and rng.random() < 0.12):
        for _ in range(rng.integers(1, 4)):
            _tree(canvas, street.at(side, offset + between(rng, -1.0, 6.0), between(rng, z0, z1)), rng)
        return
    near, far = street.at(side, offset, z0), street.at(side, offset, z1)
    deep = 9.0 * side.sign
    corner = (near[0] + deep, near[1])
    if canvas.outside(near, far, corner):
        return
    height = between(rng, *{"town": (7.0, 20.0), "suburb": (3.0, 6.5), "works": (4.0, 8.0)}[side.kind])
    rise = between(rng, 1.5, 3.2) if side.kind == "suburb" or rng.random() < 0.35 else 0.0
    wall = textures.facade(rng, height, shop=side.kind == "town" and rng.random() < 0.5)
    canvas.shadow(near, far, height)
    canvas.panel(near, far, 0, height, wall, BUILDING)
    if side.sign * near[0] > 0:  # the end wall faces the street
        end = textures.gable(wall, height, rise, abs(deep)) if rise else wall
        canvas.panel(near, corner, 0, height + rise, end, BUILDING)
    if rise:
        # A slope is painted as an upright panel that stands back: from the street they look alike.
        back = 0.28 * deep
        tiles = textures.roof(rng, height, rise, hypot(far[0] - near[0], far[1] - near[1]))
        p0, p1 = (near[0] + back, near[1]), (far[0] + back, far[1])
        canvas.panel(p0, p1, height, height + rise, tiles, BUILDING)
    if side.garden > 3 and not side.paved and rng.random() < 0.4:
        _tree(canvas, street.at(side, offset - 1.2, between(rng, z0, z1)), rng)


def _border(
    canvas: Canvas, street: Street, side: Side, rng: np.random.Generator,
    offset: float, tall: float, texture: Texture, label: int,
) -> None:  # fmt: skip
    """A fence or hedge along the street, in straight pieces, some left out."""
    step = 7.0 if street.bend else 12.0
    for z in np.arange(0.3, min(street.end, 45.0), step).tolist():
        if rng.random() < 0.9 and not street.crossed(z - 1, z + step + 1):
            p0, p1 = street.at(side, offset, z), street.at(side, offset, z + step)
            canvas.shadow(p0, p1, tall)
            canvas.panel(p0, p1, 0, tall, texture, label)


def _end(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Houses across the end of the street."""
    x, z = street.across(0.5, street.end + 4.0)
    for sign in (-1, 1):
        near = x
        for _ in range(2):
            far, height = near + sign * between(rng, 8.0, 16.0), between(rng, 5.0, 14.0)
            wall = textures.facade(rng, height, shop=False)
            canvas.panel((near, z), (far, z), 0, height, wall, BUILDING)
            near = far

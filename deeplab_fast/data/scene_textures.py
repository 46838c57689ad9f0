"""What panels look like: walls, roofs, fences, leaves, people, poles and signs, as `scene_paint.Texture`s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .scene_paint import TILE, Array, Texture, between, frac, noise, pick, shade_of

WALLS = (
    (0.64, 0.34, 0.26), (0.54, 0.30, 0.24), (0.74, 0.55, 0.38), (0.85, 0.80, 0.70), (0.92, 0.92, 0.92),
    (0.55, 0.56, 0.58), (0.72, 0.70, 0.66), (0.48, 0.55, 0.64), (0.80, 0.72, 0.52), (0.82, 0.60, 0.54),
)  # fmt: skip
ROOFS = ((0.54, 0.26, 0.20), (0.32, 0.30, 0.31), (0.42, 0.34, 0.30), (0.60, 0.34, 0.24))
CLOTHES = (
    (0.16, 0.20, 0.45), (0.80, 0.18, 0.18), (0.88, 0.86, 0.82), (0.20, 0.20, 0.24), (0.20, 0.45, 0.35),
    (0.90, 0.70, 0.20), (0.60, 0.40, 0.28), (0.50, 0.25, 0.50), (0.85, 0.45, 0.20), (0.45, 0.60, 0.80),
)  # fmt: skip
LEAVES = ((0.24, 0.42, 0.14), (0.32, 0.48, 0.16), (0.18, 0.36, 0.16), (0.40, 0.48, 0.18), (0.54, 0.42, 0.14))
METALS = ((0.36, 0.37, 0.39), (0.60, 0.62, 0.63), (0.18, 0.20, 0.21), (0.16, 0.27, 0.22))
FENCES = (
    (0.90, 0.90, 0.87), (0.50, 0.33, 0.20), (0.64, 0.48, 0.32), (0.20, 0.30, 0.26), (0.45, 0.46, 0.48),
    (0.36, 0.22, 0.16),
)  # fmt: skip


def facade(rng: np.random.Generator, height: float, *, shop: bool) -> Texture:
    """A wall of brick or plaster with rows of windows, a plinth, a cornice and perhaps a shop front."""
    wall = shade_of(rng, WALLS, 0.06)
    glass = shade_of(rng, ((0.16, 0.19, 0.23), (0.28, 0.34, 0.40), (0.45, 0.52, 0.58)), 0.04)
    trim = np.minimum(wall * between(rng, 0.65, 1.35), 1)
    sign = shade_of(rng, CLOTHES, 0.05)
    colours = np.stack([wall, wall, trim, glass, glass * 0.6, glass * 1.5 + 0.08, sign, wall * 0.8])
    storey, bay = between(rng, 2.7, 3.6), between(rng, 1.7, 3.4)
    left, sill, lintel = between(rng, 0.18, 0.32), between(rng, 0.22, 0.36), between(rng, 0.74, 0.88)
    right = 1 - left if rng.random() < 0.8 else 0.95
    ground_floor = 3.4 if shop else storey
    brick = between(rng, 0.05, 0.22) if rng.random() < 0.6 else 0.0
    band = 0.07 if rng.random() < 0.5 else 0.0
    panes = np.array((3, 3, 3, 4, 5), np.uint8)[rng.integers(0, 5, (16, 16))]
    i0, j0 = rng.integers(0, TILE, 2)

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Array]:
        across, up = a / bay, (y - ground_floor) / storey
        cell_a, cell_y = np.floor(across), np.floor(up)
        fa, fy = across - cell_a, up - cell_y
        part = np.where(fy < band, np.uint8(2), np.uint8(1))
        part[(fa > left) & (fa < right) & (fy > sill) & (fy < lintel)] = 2
        frame = 0.05 * (ppm > 14)
        pane = (fa > left + frame) & (fa < right - frame) & (fy > sill + frame) & (fy < lintel - frame)
        np.copyto(part, panes[cell_a.astype(np.int32) & 15, cell_y.astype(np.int32) & 15], where=pane)
        if shop:
            low = y < ground_floor
            part[low] = 7
            part[low & (y > 0.5) & (y < 2.6) & (np.abs(fa - 0.5) < 0.42)] = 3
            part[low & (y > 2.75)] = 6
        part[y > height - 0.35] = 2
        part[y < 0.4] = 7
        shade = 0.86 + 0.28 * noise(6, y * 12 + i0, a * 12 + j0)
        if brick:
            course = y * 4
            row = np.floor(course)
            joint = (course - row < 0.22) | (frac(a * 2 + row * 0.5) < 0.1)
            shade -= (joint & (part == 1)) * (brick * np.minimum(ppm / 20, 1))
        return part, colours, shade

    return texture


def roof(rng: np.random.Generator, base: float, rise: float, length: float) -> Texture:
    """A tiled roof with slanted ends."""
    colour = shade_of(rng, ROOFS, 0.06)
    hip = between(rng, 0.0, 1.0) * rise

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Array]:
        up = (y - base) / rise
        part = ((a > hip * up) & (a < length - hip * up)).astype(np.uint8)
        lines = (frac(y * 3) < 0.3) * np.minimum(ppm / 16, 1)
        return part, np.stack([colour, colour]), 1.05 - 0.14 * lines - 0.1 * noise(6, y * 9, a * 9)

    return texture


def gable(wall: Texture, height: float, rise: float, length: float) -> Texture:
    """A wall under a pointed roof."""

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Array]:
        part, colours, shade = wall(a, y, ppm)
        peak = height + rise * (1 - np.abs(2 * a / length - 1))
        part[(y > height - 0.5) & (part > 1)] = 1
        part[y > peak] = 0
        return part, colours, shade

    return texture


def fence(rng: np.random.Generator, top: float) -> Texture:
    """Boards, pickets, railings or panels; the gaps are painted dark and are fence too."""
    kind = int(rng.random() * 4)
    colour = shade_of(rng, FENCES, 0.04)
    colours = np.stack([colour, colour, colour * 0.55, colour * 0.35 + 0.06])
    pitch = (0.22, 0.30, 0.26, 1.6)[kind] * between(rng, 0.8, 1.3)

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        part = np.ones(y.shape, np.uint8)
        f = frac(a / pitch)
        if kind == 0:  # boards
            part[np.broadcast_to(f < 0.15, y.shape)] = 2
        elif kind == 1:  # pickets
            rail = (np.abs(y - 0.3 * top) < 0.06) | (np.abs(y - 0.8 * top) < 0.06)
            part[(f < 0.42) & ~rail] = 3
            part[(f >= 0.42) & (y > top * (1 - 0.25 * np.abs(f - 0.71)))] = 1
        elif kind == 2:  # railings
            rail = (y > top - 0.1) | (np.abs(y - 0.18) < 0.06)
            part[(f < 0.55) & ~rail] = 3
        else:  # panels between posts
            part[(f > 0.1) & (y < top - 0.12)] = 2
            part[(f > 0.1) & (frac(y / 0.3) < 0.2) & (y < top - 0.12)] = 3
        return part, colours, 0.9 + 0.2 * noise(5, y * 20, a * 20)

    return texture


def foliage(
    rng: np.random.Generator, blobs: Sequence[tuple[float, float, float, float]], trunk: float, lean: float
) -> Texture:
    """Leaves in ellipses (centre a, centre y, radii) with ragged edges, over a trunk of this half width."""
    leaf = shade_of(rng, LEAVES, 0.05)
    bark = shade_of(rng, ((0.30, 0.24, 0.19), (0.40, 0.36, 0.32)), 0.04)
    colours = np.stack([leaf, leaf, bark])
    i0, j0 = rng.integers(0, TILE, 2)
    crown = max(cy for _, cy, _, _ in blobs)

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Array]:
        inside = np.full(y.shape, -1.0, np.float32)
        for ca, cy, ra, ry in blobs:
            np.maximum(inside, 1 - ((a - ca) / ra) ** 2 - ((y - cy) / ry) ** 2, out=inside)
        rough = noise(6, y * 14 + i0, a * 14 + j0)
        part = (inside + (rough - 0.5) * 0.9 > 0).astype(np.uint8)
        part[(part == 0) & (np.abs(a) < trunk) & (y < crown)] = 2
        light = 0.35 + 1.0 * rough + np.clip(0.12 * (y - crown) + lean * a * 0.12, -0.3, 0.3)
        light[part == 2] = 1
        return part, colours, light

    return texture


def hedge(rng: np.random.Generator, top: float) -> Texture:
    leaf = shade_of(rng, LEAVES, 0.05)
    i0 = rng.integers(0, TILE)

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Array]:
        rough = noise(6, y * 18 + i0, a * 18)
        part = (y < top - 0.5 * rough * top * 0.5).astype(np.uint8)
        return part, np.stack([leaf, leaf]), 0.4 + rough + 0.15 * (y - top)

    return texture


def person(rng: np.random.Generator, tall: float) -> Texture:
    """Someone who walks or stands: head, hair, torso, arms, legs, sometimes a skirt or a bag."""
    skin = shade_of(rng, ((0.85, 0.66, 0.55), (0.62, 0.44, 0.33), (0.36, 0.25, 0.19)), 0.05)
    hair = shade_of(rng, ((0.12, 0.09, 0.08), (0.35, 0.24, 0.15), (0.65, 0.52, 0.32), (0.6, 0.6, 0.6)), 0.04)
    coat, legs, bag = (shade_of(rng, CLOTHES, 0.06) for _ in range(3))
    colours = np.stack([coat, coat, coat * 0.8, legs, skin, hair, bag, legs * 0.4])
    stride, swing = between(rng, 0.03, 0.13), between(rng, 0.0, 0.1)
    skirt, hem = rng.random() < 0.25, between(rng, 0.3, 0.46)
    carries, side = rng.random() < 0.4, pick(rng, (-1, 1))
    girth = between(rng, 0.115, 0.15)

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        s, t = a / tall, y / tall
        part = np.zeros(y.shape, np.uint8)
        spread = 0.035 + stride * (1 - t / 0.48)
        part[(np.abs(np.abs(s) - spread) < 0.062) & (t < 0.5)] = 3
        part[(part == 3) & (t < 0.05)] = 7
        part[(np.abs(np.abs(s) - girth - 0.02 - swing * (0.8 - t)) < 0.036) & (t > 0.44) & (t < 0.81)] = 2
        width = girth * (1 - 2.2 * np.maximum(t - 0.78, 0) / 0.12)
        part[(np.abs(s) < width) & (t > hem) & (t < 0.85)] = 1
        if skirt:
            part[(np.abs(s) < 0.1 + 0.12 * (0.5 - t)) & (t > 0.26) & (t < 0.5)] = 3
        if carries:
            part[(np.abs(s - side * (girth + 0.03)) < 0.07) & (np.abs(t - 0.5) < 0.09)] = 6
        head = (s / 0.062) ** 2 + ((t - 0.915) / 0.082) ** 2
        part[head < 1] = 4
        part[(head < 1.25) & (t > 0.945)] = 5
        return part, colours, 0.85 + 0.3 * np.clip(t, 0, 1)

    return texture


def mast(rng: np.random.Generator, width: float) -> Texture:
    """A pole, lighter on one side, with a thicker foot; its panel is 1.6 widths wide."""
    colour = shade_of(rng, METALS, 0.04)
    colours = np.stack([colour, colour, colour * 1.25, colour * 0.7])
    bright = between(rng, -0.3, 0.3) * width

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        stem = np.where(np.abs(a) <= width / 2, np.where(a < bright, 2, 1), 0)
        return np.where(y < 0.5, 3, stem), colours, 1

    return texture


def lamp(rng: np.random.Generator, reach: float, thick: float, top: float) -> Texture:
    """An arm that starts at a = 0 and the lamp under its outer half."""
    metal = shade_of(rng, METALS, 0.04)
    colours = np.stack([metal, metal, metal * 0.4 + 0.5])

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        return np.where(y > top - thick, 1, np.where(a > 0.5 * reach, 2, 0)), colours, 1

    return texture


RED, WHITE, BLUE, YELLOW, GREEN, BLACK = (
    (0.80, 0.10, 0.10), (0.95, 0.95, 0.93), (0.08, 0.28, 0.70),
    (0.95, 0.76, 0.08), (0.06, 0.42, 0.25), (0.10, 0.10, 0.10),
)  # fmt: skip
SIGNS = (  # rim, field, symbol
    (RED, WHITE, BLACK), (RED, RED, WHITE), (WHITE, BLUE, WHITE), (BLUE, BLUE, WHITE), (BLACK, YELLOW, BLACK),
    (WHITE, GREEN, WHITE), (WHITE, WHITE, BLACK),
)  # fmt: skip


def plate(rng: np.random.Generator, radius: float, middle: float) -> Texture:
    """A traffic sign: a triangle, a square, a diamond or a disc, with a rim and perhaps a symbol."""
    shape, bar = (
        pick(rng, ("triangle", "square", "diamond", "disc", "disc")),
        pick(rng, ("flat", "upright", "none")),
    )
    rim, field, symbol = pick(rng, SIGNS)
    colours = np.array([rim, rim, field, symbol])

    def texture(a: Array, y: Array, ppm: Array) -> tuple[Array, Array, Any]:
        s, t = np.abs(a) / radius, (y - middle) / radius
        if shape == "triangle":
            edge = np.maximum(s * 1.73 + t, -2 * t)
        elif shape == "square":
            edge = np.maximum(s, np.abs(t)) * 1.1
        elif shape == "diamond":
            edge = s + np.abs(t)
        else:
            edge = np.sqrt(s * s + t * t)
        part = np.where(edge < 0.74, 2, np.where(edge <= 1, 1, 0))
        if bar == "flat":
            part[(np.abs(t) < 0.18) & (s < 0.5)] = 3
        elif bar == "upright":
            part[(s < 0.15) & (np.abs(t) < 0.45)] = 3
        return part, colours, 1

    return texture

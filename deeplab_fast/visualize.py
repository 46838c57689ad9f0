"""Pictures for people: colour masks, overlays with a legend, sample grids, curves and the confusion matrix.

Images are uint8 (H, W, 3) RGB and masks uint8 (H, W), as arrays or CPU tensors. Pixels of value 255 (ignore)
are white in colour masks and show the bare image in overlays. Every file is written atomically. PNG and JPEG
files of `save_palette_png` and `save_image` carry a mark, and `check_replaceable` spares files without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .data.labels import IGNORE, Classes
from .errors import UserError
from .files import atomic_path

Sample = tuple[np.ndarray, np.ndarray | None, np.ndarray]  # image, truth, prediction
IGNORE_COLOUR = (255, 255, 255)
PAPER, INK, FRAME = (255, 255, 255), (20, 20, 20), (120, 120, 120)
SOFTWARE = "deeplab_fast"
# The mark as bytes: PNG's text chunk Software (PNG specification, section 11.3.3) and JPEG's COM segment, whose
# length counts itself. Both come before the pixels, so that no decoder is needed to find them.
_MARKS = (b"tEXtSoftware\0" + SOFTWARE.encode(), b"\xff\xfe\0\x0e" + SOFTWARE.encode())
_HEAD = 2048


def colour_table(classes: Classes) -> np.ndarray:
    """uint8 (256, 3): the colour of each mask value; white for 255, black for values that are no class."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.palette
    table[IGNORE] = IGNORE_COLOUR
    return table


def colourise(mask: np.ndarray, classes: Classes) -> np.ndarray:
    """mask uint8 (H, W) -> uint8 (H, W, 3). A value that is neither a class nor 255 raises UserError."""
    mask = np.asarray(mask)
    _check(mask, classes)
    return colour_table(classes)[mask]


def save_palette_png(path: str | os.PathLike[str], mask: np.ndarray, classes: Classes) -> None:
    """Write an 8-bit palette PNG: its indices are the mask, its palette the colours, 255 included."""
    mask = np.ascontiguousarray(mask, np.uint8)
    _check(mask, classes)
    picture = Image.fromarray(mask)
    picture.putpalette(colour_table(classes).tobytes())
    _save(path, picture)


def overlay(image: np.ndarray, mask: np.ndarray, classes: Classes, *, alpha: float = 0.55) -> np.ndarray:
    """The image tinted by class, with a white line where the class changes -> uint8 (H, W, 3).

    alpha: share of the class colour in [0, 1]; 0 gives the bare image. A class whose colour is black, such as
    VOC's background, is tinted half as much, so that the picture stays bright.
    """
    image, mask = np.asarray(image), np.asarray(mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"image {image.shape} and mask {mask.shape} differ in size")
    colours = colour_table(classes)
    weight = np.full(256, round(255 * alpha), np.uint8)
    weight[~colours.any(1)] //= 2
    weight[IGNORE] = 0
    picture = Image.fromarray(image)
    picture.paste(Image.fromarray(colourise(mask, classes)), mask=Image.fromarray(weight[mask]))
    line = np.where(_edges(mask), np.uint8(round(255 * alpha)), np.uint8(0))
    picture.paste(IGNORE_COLOUR, mask=Image.fromarray(line))
    return np.asarray(picture)


def overlay_with_legend(image: np.ndarray, mask: np.ndarray, classes: Classes, *, alpha: float = 0.55) -> np.ndarray:
    """`overlay` above a strip with the colour and name of each class in the mask -> uint8 (H', W', 3).

    The text grows with the image; an image too narrow for a legend is centred on a page 240 pixels wide.
    """
    height, width = np.asarray(mask).shape
    size = max(12, round(0.022 * (height * width) ** 0.5))
    picture = Image.fromarray(overlay(image, mask, classes, alpha=alpha))
    legend = _legend(classes, np.unique(mask), max(width, 240), size)
    page = Image.new("RGB", (max(width, legend.width), height + legend.height), PAPER)
    page.paste(picture, ((page.width - width) // 2, 0))
    page.paste(legend, (0, height))
    return np.asarray(page)


def sample_grid(rows: Sequence[Sample], classes: Classes, *, cell: int = 480) -> np.ndarray:
    """Rows of (image, truth, prediction) under column titles, with a legend below -> uint8 (H, W, 3).

    A truth of None leaves its cell empty. cell: longest side of each picture, in pixels.
    """
    gap, size = cell // 60, max(12, cell // 26)
    strips = [_strip(row, classes, cell, gap) for row in rows]
    present = {int(value) for row in rows for mask in row[1:] if mask is not None for value in np.unique(mask)}
    width = 3 * cell + 4 * gap
    legend = _legend(classes, sorted(present), width, size)
    title = Image.new("RGB", (width, 2 * size), PAPER)
    for column, text in enumerate(("image", "truth", "prediction")):
        centre = (gap + column * (cell + gap) + cell // 2, size)
        ImageDraw.Draw(title).text(centre, text, INK, ImageFont.load_default(size), anchor="mm")
    parts = [title, *strips, legend]
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return np.array(page)  # not asarray, whose result is read-only


def save_samples(path: str | os.PathLike[str], rows: Sequence[Sample], classes: Classes) -> None:
    """Write `sample_grid` to an image file."""
    save_image(path, sample_grid(rows, classes))


def save_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) in the format that the suffix names."""
    _save(path, Image.fromarray(np.ascontiguousarray(image)))


def check_replaceable(paths: Iterable[Path]) -> None:
    """UserError for the first of `paths` that exists and is not a picture with this module's mark."""
    for path in paths:
        head = b""
        try:
            if not path.exists():
                continue
            if path.is_file():
                with path.open("rb") as file:
                    head = file.read(_HEAD)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if not any(mark in head for mark in _MARKS):
            raise UserError(
                f"{path} was not written by {SOFTWARE} and is not replaced; choose another folder, or move it away"
            )


def save_curves(path: str | os.PathLike[str], records: Sequence[dict[str, Any]]) -> None:
    """Loss, learning rate and mIoU over steps, from the records of metrics.jsonl.

    A record holds `step` and any of `loss`, `lr` and `miou`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (key, label) in zip(panels, {"loss": "loss", "lr": "learning rate", "miou": "mIoU"}.items(), strict=True):
        steps = [r["step"] for r in records if r.get(key) is not None]
        values = [r[key] for r in records if r.get(key) is not None]
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if key == "loss" and len(values) > 20:
            axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
            axes.plot(steps, _smooth(values), color="tab:blue", label="running mean")
            axes.legend()
        else:
            axes.plot(steps, values, color="tab:blue", marker="o" if len(values) <= 20 else None, markersize=4)
        if key == "miou" and values:
            best = max(range(len(values)), key=values.__getitem__)
            axes.set_title(f"best {values[best]:.4f} at step {steps[best]}", fontsize="medium", loc="right")
            axes.set_ylim(0, max(0.05, min(1.0, 1.1 * values[best])))
    panels[-1].set_xlabel("step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def save_confusion(path: str | os.PathLike[str], confusion: Any, classes: Classes) -> None:
    """Heat map of the confusion matrix (K, K), each row divided by its sum: the share of a true class.

    Rows without a pixel are grey. Up to 30 classes the shares are printed too, in per cent.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, np.float64)
    total = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    number = len(classes)
    side = max(4.0, (0.42 if number <= 30 else 0.19) * number)
    figure = Figure(figsize=(side + 3.2, side + 2), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    size = 9 if number <= 30 else 7
    axes.set_xticks(range(number), classes.names, rotation=90, fontsize=size)
    axes.set_yticks(range(number), classes.names, fontsize=size)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    if number <= 30:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.5:
                ink = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _check(mask: np.ndarray, classes: Classes) -> None:
    wrong = mask[(mask >= len(classes)) & (mask != IGNORE)]
    if wrong.size:
        raise UserError(f"a mask holds the value {wrong[0]}, but the classes are 0 to {len(classes) - 1}, and 255")


def _save(path: str | os.PathLike[str], picture: Image.Image) -> None:
    options: dict[str, Any] = {}
    match Path(path).suffix.lower():
        case ".png":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_text("Software", SOFTWARE)
        case ".jpg" | ".jpeg":
            options = {"quality": 92, "comment": SOFTWARE}
    with atomic_path(path) as temporary:
        picture.save(temporary, **options)


def _edges(mask: np.ndarray) -> np.ndarray:
    """bool (H, W): a line along the class borders, one pixel wide for each 1000 of the picture's size."""
    edges = np.zeros(mask.shape, bool)
    wide = max(1, round(mask.size**0.5 / 1000))
    edges[:, :-wide] |= mask[:, wide:] != mask[:, :-wide]
    edges[:-wide] |= mask[wide:] != mask[:-wide]
    return edges


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and those up to 1/40 of the series before it."""
    window = max(5, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def _strip(sample: Sample, classes: Classes, cell: int, gap: int) -> Image.Image:
    """The three pictures of a sample side by side, each fitted to `cell` and centred, with gaps around."""
    image, *masks = sample
    height, width = np.asarray(image).shape[:2]
    high, wide = (max(1, round(side * cell / max(height, width))) for side in (height, width))
    pictures = [np.asarray(image)] + [None if mask is None else colourise(mask, classes) for mask in masks]
    strip = Image.new("RGB", (3 * cell + 4 * gap, high + gap), PAPER)
    for column, picture in enumerate(pictures):
        if picture is not None:
            way = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            left = gap + column * (cell + gap) + (cell - wide) // 2
            strip.paste(Image.fromarray(picture).resize((wide, high), way), (left, 0))
    return strip


def _legend(classes: Classes, present: Iterable[int], width: int, size: int) -> Image.Image:
    """Swatches and names of the mask values in `present`, in lines of at most `width` pixels; wider where one
    name alone needs it."""
    font = ImageFont.load_default(size)
    colours, names = colour_table(classes), {**dict(enumerate(classes.names)), IGNORE: "ignored"}
    pad, line = size // 2, round(1.7 * size)
    places, x, y, widest = [], pad, pad, 0
    for value in (int(v) for v in present):
        entry = round(1.5 * size + font.getlength(names[value]))
        if x > pad and x + entry + pad > width:
            x, y = pad, y + line
        places.append((x, y, value))
        widest = max(widest, x + entry + pad)
        x += entry + 2 * pad
    strip = Image.new("RGB", (max(width, widest), y + line + pad), PAPER)
    draw = ImageDraw.Draw(strip)
    for left, top, value in places:
        draw.rectangle((left, top, left + size, top + size), tuple(colours[value].tolist()), FRAME)
        draw.text((left + round(1.5 * size), top + size // 2), names[value], INK, font, anchor="lm")
    return strip

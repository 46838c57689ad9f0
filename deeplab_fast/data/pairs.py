"""Images and masks of two folders, matched by stem, and lists of stems."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .base import Pair

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def image_files(folder: Path) -> dict[str, Path]:
    """The image files of one folder by stem, in order. Raises UserError where two share a stem."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path} have the same name but for the suffix; keep one of them")
        found[path.stem] = path
    return found


def match_pairs(images: Path, masks: Path | None, stems: Iterable[str] | None = None) -> list[Pair]:
    """The pairs of two folders: those of `stems`, or all in the order of their names. `masks` None: there are
    none.

    A stem that only one folder has makes a pair whose other file does not exist, which reading it will say.
    """
    for folder in (images, masks):
        if folder is not None and not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist")
    image_of = image_files(images)
    mask_of = {} if masks is None else image_files(masks)
    if not image_of:
        raise UserError(f"the folder {images} holds no image; expected files ending in {', '.join(SUFFIXES)}")
    usual = next(iter(image_of.values())).suffix
    pairs = []
    for stem in sorted(image_of.keys() | mask_of.keys()) if stems is None else stems:
        image = image_of.get(stem, images / f"{stem}{usual}")
        mask = None if masks is None else mask_of.get(stem, masks / f"{stem}.png")
        pairs.append(Pair(stem, image, mask))
    return pairs


def read_list(path: Path) -> list[str]:
    """The stems in a list file: a line is a stem, a file name or a path; what follows a space, such as the
    mask, is
    left out."""
    names = [Path(line.split()[0]).name for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not names:
        raise UserError(f"the list {path} is empty; expected the name of one image a line")
    return [Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name for name in names]

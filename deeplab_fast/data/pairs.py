"""Images and masks of two folders, matched by stem, and lists of stems."""

from __future__ import annotations

import re
from collections.abc import Collection
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


def match_pairs(images: Path, masks: Path | None, listed: Path | None = None) -> list[Pair]:
    """The pairs of two folders: those that the file `listed` names, or all in the order of their names. `masks`
    None: there are none.

    A stem that only one folder has makes a pair whose other file does not exist, which reading it will say.
    """
    for folder in (images, masks):
        if folder is not None and not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist")
    image_of = image_files(images)
    mask_of = {} if masks is None else image_files(masks)
    if not image_of:
        raise UserError(f"the folder {images} holds no image; expected files ending in {', '.join(SUFFIXES)}")
    present = image_of.keys() | mask_of.keys()
    usual = next(iter(image_of.values())).suffix
    pairs = []
    for stem in sorted(present) if listed is None else read_list(listed, present):
        image = image_of.get(stem, images / f"{stem}{usual}")
        mask = None if masks is None else mask_of.get(stem, masks / f"{stem}.png")
        pairs.append(Pair(stem, image, mask))
    return pairs


def read_list(path: Path, known: Collection[str] = ()) -> list[str]:
    """The stems in a list file: a line is a stem, a file name or a path, and a space and more, such as the mask,
    may follow. A name may hold spaces where its stem is in `known`."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"the list {path} is not in UTF-8: {error.reason} at byte {error.start}") from error
    stems = [_listed_stem(line.strip(), known) for line in lines if line.strip()]
    if not stems:
        raise UserError(f"the list {path} is empty; expected the name of one image a line")
    return stems


def _listed_stem(line: str, known: Collection[str]) -> str:
    """Of what precedes a space, or is the whole line, the longest that ends in a known name, else the first."""
    ends = [space.start() for space in re.finditer(r"\s+|$", line)]
    for end in reversed(ends):
        path = Path(line[:end])
        # With a space in its folder, it is likely a second path that ends here.
        if _stem(path) in known and not re.search(r"\s", str(path.parent)):
            return _stem(path)
    return _stem(Path(line[: ends[0]]))


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in SUFFIXES else path.name

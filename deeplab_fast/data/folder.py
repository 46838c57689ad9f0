"""A data set of one's own: images and masks of the same name, and a small file that says what the masks mean.

    ROOT/dataset.toml (or dataset.json)
    ROOT/train/images  ROOT/train/masks     one folder for each split, or
    ROOT/images/train  ROOT/masks/train     the same the other way round, or
    ROOT/images        ROOT/masks           one folder, with the lists ROOT/train.txt and ROOT/val.txt, or,
                                            without lists and without folders for train and val, with
                                            val_fraction in dataset.toml

An image and its mask have the same stem, and any of the suffixes jpg, jpeg, png, bmp, webp, tif and tiff; a
mask is never a JPEG. dataset.toml:

    names = ["background", "leaf"]        # the classes 0, 1, ...
    masks = "index"                       # optional: or "colour"
    palette = [[0, 0, 0], [0, 200, 0]]    # RGB, one colour for each name; optional with index masks
    ids = [0, 1]                          # optional, index masks: the value of each class, 0 ... 65535
    ignore = 255                          # optional: a value or a list; with colour masks a colour or a list;
                                          # index masks without it: 255, where that is no class
    val_fraction = 0.2                    # optional: share of the images held out, chosen by their names
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .base import FileDataset, Pair
from .images import read_colour_mask, read_index_mask
from .labels import IGNORE, MAX_CLASSES, Classes, value_table, voc_palette
from .pairs import match_pairs

EXAMPLE = 'names = ["background", "leaf"]'
_FIELDS = ("names", "masks", "palette", "ids", "ignore", "val_fraction")


class Folder(FileDataset):
    """Split `train`, `val`, or any other that the layout in this module's docstring holds.

    Splits other than these two may lack the folder of masks.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.meaning = read_description(root)
        super().__init__("folder", split, self.meaning.classes, _pairs(root, split, self.meaning))

    def read_mask(self, path: Path) -> np.ndarray:
        meaning = self.meaning
        if path.suffix.lower() in (".jpg", ".jpeg"):
            raise UserError(f"the mask {path} is a JPEG, whose compression changes the values; save masks as PNG")
        if meaning.colours is not None:
            return read_colour_mask(path, meaning.colours, f"those that {meaning.path} names")
        expected = f"the values of the {len(meaning.classes)} classes and of ignore in {meaning.path}"
        return read_index_mask(path, meaning.table, expected)


@dataclass(frozen=True)
class Description:
    """A dataset.toml that was found to be right: `table` for index masks, `colours` for colour masks."""

    path: Path
    classes: Classes
    table: np.ndarray | None
    colours: dict[tuple[int, int, int], int] | None
    val_fraction: float | None


def read_description(root: Path) -> Description:
    """Read dataset.toml or dataset.json. Raises UserError for what is missing, unknown or wrong in it."""
    path = next((file for name in ("toml", "json") if (file := root / f"dataset.{name}").is_file()), None)
    if path is None:
        missing = root / "dataset.toml"
        raise UserError(f"{missing} does not exist; it names the classes of the masks, as in {EXAMPLE}")
    try:
        text = path.read_text("utf-8-sig")
        fields = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # both parsers' errors are ValueErrors
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict) or "names" not in fields:
        raise UserError(f"{path} has no names; expected a line such as {EXAMPLE}")
    if unknown := sorted(fields.keys() - set(_FIELDS)):
        raise UserError(f"{path} has the field {unknown[0]}; expected {', '.join(_FIELDS)}")
    return _Reader(path, fields).description()


class _Reader:
    """The fields of a description file, each checked."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path, self.fields = path, fields

    def wrong(self, field: str, expected: str) -> UserError:
        return UserError(f"{self.path} has {field} = {json.dumps(self.fields.get(field))}; expected {expected}")

    def description(self) -> Description:
        names = self.fields["names"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise self.wrong("names", f"a list of strings such as {EXAMPLE}")
        if len(names) > MAX_CLASSES:
            raise UserError(f"{self.path} names {len(names)} classes; expected {MAX_CLASSES} at most")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{self.path} names the class {twice[0]} twice; expected a name of its own for each")
        kind = self.fields.get("masks", "index")
        if kind not in ("index", "colour"):
            raise self.wrong("masks", '"index" or "colour"')
        fraction = self.fields.get("val_fraction")
        if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
            raise self.wrong("val_fraction", "a number between 0 and 1")
        classes = Classes(tuple(names), self.palette(len(names), needed=kind == "colour"))
        if kind == "colour":
            if "ids" in self.fields:
                raise UserError(f'{self.path} has ids, which go with masks = "index"; colours come from palette')
            return Description(self.path, classes, None, self.colours(classes), fraction)
        return Description(self.path, classes, value_table(self.values(len(names))), None, fraction)

    def palette(self, count: int, needed: bool) -> tuple[tuple[int, int, int], ...]:
        palette = self.fields.get("palette")
        if palette is None and not needed:
            return voc_palette(count)
        if not isinstance(palette, list) or len(palette) != count or not all(map(_is_colour, palette)):
            raise self.wrong("palette", f"{count} colours [red, green, blue] of 0 ... 255, one for each name")
        return tuple(map(tuple, palette))

    def colours(self, classes: Classes) -> dict[tuple[int, int, int], int]:
        ignore = self.fields.get("ignore", [])
        ignore = [ignore] if _is_colour(ignore) else ignore
        if not isinstance(ignore, list) or not all(map(_is_colour, ignore)):
            raise self.wrong("ignore", "a colour [red, green, blue] of 0 ... 255, or a list of colours")
        return self.labels(list(classes.palette), list(map(tuple, ignore)))

    def values(self, count: int) -> dict[int, int]:
        ids = self.fields.get("ids", list(range(count)))
        if not isinstance(ids, list) or len(ids) != count or not all(map(_is_value, ids)):
            raise self.wrong("ids", f"{count} values of 0 ... 65535, one for each name")
        ignore = self.fields.get("ignore", [] if IGNORE in ids else [IGNORE])
        ignore = [ignore] if _is_value(ignore) else ignore
        if not isinstance(ignore, list) or not all(map(_is_value, ignore)):
            raise self.wrong("ignore", "a value of 0 ... 65535, or a list of values")
        return self.labels(ids, ignore)

    def labels(self, classes: list, ignore: list) -> dict:
        """Each class's value or colour to its label, the ignored ones to IGNORE; each means one thing."""
        labels = {value: label for label, value in enumerate(classes)}
        twice = [value for value in classes if classes.count(value) > 1] + [v for v in ignore if v in labels]
        if twice:
            raise UserError(f"{self.path} gives {twice[0]} two meanings; expected one class, or ignore, for each")
        return labels | dict.fromkeys(ignore, IGNORE)


def _is_value(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 65535


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_value(v) and v <= 255 for v in value)


def _pairs(root: Path, split: str, meaning: Description) -> list[Pair]:
    if own := _split_folders(root, split):
        images, masks = own
        no_masks = split not in ("train", "val") and not masks.is_dir()
        return match_pairs(images, None if no_masks else masks)
    images, masks = root / "images", root / "masks"
    # A list for one split and val_fraction for the other would put the same image into both.
    lists = [name for name in dict.fromkeys(("train", "val", "test", split)) if (root / f"{name}.txt").is_file()]
    if lists and images.is_dir() and meaning.val_fraction is not None:
        raise UserError(f"{meaning.path} has val_fraction beside the list {lists[0]}.txt; expected one or the other")
    if split in lists and images.is_dir():
        return match_pairs(images, masks, root / f"{split}.txt")
    folders = any(_split_folders(root, name) for name in ("train", "val"))
    if split in ("train", "val") and images.is_dir() and not folders and meaning.val_fraction is not None:
        pairs = match_pairs(images, masks)
        held_out = _held_out([pair.stem for pair in pairs], meaning.val_fraction, images)
        return [pair for pair in pairs if (pair.stem in held_out) == (split == "val")]
    raise UserError(
        f"{root} has no split {split}: looked for the folders {split}/images and images/{split}, for images "
        f"with the list {split}.txt, and, without lists and such folders, for images with val_fraction in "
        f"{meaning.path.name}"
    )


def _split_folders(root: Path, split: str) -> tuple[Path, Path] | None:
    """The images and the masks of a split that has folders of its own."""
    for images, masks in (
        (root / split / "images", root / split / "masks"),
        (root / "images" / split, root / "masks" / split),
    ):
        if images.is_dir():
            return images, masks
    return None


def _held_out(stems: list[str], fraction: float, images: Path) -> set[str]:
    """The stems of `val`: those with the smallest hashes, so that the choice depends on names alone."""
    if len(stems) < 2:
        raise UserError(f"the folder {images} holds {len(stems)} image; val_fraction needs 2 or more")
    count = min(len(stems) - 1, max(1, round(len(stems) * fraction)))
    return set(sorted(stems, key=lambda stem: hashlib.sha256(stem.encode()).digest())[:count])

"""Cityscapes in its own layout.

leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png
gtFine/{train,val,test}/CITY/*_gtFine_labelIds.png        or *_gtFine_labelTrainIds.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import FileDataset, Pair
from .images import read_index_mask
from .labels import CITYSCAPES, CITYSCAPES_ID_TO_TRAIN_ID, IGNORE, value_table

_IDS, _TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
# Ids end at 33; the licence plate's -1 is stored as 255.
_ID_TABLE = value_table({value: int(CITYSCAPES_ID_TO_TRAIN_ID[value]) for value in (*range(34), 255)})
_TRAIN_ID_TABLE = value_table({**{label: label for label in range(len(CITYSCAPES))}, 255: IGNORE})
_PARTS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}


class Cityscapes(FileDataset):
    """Split `train`, `val`, `trainval` or `test`, whose masks are None: they are not public.

    Where a mask is there as labelIds and as labelTrainIds, labelIds is read. Stems are
    CITY/CITY_000000_000019.
    """

    def __init__(self, root: Path, split: str) -> None:
        if split not in _PARTS:
            raise UserError(f"there is no split {split} of cityscapes; expected {', '.join(_PARTS)}")
        pairs = [pair for part in _PARTS[split] for pair in _pairs(root, part)]
        super().__init__("cityscapes", split, CITYSCAPES, pairs)

    def read_mask(self, path: Path) -> np.ndarray:
        if path.name.endswith(_TRAIN_IDS):
            return read_index_mask(path, _TRAIN_ID_TABLE, "train ids 0 ... 18, or 255 for void")
        return read_index_mask(path, _ID_TABLE, "ids 0 ... 33, or 255 for the licence plate")


def _pairs(root: Path, part: str) -> list[Pair]:
    images, masks = root / "leftImg8bit" / part, root / "gtFine" / part
    if not images.is_dir():
        raise UserError(f"{root} holds no Cityscapes: looked for the folder {images}")
    if part != "test" and not masks.is_dir():
        raise UserError(f"the Cityscapes in {root} has no masks: looked for the folder {masks}")
    image_of = {_stem(path): path for path in images.glob("*/*_leftImg8bit.png")}
    if not image_of:
        raise UserError(f"the folder {images} holds no CITY/*_leftImg8bit.png")
    if part == "test":  # the masks that come with it hold no class
        return [Pair(stem, image_of[stem], None) for stem in sorted(image_of)]
    mask_of = {_stem(path): path for path in masks.glob(f"*/*{_TRAIN_IDS}")}
    mask_of |= {_stem(path): path for path in masks.glob(f"*/*{_IDS}")}
    return [
        Pair(
            stem,
            image_of.get(stem, images / f"{stem}_leftImg8bit.png"),
            mask_of.get(stem, masks / f"{stem}{_IDS}"),
        )
        for stem in sorted(image_of.keys() | mask_of.keys())
    ]


def _stem(path: Path) -> str:
    """CITY/CITY_000000_000019 of an image or a mask."""
    return f"{path.parent.name}/{path.name.rsplit('_', 2 if '_gtFine_' in path.name else 1)[0]}"

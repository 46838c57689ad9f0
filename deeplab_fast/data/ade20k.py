"""ADE20K's 150 classes of the scene parsing challenge (ADEChallengeData2016).

images/{training,validation}/*.jpg
annotations/{training,validation}/*.png       1 ... 150 the class, 0 what is none of them
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import FileDataset
from .images import read_index_mask
from .labels import ADE20K as CLASSES
from .labels import IGNORE, value_table
from .pairs import match_pairs

_TABLE = value_table({0: IGNORE, **{label + 1: label for label in range(len(CLASSES))}})
_PARTS = {"train": ("training",), "val": ("validation",), "trainval": ("training", "validation")}


class Ade20k(FileDataset):
    """Split `train`, `val` or `trainval`. `root` is ADEChallengeData2016 or the folder that holds it."""

    def __init__(self, root: Path, split: str) -> None:
        if split not in _PARTS:
            raise UserError(f"there is no split {split} of ade20k; expected {', '.join(_PARTS)}")
        inner = root / "ADEChallengeData2016"
        folder = inner if inner.is_dir() else root
        if not (folder / "annotations").is_dir():
            raise UserError(f"{root} holds no ADE20K: looked for the folders images and annotations in {folder}")
        pairs = [
            pair
            for part in _PARTS[split]
            for pair in match_pairs(folder / "images" / part, folder / "annotations" / part)
        ]
        super().__init__("ade20k", split, CLASSES, pairs)

    def read_mask(self, path: Path) -> np.ndarray:
        return read_index_mask(path, _TABLE, "0 for none, or 1 ... 150")

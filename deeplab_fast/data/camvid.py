"""CamVid with 11 classes, in the layout of the SegNet tutorial.

train/*.png  trainannot/*.png      and so for val and test; images may be JPEG
                                   masks: 0 ... 10 the class, 11 the void label
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import FileDataset
from .images import read_index_mask
from .labels import CAMVID, IGNORE, value_table
from .pairs import match_pairs

_TABLE = value_table({**{label: label for label in range(len(CAMVID))}, 11: IGNORE, 255: IGNORE})
_PARTS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}


class CamVid(FileDataset):
    """Split `train`, `val`, `test` or `trainval`."""

    def __init__(self, root: Path, split: str) -> None:
        if split not in _PARTS:
            raise UserError(f"there is no split {split} of camvid; expected {', '.join(_PARTS)}")
        if not (root / _PARTS[split][0]).is_dir():
            raise UserError(f"{root} holds no CamVid: looked for the folders train, trainannot, val and valannot in it")
        pairs = [pair for part in _PARTS[split] for pair in match_pairs(root / part, root / f"{part}annot")]
        super().__init__("camvid", split, CAMVID, pairs)

    def read_mask(self, path: Path) -> np.ndarray:
        return read_index_mask(path, _TABLE, "0 ... 10, or 11 or 255 for void")

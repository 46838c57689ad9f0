"""PASCAL VOC 2007 to 2012 in the layout of the VOCdevkit.

VOC2012/JPEGImages/*.jpg
VOC2012/SegmentationClass/*.png          palette PNGs: the index is the class, 255 the void label
VOC2012/SegmentationClassAug/*.png       optional: the SBD masks in the same coding
VOC2012/ImageSets/Segmentation/*.txt     train, val, trainval; train_aug or trainaug where there is one; a
line is
                                         a stem, or two paths as in /JPEGImages/x.jpg
                                         /SegmentationClassAug/x.png
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np

from ..config import Year
from ..errors import UserError
from .base import FileDataset, Pair
from .images import read_index_mask
from .labels import IGNORE, VOC, value_table
from .pairs import read_list
from .sbd import read_mat_mask, sbd_pairs

_TABLE = value_table({**{label: label for label in range(len(VOC))}, 255: IGNORE})


class Voc(FileDataset):
    """Split `train`, `val`, `trainval`, `train_aug` or any other list in ImageSets/Segmentation.

    `root` is the VOC folder of that year, the VOCdevkit above it, or the folder above that. `split` None is
    `train_aug` where SegmentationClassAug exists, else `train`. `train_aug` reads its list where there is one
    (train_aug.txt or trainaug.txt), else takes all of SegmentationClassAug but the images of `val`; its masks
    are SegmentationClassAug's.

    With `sbd`, the folder of that data set, `train` and `trainval` also hold its images, with its masks where VOC has
    none: 10,582 in `train`. `train` holds no image of VOC's `val`, and `split` None is `train`.
    """

    def __init__(self, root: Path, split: str | None, year: str = "2012", sbd: Path | None = None) -> None:
        folder = _year_folder(root, year)
        augmented = folder / "SegmentationClassAug"
        if sbd is not None and split is None:
            split = "train"
        split = split or ("train_aug" if augmented.is_dir() else "train")
        if split in ("train_aug", "trainaug"):
            if not augmented.is_dir():
                raise UserError(f"the split {split} needs the folder {augmented}, which does not exist")
            stems = _augmented_stems(folder)
            masks = augmented
        else:
            stems = _listed(folder, split)
            masks = folder / "SegmentationClass"
        pairs = [Pair(stem, folder / "JPEGImages" / f"{stem}.jpg", masks / f"{stem}.png") for stem in stems]
        if split == "test" and not any(pair.mask.is_file() for pair in pairs):
            pairs = [pair._replace(mask=None) for pair in pairs]
        if sbd is not None and split in ("train", "trainval"):
            pairs += sbd_pairs(sbd, without={*stems, *(_listed(folder, "val") if split == "train" else ())})
        super().__init__("voc", split, VOC, pairs)

    def read_mask(self, path: Path) -> np.ndarray:
        if path.suffix == ".mat":
            return read_mat_mask(path)
        return read_index_mask(path, _TABLE, "0 ... 20, or 255 for void")


def _year_folder(root: Path, year: str) -> Path:
    name = f"VOC{year}"
    tried = [root / name, root / "VOCdevkit" / name]
    if root.resolve().name not in {f"VOC{y}" for y in get_args(Year)} - {name}:  # another year's is not meant
        tried.append(root)
    for folder in tried:
        if _lists(folder).is_dir():
            return folder
    raise UserError(f"{root} holds no PASCAL VOC {year}: looked for {', '.join(str(_lists(f)) for f in tried)}")


def _lists(folder: Path) -> Path:
    return folder / "ImageSets" / "Segmentation"


def _listed(folder: Path, split: str) -> list[str]:
    path = _lists(folder) / f"{split}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _lists(folder).glob("*.txt"))) or "no list at all"
        raise UserError(f"there is no split {split}: {path} does not exist; the folder has {known}")
    return read_list(path)


def _augmented_stems(folder: Path) -> list[str]:
    for name in ("train_aug", "trainaug"):
        if (_lists(folder) / f"{name}.txt").is_file():
            return _listed(folder, name)
    held_out = set(_listed(folder, "val"))
    stems = sorted(path.stem for path in (folder / "SegmentationClassAug").glob("*.png"))
    stems = [stem for stem in stems if stem not in held_out]
    if not stems:
        raise UserError(f"{folder / 'SegmentationClassAug'} holds no mask that is not in the split val")
    return stems

"""The base class of every data set, and the one for data sets that are pairs of image and mask files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .images import read_image, read_image_size, same_size, verify_image
from .labels import IGNORE, Classes


class Dataset:
    """Pairs of image and mask, by index. Picklable, since loader workers may be started by spawning."""

    classes: Classes
    name: str
    split: str

    def __len__(self) -> int:
        raise NotImplementedError

    def stem(self, index: int) -> str:
        """A name for output files, unique in the split; it may hold "/" for sub-folders."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Image uint8 (H, W, 3) RGB; mask uint8 (H, W) of 0 ... K-1 and IGNORE, or None where the split has
        none."""
        raise NotImplementedError

    def load_mask(self, index: int) -> np.ndarray | None:
        """The mask that `load` gives, without its image where that is read apart."""
        return self.load(index)[1]

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of the image that `load` gives."""
        return self.load(index)[0].shape[:2]

    def inspect(self, index: int) -> Finding:
        """What `check_dataset` has to know of pair `index`."""
        return Finding()


class Finding(NamedTuple):
    """What reading one pair brought to light."""

    problems: tuple[str, ...] = ()  # a sentence each
    blank: bool = False  # the mask could be read, and all of it is IGNORE


class Pair(NamedTuple):
    """The files of one sample. A mask file that is not there is a problem to report; None says that none is
    meant."""

    stem: str
    image: Path
    mask: Path | None


class FileDataset(Dataset):
    """Pairs of image and mask files; a sub-class chooses the pairs and says how a mask file is read.

    EXIF orientation is not applied: masks carry none, and a pair has to stay aligned.
    """

    def __init__(self, name: str, split: str, classes: Classes, pairs: Sequence[Pair]) -> None:
        self.name, self.split, self.classes, self.pairs = name, split, classes, tuple(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def stem(self, index: int) -> str:
        return self.pairs[index].stem

    def read_mask(self, path: Path) -> np.ndarray:
        """uint8 (H, W) of 0 ... K-1 and IGNORE. Raises UserError for a file or a value that cannot be
        used."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        _, image_path, mask_path = self.pairs[index]
        image = read_image(image_path)
        if mask_path is None:
            return image, None
        mask = self.read_mask(mask_path)
        same_size(image_path, image.shape[1::-1], mask_path, mask.shape[::-1])
        return image, mask

    def load_mask(self, index: int) -> np.ndarray | None:
        path = self.pairs[index].mask
        return None if path is None else self.read_mask(path)

    def image_size(self, index: int) -> tuple[int, int]:
        return read_image_size(self.pairs[index].image)

    def inspect(self, index: int) -> Finding:
        _, image_path, mask_path = self.pairs[index]
        found = []
        image_size = mask = None
        try:
            image_size = verify_image(image_path)
        except UserError as error:
            found.append(str(error))
        try:
            if mask_path is not None:
                mask = self.read_mask(mask_path)
            if image_size is not None and mask is not None:
                same_size(image_path, image_size, mask_path, mask.shape[::-1])
        except UserError as error:
            found.append(str(error))
        return Finding(tuple(found), blank=mask is not None and bool((mask == IGNORE).all()))

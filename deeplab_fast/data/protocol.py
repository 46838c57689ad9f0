"""How a labelled image is scored where it is not scored whole and at its own size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .base import Dataset

CROP = 513


class CentreCrop(Dataset):
    """Image and mask of `dataset` with the shorter side scaled to `size` pixels, and of that the square in the middle.

    The protocol behind the figures of jfzhang95/pytorch-deeplab-xception, HaoranYao/DD2424-Project,
    hualin95/Deeplab-v3plus and VainF/DeepLabV3Plus-Pytorch: bilinear images, antialiased when shrinking, and labels by
    nearest neighbour, so that truth itself is resampled and what lies outside the square is not scored.
    """

    def __init__(self, dataset: Dataset, size: int = CROP) -> None:
        self.dataset, self.size = dataset, size
        self.name, self.split, self.classes = dataset.name, dataset.split, dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def stem(self, index: int) -> str:
        return self.dataset.stem(index)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        image, mask = self.dataset.load(index)
        image = self._crop(Image.fromarray(image), Image.Resampling.BILINEAR)
        return image, None if mask is None else self._crop(Image.fromarray(mask), Image.Resampling.NEAREST)

    def _crop(self, picture: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        short = min(picture.size)
        width, height = (length * self.size // short for length in picture.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = picture.resize((width, height), resampling)
        return np.array(resized.crop((left, top, left + self.size, top + self.size)))

"""How a labelled image is scored where it is not scored whole and at its own size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .base import Dataset
from .labels import IGNORE

CROP = 513


class _Reframed(Dataset):
    """The images of another data set, each seen in another frame."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.name, self.split, self.classes = dataset.name, dataset.split, dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def stem(self, index: int) -> str:
        return self.dataset.stem(index)


class CentreCrop(_Reframed):
    """Image and mask of `dataset` with the shorter side scaled to `size` pixels, and of that the square in the middle.

    The protocol behind the figures of jfzhang95/pytorch-deeplab-xception, HaoranYao/DD2424-Project,
    hualin95/Deeplab-v3plus and VainF/DeepLabV3Plus-Pytorch: bilinear images, antialiased when shrinking, and labels by
    nearest neighbour, so that truth itself is resampled and what lies outside the square is not scored.
    """

    def __init__(self, dataset: Dataset, size: int = CROP) -> None:
        super().__init__(dataset)
        self.size = size

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


class Padded(_Reframed):
    """Image and mask of `dataset`, below and to the right of them `colour` and IGNORE: sides of 16 k + 1, 513 at least.

    The protocol behind the figures of tensorflow/models (research/deeplab; VOC 513 x 513, Cityscapes 2049 x 1025) and
    chenxi116/DeepLabv3.pytorch. Where corners are aligned, it matters: of such a side every stride up to 16 samples the
    last pixel, while of 1024 pixels stride 16 samples 0, 16 ... 1008, which upsampling stretches to 0 ... 1023.
    """

    def __init__(self, dataset: Dataset, colour: tuple[int, int, int], least: int = CROP) -> None:
        super().__init__(dataset)
        self.colour, self.least = colour, least

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        image, mask = self.dataset.load(index)
        size = tuple(max(self.least, -(-(length - 1) // 16) * 16 + 1) for length in image.shape[:2])
        return _placed(image, size, self.colour), None if mask is None else _placed(mask, size, IGNORE)

    def cut(self, index: int, prediction: np.ndarray) -> np.ndarray:
        """What of a prediction lies in the image."""
        height, width = self.dataset.image_size(index)
        return prediction[:height, :width]


def _placed(array: np.ndarray, size: tuple[int, int], value: int | tuple[int, int, int]) -> np.ndarray:
    canvas = np.empty((*size, *array.shape[2:]), array.dtype)
    canvas[:] = value
    canvas[: array.shape[0], : array.shape[1]] = array
    return canvas

"""COCO 2017 with the 21 classes of VOC, as models are pre-trained on it before VOC.

train2017/*.jpg val2017/*.jpg
annotations/instances_{train,val}2017.json

An image counts where the objects of VOC's classes cover more than 1,000 of its pixels. Objects are painted from the
largest to the smallest, so that a cup before a table is seen; crowds are ignored. pycocotools paints.
Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", section 4 (pre-training on COCO).
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .base import Dataset, Finding
from .images import read_image, verify_image
from .labels import IGNORE, VOC

LEAST_AREA = 1000  # pixels
# COCO's category names where they differ from VOC's.
_NAMES = {
    "airplane": "aeroplane",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "couch": "sofa",
    "tv": "tvmonitor",
}


class Sample(NamedTuple):
    image: Path
    size: tuple[int, int]  # height, width
    objects: tuple[tuple[int, bool, Any], ...]  # label, crowd, and COCO's polygons or run lengths; the largest first


class Coco(Dataset):
    """Split `train` or `val`. `root` holds `annotations`, `train2017` and `val2017`."""

    def __init__(self, root: Path, split: str) -> None:
        if split not in ("train", "val"):
            raise UserError(f"there is no split {split} of coco; expected train or val")
        try:
            import pycocotools.mask  # noqa: F401
        except ImportError:
            raise UserError("coco's objects are painted by pycocotools: pip install pycocotools") from None
        self.name, self.split, self.classes = "coco", split, VOC
        self.samples = _samples(root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017")

    def __len__(self) -> int:
        return len(self.samples)

    def stem(self, index: int) -> str:
        return self.samples[index].image.stem

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = self.samples[index]
        image = read_image(sample.image)
        if image.shape[:2] != sample.size:
            raise UserError(_wrong_size(sample, image.shape[:2]))
        return image, paint(sample)

    def image_size(self, index: int) -> tuple[int, int]:
        return self.samples[index].size

    def inspect(self, index: int) -> Finding:
        sample = self.samples[index]
        try:
            size = verify_image(sample.image)[::-1]
        except UserError as error:
            return Finding((str(error),))
        return Finding(() if size == sample.size else (_wrong_size(sample, size),))


def _wrong_size(sample: Sample, size: tuple[int, int]) -> str:
    return f"the image {sample.image} is {size[1]} x {size[0]}, but {sample.size[1]} x {sample.size[0]} in its JSON"


def paint(sample: Sample) -> np.ndarray:
    """uint8 (H, W) of 0 ... 20, and IGNORE where a crowd is."""
    from pycocotools import mask as coco_mask

    height, width = sample.size
    labels = np.zeros(sample.size, np.uint8)
    for label, crowd, outline in sample.objects:
        if isinstance(outline, list):  # polygons, one for each visible part
            runs = coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            runs = coco_mask.frPyObjects(outline, height, width)
        else:
            runs = outline
        labels[coco_mask.decode(runs) > 0] = IGNORE if crowd else label
    return labels


def _samples(annotations: Path, images: Path) -> tuple[Sample, ...]:
    if not annotations.is_file():
        raise UserError(f"{annotations.parent.parent} holds no COCO: {annotations} does not exist")
    try:
        content = json.loads(annotations.read_bytes())
        label_of = {}
        for category in content["categories"]:
            name = _NAMES.get(category["name"], category["name"])
            if name in VOC.names:
                label_of[category["id"]] = VOC.names.index(name)
        found = defaultdict(list)
        for item in content["annotations"]:
            if item["category_id"] in label_of:
                crowd = bool(item["iscrowd"])
                found[item["image_id"]].append(
                    (item["area"], label_of[item["category_id"]], crowd, item["segmentation"])
                )
        listed = {item["id"]: item for item in content["images"]}
        samples = []
        for key in sorted(found):
            if sum(area for area, _, crowd, _ in found[key] if not crowd) > LEAST_AREA:
                objects = sorted(found[key], key=lambda item: (not item[2], -item[0]))  # crowds lie under the rest
                about = listed[key]
                size = about["height"], about["width"]
                samples.append(Sample(images / about["file_name"], size, tuple(item[1:] for item in objects)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations} is not COCO's instances: {type(error).__name__}: {error}") from error
    return tuple(samples)

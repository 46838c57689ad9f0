"""How often each class is labelled in a split, and the class weights that follow from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_path, make_folder
from .base import Dataset, FileDataset
from .labels import IGNORE
from .loader import loader_workers

WEIGHTINGS = ("enet", "median")


@dataclass(frozen=True)
class ClassCounts:
    """Of each class in one split, ignored pixels left out."""

    pixels: tuple[int, ...]
    """pixels with its label"""
    images: tuple[int, ...]
    """images that show it"""
    pixels_there: tuple[int, ...]
    """labelled pixels of any class in these images"""


def class_weights(counts: ClassCounts, kind: str) -> tuple[float, ...]:
    """The weight of each class in the loss; 0 for a class that no pixel carries.

    "enet": 1 / ln(1.02 + share of the labelled pixels), from 1.4 to 50.5 (Paszke et al. 2016, "ENet", section 5.2).
    "median": median of all frequencies over the class's own, which is its share of the labelled pixels in the images
    that show it (Eigen and Fergus 2015, section 6.3.2).
    """
    if kind == "enet":
        total = sum(counts.pixels)
        return tuple(1 / math.log(1.02 + n / total) if n else 0.0 for n in counts.pixels)
    if kind == "median":
        frequency = [n / there if n else 0.0 for n, there in zip(counts.pixels, counts.pixels_there, strict=True)]
        middle = statistics.median(f for f in frequency if f)
        return tuple(middle / f if f else 0.0 for f in frequency)
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(WEIGHTINGS)}")


def count_classes(dataset: Dataset, workers: int | None = None, *, cache: bool = True) -> ClassCounts:
    """Counts the labels of every mask in `dataset`; a split without one labelled pixel raises UserError.

    The counts are kept in `cache_path` and taken from there while the same masks have the same sizes and times.
    """
    path = cache_path(dataset) if cache else None
    counts = _read(path, len(dataset.classes)) if path else None
    if counts is None:
        counts = _count(dataset, workers)
        if path:
            _keep(path, counts)
    if not any(counts.pixels):
        raise UserError(f"no pixel of the split {dataset.split} of the data set {dataset.name} carries a class")
    return counts


def _count(dataset: Dataset, workers: int | None) -> ClassCounts:
    classes = len(dataset.classes)

    def one(index: int) -> np.ndarray:
        mask = dataset.load_mask(index)
        if mask is None:
            raise UserError(f"the split {dataset.split} of the data set {dataset.name} has no masks to count")
        return np.bincount(mask.ravel(), minlength=IGNORE + 1)[:classes]

    sums = np.zeros((3, classes), np.int64)
    pool = ThreadPoolExecutor(max(1, loader_workers(workers)))  # decoding releases the GIL
    try:
        results = pool.map(one, range(len(dataset)))
        title = f"counting {dataset.name} {dataset.split}"
        for pixels in tqdm(results, total=len(dataset), desc=title, delay=2, leave=False):
            sums += np.stack([pixels, pixels > 0, (pixels > 0) * pixels.sum()])
    finally:
        pool.shutdown(cancel_futures=True)
    return ClassCounts(*(tuple(row.tolist()) for row in sums))


def cache_path(dataset: Dataset) -> Path:
    """The file that keeps the counts of `dataset`: in the user's cache folder, never in the data set's.

    Its name is a hash of all that they depend on: what the data set knows of itself, and where each mask lies, its size
    and the time of its last change.
    """
    digest = hashlib.sha256(pickle.dumps(dataset))
    if isinstance(dataset, FileDataset):
        for pair in dataset.pairs:
            if pair.mask is not None and pair.mask.exists():
                found = pair.mask.stat()
                digest.update(f"{pair.mask.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "deeplab_fast" / f"classes-{digest.hexdigest()[:24]}.json"


def _read(path: Path, classes: int) -> ClassCounts | None:
    """None where there is no file, or one that is not whole."""
    try:
        counts = ClassCounts(**{key: tuple(value) for key, value in json.loads(path.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return counts if all(_is_row(row, classes) for row in asdict(counts).values()) else None


def _is_row(row: Sequence[object], classes: int) -> bool:
    return len(row) == classes and all(type(n) is int and n >= 0 for n in row)


def _keep(path: Path, counts: ClassCounts) -> None:
    try:
        make_folder(path.parent)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(counts)))
    except UserError as error:  # a run does not need it
        print(f"the class counts are not kept for the next run: {error}")

"""The Semantic Boundaries Dataset: VOC's 20 classes for 11,355 images, most of them without a VOC mask.

img/*.jpg
cls/*.mat            GTcls.Segmentation: 0 background, 1 ... 20 the class; or cls/*.png of the same values
train.txt val.txt    8,498 and 2,857 stems

Source: Hariharan, Arbelaez, Bourdev, Maji, Malik, "Semantic Contours from Inverse Detectors", 2011.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..errors import UserError
from .base import Pair
from .labels import VOC
from .pairs import read_list


def sbd_pairs(root: Path, without: Collection[str]) -> list[Pair]:
    """SBD's train and val but the stems `without`. `root` is the folder that holds img and cls, or one above it."""
    tried = [root / inner for inner in (".", "dataset", "benchmark_RELEASE/dataset")]
    folder = next((path for path in tried if (path / "cls").is_dir()), None)
    if folder is None:
        raise UserError(f"{root} holds no SBD: looked for the folders img and cls in {', '.join(map(str, tried))}")
    lists = [folder / "train.txt", folder / "val.txt"]
    if any(path.is_file() for path in lists):
        stems = {stem for path in lists if path.is_file() for stem in read_list(path)}
    else:
        stems = {path.stem for path in (folder / "cls").iterdir() if path.suffix in (".mat", ".png")}
    pairs = []
    for stem in sorted(stems - set(without)):
        mask = folder / "cls" / f"{stem}.png"
        pairs.append(Pair(stem, folder / "img" / f"{stem}.jpg", mask if mask.is_file() else mask.with_suffix(".mat")))
    return pairs


def read_mat_mask(path: Path) -> np.ndarray:
    """uint8 (H, W) of 0 ... 20 from cls/*.mat. Raises UserError for a file that is none."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path} is a MATLAB file, which scipy reads: pip install scipy") from None
    if not path.is_file():
        raise UserError(f"the mask {path} does not exist")
    try:
        mask = loadmat(path, squeeze_me=True, variable_names=["GTcls"])["GTcls"]["Segmentation"].item()
    except Exception as error:  # scipy raises whatever a broken file leads it to
        raise UserError(f"the mask {path} cannot be read: {str(error) or type(error).__name__}") from error
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or not 0 <= mask.min() <= mask.max() < len(VOC):
        raise UserError(f"the mask {path} is {mask.dtype} {mask.shape}; expected (H, W) of 0 ... {len(VOC) - 1}")
    return mask.astype(np.uint8)

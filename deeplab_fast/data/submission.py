"""The file that the Cityscapes benchmark scores: a zip of label maps in the ids of *_labelIds.png."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import atomic_path
from .labels import CITYSCAPES, CITYSCAPES_TRAIN_ID_TO_ID, Classes


class Submission:
    """An open zip; nothing is there under its name until all of it is."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def add(self, image: Path, mask: np.ndarray) -> None:
        """mask: uint8 (H, W) of train ids. The server finds an image's map by CITY_000000_000019 in its name."""
        png = io.BytesIO()
        Image.fromarray(CITYSCAPES_TRAIN_ID_TO_ID[mask]).save(png, "PNG")
        name = f"{image.stem.removesuffix('_leftImg8bit')}_pred_labelIds.png"
        self.archive.writestr(name, png.getvalue())  # stored: PNG is compressed already


def check_submission(path: Path, classes: Classes, images: list[Path]) -> None:
    """UserError unless `path` may be written and holds one map for each image, in Cityscapes' classes."""
    if classes.names != CITYSCAPES.names:
        raise UserError(f"--submission {path} is for Cityscapes: the checkpoint has other classes than its 19")
    if path.suffix != ".zip":
        raise UserError(f"--submission {path}: expected the name of a .zip file")
    if path.exists():
        raise UserError(f"--submission {path} exists; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"--submission {path}: the folder {path.parent} does not exist")
    stems = sorted(image.stem for image in images)
    for one, other in zip(stems, stems[1:], strict=False):
        if one == other:
            raise UserError(f"--submission {path}: two images are called {one}; a zip holds one map of a name")


@contextmanager
def submission(path: Path) -> Iterator[Submission]:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        yield Submission(archive)

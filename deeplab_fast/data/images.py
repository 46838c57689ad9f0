"""Image and mask files to uint8 arrays. Whatever is wrong with a file becomes a UserError that names it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..errors import UserError
from .labels import UNKNOWN

# What Pillow's decoders raise for broken files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    try:
        if not path.is_file():
            raise UserError(f"the {kind} {path} does not exist")
        with Image.open(path) as image:
            if image.mode == "F":
                raise UserError(f"the {kind} {path} holds floating-point pixels; expected whole numbers")
            yield image
    except _BROKEN as error:
        raise UserError(f"the {kind} {path} cannot be read: {str(error) or type(error).__name__}") from error


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def read_image(path: str | Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB from any 8-bit or 16-bit file that Pillow reads; EXIF orientation is not applied.

    Grey is repeated, a palette is looked up, transparency is dropped, 16 bits keep their upper 8.
    Raises UserError where the file is missing, broken or holds floats.
    """
    path = Path(path)
    with _opened(path, "image") as image:
        if _is_16_bit(image):
            grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


def read_image_size(path: Path) -> tuple[int, int]:
    """Height and width by the head of the file; its pixels are not read."""
    with _opened(path, "image") as image:
        return image.height, image.width


def verify_image(path: Path) -> tuple[int, int]:
    """(width, height) of an image, after reading enough of the file to know that it is whole."""
    with _opened(path, "image") as image:
        size = image.size
        if image.format == "PNG":
            image.verify()  # checksums, without inflating
        else:
            image.draft("RGB", (1, 1))  # JPEG only: an eighth of the size, so next to no inverse transform
            image.load()
        return size


def read_mask_values(path: Path) -> np.ndarray:
    """uint8 or uint16 (H, W): the numbers in an index mask; a palette is not applied.

    RGB is accepted where the three channels are equal. Raises UserError otherwise.
    """
    with _opened(path, "mask") as image:
        if image.mode in ("L", "P", "1"):
            return np.array(image, dtype=np.uint8)
        if _is_16_bit(image):
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise UserError(f"the mask {path} holds {values.min()} ... {values.max()}; expected 0 ... 65535")
            return values.astype(np.uint16)
        if image.mode in ("RGB", "RGBA", "LA"):
            channels = np.asarray(image.convert("RGB"))
            grey = channels[:, :, 0]
            if (channels == grey[:, :, None]).all():
                return grey.copy()
            raise UserError(
                f"the mask {path} is in colour where one channel of class ids is expected; "
                'a folder data set reads colours with masks = "colour" in its dataset.toml'
            )
        raise UserError(f"the mask {path} has pixels of Pillow's mode {image.mode}; expected 8 or 16 bits of class ids")


def read_index_mask(path: Path, table: np.ndarray, expected: str) -> np.ndarray:
    """uint8 (H, W) labels: the file's values through `table`, a `labels.value_table`.

    A value that the table does not know raises UserError, in which `expected` says what there is.
    """
    values = read_mask_values(path)
    labels = table[values]
    unknown = labels == UNKNOWN
    if unknown.any():
        ids = np.unique(values[unknown]).tolist()
        more = f" and {len(ids) - 5} other values" if len(ids) > 5 else ""
        listed = ", ".join(map(str, ids[:5]))
        raise UserError(f"the mask {path} holds {listed}{more}; expected {expected}")
    return labels


def same_size(image: Path, image_size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> None:
    """Raises UserError where the two (width, height) differ."""
    if tuple(image_size) == tuple(mask_size):
        return
    sizes = [f"{width} x {height}" for width, height in (image_size, mask_size)]
    hint = ""
    with _opened(image, "image") as opened:
        if opened.getexif().get(ExifTags.Base.Orientation, 1) > 4:
            hint = " (the image is stored on its side with an EXIF orientation: save it upright)"
    raise UserError(f"the image {image} is {sizes[0]} but its mask {mask} is {sizes[1]}{hint}")


def read_colour_mask(path: Path, colours: Mapping[tuple[int, int, int], int], expected: str) -> np.ndarray:
    """uint8 (H, W) labels of a colour mask, by exact RGB.

    A colour that is not in `colours` raises UserError, in which `expected` says what there is.
    """
    with _opened(path, "mask") as image:
        if _is_16_bit(image):
            raise UserError(f"the mask {path} has pixels of Pillow's mode {image.mode}; expected 8-bit colours")
        rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    codes = rgb[:, :, 0] << 16 | rgb[:, :, 1] << 8 | rgb[:, :, 2]  # (H, W)
    entries = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in colours.items())
    known, labels = (np.array(column) for column in zip(*entries, strict=True))
    nearest = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    unknown = known[nearest] != codes
    if unknown.any():
        found = np.unique(codes[unknown])
        first = int(found[0])
        more = f" and {len(found) - 1} more that are unknown" if len(found) > 1 else ""
        colour = (first >> 16, first >> 8 & 255, first & 255)
        raise UserError(f"the mask {path} holds the colour {colour}{more}; expected {expected}")
    return labels.astype(np.uint8)[nearest]

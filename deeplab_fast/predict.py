"""python -m deeplab_fast.predict CHECKPOINT PATH... --output DIR: photos in, palette masks and overlays out.

For an image `name.jpg`, DIR/name.png is the mask (8-bit indices with a palette, at the size of the image) and
DIR/name_overlay.jpg the image tinted by class above a legend. An EXIF orientation is applied first, so both
are upright. Images found in a folder keep their sub-folder. Files of an earlier run are written anew, any other
file in their place is an error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import ExifTags, Image
from tqdm import tqdm

from . import checkpoint
from .cli import run_command
from .data.images import read_image
from .data.submission import check_submission, submission
from .device import describe, resolve_device, resolve_precision, set_allocator
from .errors import UserError
from .files import make_folder
from .inference import DEFAULT_OVERLAP, predict_image
from .visualize import check_replaceable, overlay_with_legend, save_image, save_palette_png

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""What is taken from a folder; a file that is named is read whatever its suffix."""


@dataclass(frozen=True)
class PredictCommand:
    """Label every pixel of images: masks and overlays with a legend, at the size of each image."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """best.pt or last.pt of a training run"""
    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH...")]
    """images, and folders, which are searched with their sub-folders"""
    output: Path
    """folder for the masks and overlays"""
    overlay: bool = True
    """draw overlays"""
    submission: Path | None = None
    """Cityscapes only: also write a zip of labelIds for the benchmark's server, such as of leftImg8bit/test"""
    alpha: float = 0.55
    """share of the class colour in an overlay, 0 to 1"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device has it, fp16 on older GPUs, else fp32"""
    window: tuple[int, int] = (0, 0)
    """height and width of overlapping windows; 0 0: whole images, 1024 x 1024 above 2048 x 2048 pixels"""
    overlap: float = DEFAULT_OVERLAP
    """share of a window that the next one covers again"""
    scales: tuple[float, ...] = (1.0,)
    """sizes of the image whose class probabilities are averaged, such as 0.5 0.75 1 1.25 1.5 1.75"""
    flip: bool = False
    """average over the mirrored image as well"""
    output_stride: Literal[8, 16, 32] | None = None
    """of the backbone, with ASPP's rates to match; None: the one that the model was trained at"""


class Job(NamedTuple):
    """One image and the files that are made of it."""

    image: Path
    mask: Path
    overlay: Path


def find_images(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """(file, name for its outputs, relative and without suffix) of every image, each file once.

    Hidden files are left out, and so is `output` where it lies in a folder that is searched. A path that does
    not exist, and a folder without an image, raise UserError.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if _wanted(p.relative_to(path)) and p.is_file()]
            if path.resolve() in output.resolve().parents:
                inside = [p for p in inside if output.resolve() not in p.resolve().parents]
            if not inside:
                raise UserError(f"the folder {path} holds no image (looked for {' '.join(SUFFIXES)})")
            names = [(p, p.relative_to(path).with_suffix("")) for p in inside]
        elif path.exists():
            names = [(path, Path(path.stem))]
        else:
            raise UserError(f"{path} does not exist; expected an image or a folder")
        for file, name in names:
            found.setdefault(file.resolve(), (file, name))
    return list(found.values())


def plan(images: Sequence[tuple[Path, Path]], output: Path) -> list[Job]:
    """Where the outputs of each image go: of images with one name, the second becomes `name-2`, and so on.

    An output that would replace one of the images raises UserError.
    """
    sources = {file.resolve() for file, _ in images}
    taken: set[str] = set()
    jobs = []
    for file, name in images:
        unique, number = name, 2
        # Upper and lower case are one on some file systems.
        while str(unique).casefold() in taken:
            unique, number = name.with_name(f"{name.name}-{number}"), number + 1
        taken.add(str(unique).casefold())
        folder = output / unique.parent
        job = Job(file, folder / f"{unique.name}.png", folder / f"{unique.name}_overlay.jpg")
        for path in (job.mask, job.overlay):
            if path.resolve() in sources:
                raise UserError(f"--output {output}: {path} would be written over an input; choose another folder")
        jobs.append(job)
    return jobs


def read_upright(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB with the file's EXIF orientation applied. UserError where it cannot be read."""
    image = read_image(path)
    with Image.open(path) as header:
        # Pillow applies the orientation of a TIFF by itself when it reads the pixels.
        turn = None if header.format == "TIFF" else _TURNS.get(header.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else np.array(Image.fromarray(image).transpose(turn))


# EXIF 2.32, tag 0x0112: what brings each orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def predict(command: PredictCommand) -> int:
    """Run the command; the number of images that could not be read, each of which is named on stderr."""
    if not 0 <= command.alpha <= 1:
        raise UserError(f"--alpha {command.alpha}: expected 0 to 1")
    if not command.paths:
        raise UserError("no image is given: name images or folders after the checkpoint")
    jobs = plan(find_images(command.paths, command.output), command.output)
    check_replaceable(job.mask for job in jobs)
    if command.overlay:
        check_replaceable(job.overlay for job in jobs)
    device = resolve_device(command.device)
    dtype = resolve_precision(command.precision, device)
    model, config, classes = checkpoint.load_model(command.checkpoint, device, output_stride=command.output_stride)
    if command.submission is not None:
        check_submission(command.submission, classes, [job.image for job in jobs])
    for folder in {job.mask.parent for job in jobs}:
        make_folder(folder)
    print(f"{command.checkpoint}, images: {len(jobs)}; {describe(device, dtype)}")
    options = {"device": device, "dtype": dtype, "channels_last": config.run.channels_last}
    options |= {"window": command.window if any(command.window) else None, "overlap": command.overlap}
    options |= {"scales": command.scales, "flip": command.flip}
    with contextlib.nullcontext() if command.submission is None else submission(command.submission) as archive:
        broken = 0
        bar = tqdm(jobs, unit="image", dynamic_ncols=True, disable=None)
        for job in bar:
            try:
                image = read_upright(job.image)
            except UserError as error:
                if archive is not None:
                    raise UserError(f"{error}; a submission needs every image") from error
                bar.write(f"error: {error}", sys.stderr)
                broken += 1
                continue
            mask = predict_image(model, torch.from_numpy(image), **options).cpu().numpy()
            save_palette_png(job.mask, mask, classes)
            if command.overlay:
                save_image(job.overlay, overlay_with_legend(image, mask, classes, alpha=command.alpha))
            if archive is not None:
                archive.add(job.image, mask)
    if command.submission is not None:
        print(f"labelIds of {len(jobs)} images in {command.submission}")
    files = "masks and overlays" if command.overlay else "masks"
    print(f"{len(jobs) - broken} of {len(jobs)} images done: {files} in {command.output}")
    return broken


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 where an image could not be read; any other mistake raises UserError."""
    command = tyro.cli(PredictCommand, prog="python -m deeplab_fast.predict", args=argv)
    set_allocator()
    broken = predict(command)
    if broken:
        print(f"error: images that could not be read: {broken}", file=sys.stderr)
    return 1 if broken else 0


def _wanted(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


if __name__ == "__main__":
    run_command(main)

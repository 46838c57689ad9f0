"""python -m deeplab_fast.evaluate CHECKPOINT: a labelled split in, scores and colour masks out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .cli import parse_flags, run_command
from .config import DataConfig, DataName, Year
from .data.augment import PAD_VALUE
from .data.datasets import Dataset, FileDataset, open_dataset, require_truth
from .data.labels import Classes
from .data.protocol import CentreCrop, Padded
from .device import describe, resolve_precision, set_allocator
from .distributed import ALONE, Processes, start
from .errors import UserError
from .files import atomic_path, make_folder
from .inference import DEFAULT_OVERLAP, evaluate_dataset
from .metrics import format_table
from .visualize import check_replaceable, save_palette_png

SCORES = ("pixel_accuracy", "mean_accuracy", "miou", "fw_iou", "class_iou", "confusion")
"""What --json takes from `metrics.scores`."""
MIDDLE_GREY = (128, 128, 128)
"""TensorFlow's mean pixel, 0 between -1 and 1; ImageNet's is 0 for all other models."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a checkpoint, on whole images at their own size unless --protocol says otherwise.

    Without --data and --root it takes the data set that the checkpoint was trained with.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """best.pt or last.pt of a training run"""
    data: DataName | None = None
    """the data set; None: the checkpoint's own"""
    root: str | None = None
    """its folder; None: the one in the checkpoint, where --data is not given"""
    year: Year | None = None
    """VOC only: which VOCdevkit folder; None: the checkpoint's own"""
    split: str = "val"
    """the split to score; `val` is the one that training validated on"""
    json: Path | None = None
    """write the scores to this file; only scores of an earlier run are replaced"""
    output: Path | None = None
    """write a palette PNG of each prediction into this folder, outside the data set, under the data set's names"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device has it, fp16 on older GPUs, else fp32"""
    workers: int | None = None
    """loader processes of each process; None: one a core of its share, 8 at most, 0 where there is one core"""
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
    protocol: Literal["paper", "pad513", "crop513"] = "paper"
    """paper: whole images at their own size; pad513: padded to sides of 16 k + 1 pixels, 513 at least, as TensorFlow's
    DeepLab does; crop513: image and truth scaled to a shorter side of 513 pixels, and the square in the middle, for
    figures of repositories that score so"""


def choose_data(saved: DataConfig, name: str | None, root: str | None, year: str | None = None) -> DataConfig:
    """The checkpoint's data set, or another one; what the flags leave open stays as in the checkpoint.

    Another data set than the checkpoint's keeps none of its root and splits.
    """
    if name is not None and name != saved.name:
        saved = dataclasses.replace(saved, name=name, root=None, train_split=None, val_split=None)
    given = {key: value for key, value in (("root", root), ("year", year)) if value is not None}
    return dataclasses.replace(saved, **given)


def check_classes(model: Classes, data: Classes, checkpoint: Path, name: str) -> None:
    """UserError unless a model of the classes `model` can be scored on the classes `data`."""
    if len(model) != len(data):
        raise UserError(f"{checkpoint} has {len(model)} classes, but the data set {name} has {len(data)}")
    for index, (ours, theirs) in enumerate(zip(model.names, data.names, strict=True)):
        if ours != theirs:
            raise UserError(f"class {index} is {ours!r} in {checkpoint}, but {theirs!r} in the data set {name}")


def mask_paths(dataset: Dataset, root: str | None, folder: Path) -> list[Path]:
    """Where each sample's prediction goes.

    UserError where `folder` lies in the data set's `root`, where other splits have masks of the same names, and
    where a prediction would replace a file of the data set, or any that is not a picture of this project.
    """
    paths = [folder / f"{dataset.stem(i)}.png" for i in range(len(dataset))]
    if root is not None and folder.resolve().is_relative_to(Path(root).expanduser().resolve()):
        raise UserError(f"--output {folder} lies in the data set {root}; choose another folder")
    if isinstance(dataset, FileDataset):
        # Its folders may be links to elsewhere.
        sources = {p.resolve() for pair in dataset.pairs for p in (pair.image, pair.mask) if p is not None}
        for path in paths:
            if path.resolve() in sources:
                raise UserError(f"--output {folder}: {path} is a file of the data set; choose another folder")
    check_replaceable(paths)
    return paths


def check_json(path: Path, keys: Collection[str] = ("confusion", "checkpoint"), what: str = "scores") -> None:
    """UserError unless `path` is a new file or one that --json wrote, whose object has `keys`."""
    saved = None
    try:
        if not path.name or path.is_dir():
            raise UserError(f"--json {path} is a folder; expected the name of a file")
        if not path.exists():
            return
        if path.is_file():
            with contextlib.suppress(ValueError):  # not JSON
                saved = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error
    if not (isinstance(saved, dict) and set(keys) <= saved.keys()):
        raise UserError(f"--json {path} exists and does not hold {what} of this command; choose another name")


def _how(command: EvaluateCommand) -> str:
    """What a score without it would not be compared with."""
    parts = [f"{scale:g} x" for scale in command.scales] if command.scales != (1.0,) else []
    parts += ["mirrored"] * command.flip + [f"protocol {command.protocol}"] * (command.protocol != "paper")
    parts += [f"output stride {command.output_stride}"] * (command.output_stride is not None)
    return "".join(f", {part}" for part in parts)


def evaluate(command: EvaluateCommand, processes: Processes = ALONE) -> dict[str, Any]:
    """Run the command: prints the table, writes the files and returns what --json holds.

    Of several processes each writes the masks of its images.
    """
    if command.json is not None:
        check_json(command.json)
    device = processes.device(command.device)
    dtype = resolve_precision(command.precision, device)
    model, config, classes = checkpoint.load_model(command.checkpoint, device, output_stride=command.output_stride)
    data = choose_data(config.data, command.data, command.root, command.year)
    dataset = open_dataset(data, command.split)
    require_truth(dataset)
    check_classes(classes, dataset.classes, command.checkpoint, data.name)
    paths = mask_paths(dataset, data.root, command.output) if command.output else None
    if command.protocol == "crop513":
        dataset = CentreCrop(dataset)
    elif command.protocol == "pad513":
        dataset = Padded(dataset, MIDDLE_GREY if config.model.pixels == "symmetric" else PAD_VALUE)
    for folder in {p.parent for p in (*(paths or ()), command.json) if p is not None}:
        make_folder(folder)

    print(f"{command.checkpoint} on {data.name} {dataset.split}{_how(command)}; {describe(device, dtype)}")
    quiet = None if processes.is_main else True
    bar = tqdm(total=len(processes.every(len(dataset))), unit="image", dynamic_ncols=True, disable=quiet)

    def save(index: int, prediction: Tensor) -> None:
        labels = prediction.cpu().numpy()
        save_palette_png(paths[index], dataset.cut(index, labels) if isinstance(dataset, Padded) else labels, classes)

    began = time.perf_counter()
    with bar:
        result, _ = evaluate_dataset(
            model,
            dataset,
            device=device,
            workers=data.workers if command.workers is None else command.workers,
            each=save if paths else None,
            progress=bar.update,
            dtype=dtype,
            channels_last=config.run.channels_last,
            window=command.window if any(command.window) else None,
            overlap=command.overlap,
            scales=command.scales,
            flip=command.flip,
            processes=processes,
        )
    speed = len(dataset) / (time.perf_counter() - began)
    print(f"\n{format_table(result, classes.names)}\n\n{len(dataset)} images, {speed:.1f} images/s")
    return {
        **{key: result[key] for key in SCORES},
        "checkpoint": str(command.checkpoint),
        "data": data.name,
        "split": dataset.split,
        "images": len(dataset),
        "protocol": command.protocol,
        "scales": list(command.scales),
        "flip": command.flip,
        "output_stride": config.model.output_stride,
        "classes": list(classes.names),
    }


def main(argv: Sequence[str] | None = None, processes: Processes = ALONE) -> int:
    """The command line; a user's mistake raises UserError."""
    command = parse_flags(EvaluateCommand, processes, prog="python -m deeplab_fast.evaluate", args=argv)
    set_allocator()
    result = evaluate(command, processes)
    if command.output:
        print(f"masks in {command.output}")
    if command.json and processes.is_main:
        with atomic_path(command.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        print(f"scores in {command.json}")
    return 0


if __name__ == "__main__":
    run_command(main, start)

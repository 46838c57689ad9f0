"""What a training run leaves behind: config.json, metrics.jsonl, TensorBoard events and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .config import Config
from .data.labels import Classes
from .errors import UserError
from .files import atomic_path
from .visualize import sample_grid, save_confusion, save_curves, save_samples


def new_run_folder(wanted: str, *, explicit: bool) -> Path:
    """The folder of a new run, created and claimed by its config.json. A folder that holds a run is never written over:
    where the user named it that is an error, otherwise the next free `wanted-2`, `wanted-3` ... is taken."""
    folder = Path(wanted)
    number = 2
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").open("x").close()  # fails for the second of two runs that start at once
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"--output {folder} is a file; expected a folder") from None
            if explicit:
                raise UserError(
                    f"{folder} holds a run already: give another --output, or go on with --resume {folder}"
                ) from None
            folder = Path(f"{wanted}-{number}")
            number += 1
        except OSError as error:
            raise UserError(f"--output {folder} cannot be used: {error.strerror}") from None


class RunRecord:
    """Writes the record of one run into `folder`.

    A run that goes on keeps the lines up to `step`, and of validations those up to `validated_step`; later ones belong
    to steps that are done again.
    """

    def __init__(self, folder: Path, config: Config, classes: Classes, step: int, validated_step: int) -> None:
        self.folder, self.classes = folder, classes
        self.path = folder / "metrics.jsonl"
        self.lines = [
            line for line in _read_lines(self.path) if line["step"] <= (validated_step if "miou" in line else step)
        ]
        with atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = self.path.open("a", buffering=1)
        self._writer = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def step(self, line: dict[str, Any]) -> None:
        """One line of training figures; the keys are step, loss, lr, images_per_second ..."""
        self._write(line, prefix="train")

    def validation(self, step: int, metrics: dict[str, Any], samples: list[tuple[np.ndarray, ...]]) -> None:
        """One line of validation figures, and the pictures drawn anew.

        samples: (image uint8 (H, W, 3), truth uint8 (H, W), prediction uint8 (H, W)) each.
        """
        named = {name: iou for name, iou in zip(self.classes.names, metrics["class_iou"], strict=True)}
        kept = {key: metrics[key] for key in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou")}
        self._write({"step": step, **kept, "class_iou": named}, prefix="val")
        save_confusion(self.folder / "confusion.png", metrics["confusion"], self.classes)
        save_samples(self.folder / "samples.png", samples, self.classes)
        self.curves()
        if self._writer:
            self._writer.add_image("samples", sample_grid(samples, self.classes), step, dataformats="HWC")
            self._writer.flush()

    def curves(self) -> None:
        """Draw curves.png from all lines so far."""
        save_curves(self.folder / "curves.png", self.lines)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()

    def _write(self, line: dict[str, Any], prefix: str) -> None:
        self.lines.append(line)
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self._writer:
            for key, value in line.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._writer.add_scalar(f"{prefix}/{key}", value, line["step"])


class NoRecord:
    """What a process other than the main one has in its place: nothing is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, line: dict[str, Any]) -> None: ...

    def validation(self, step: int, metrics: dict[str, Any], samples: list[tuple[np.ndarray, ...]]) -> None: ...

    def close(self) -> None: ...


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines

"""Checkpoints: one file that holds all that is needed to rebuild the model, or to go on training.

Keys: format, step, model (state_dict; the averaged weights where EMA is on), config, classes, metrics; `last.pt` adds
the training state under `training`. Only tensors and plain Python types, so `weights_only=True` loads it.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from .config import Config, ModelConfig
from .data.labels import Classes
from .errors import UserError
from .files import atomic_path
from .model import build_model
from .model.deeplab import DeepLab
from .model.weights import read_file

FORMAT = "deeplab_fast.1"


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` so that a kill at any moment leaves either the old file or the new one."""
    # Through memory, because torch's own writer turns a full disk into an internal error without its reason.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Anything else than one of this project's raises UserError."""
    content = read_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project (expected one with format {FORMAT})")
    return content


def classes_to_dict(classes: Classes) -> dict[str, Any]:
    """Plain types for the file."""
    return {"names": list(classes.names), "palette": [list(colour) for colour in classes.palette]}


def classes_from_dict(saved: dict[str, Any]) -> Classes:
    """The inverse of `classes_to_dict`."""
    return Classes(tuple(saved["names"]), tuple(tuple(colour) for colour in saved["palette"]))


def build(config: Config, classes: Classes) -> DeepLab:
    """The model that `config` describes, with random weights."""
    return build_model(num_classes=len(classes.names), **dataclasses.asdict(config.model))


def at_output_stride(model: ModelConfig, output_stride: int) -> ModelConfig:
    """The same weights' model with denser or coarser last features (DeepLabv3, section 4.1).

    ASPP's rates follow, so that its taps stay where they were in the image: doubled from output stride 16 to 8.
    """
    rates = model.atrous_rates
    if rates is not None:
        scaled = [rate * model.output_stride for rate in rates]
        if any(length % output_stride for length in scaled):
            raise UserError(
                f"--output-stride {output_stride}: ASPP's rates {rates} at output stride {model.output_stride} would "
                "not stay whole numbers"
            )
        rates = tuple(length // output_stride for length in scaled)
    return dataclasses.replace(model, output_stride=output_stride, atrous_rates=rates)


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, output_stride: int | None = None
) -> tuple[DeepLab, Config, Classes]:
    """The model of a checkpoint in eval mode on `device`, its config, and its classes.

    The weights are channels-last where `config.run.channels_last` is set, as the inputs are. output_stride: see
    `at_output_stride`; None: the one that it was trained at.
    """
    content = load(path)
    config, classes = Config.from_dict(content["config"]), classes_from_dict(content["classes"])
    if output_stride is not None:
        config = dataclasses.replace(config, model=at_output_stride(config.model, output_stride))
    model = build(config, classes)
    model.load_state_dict(content["model"])
    memory_format = torch.channels_last if config.run.channels_last else torch.preserve_format
    return model.eval().to(device, memory_format=memory_format), config, classes

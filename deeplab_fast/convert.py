"""python -m deeplab_fast.convert FILE: the trained weights of another project in, a checkpoint of this one out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import checkpoint
from .cli import run_command
from .config import Config, DataConfig, ModelConfig, RunConfig
from .data.labels import CAMVID, CITYSCAPES, VOC, Classes, voc_palette
from .errors import UserError
from .files import make_folder
from .model.importers import Loaded, identify, load_weights

KNOWN = {"voc": VOC, "cityscapes": CITYSCAPES, "camvid": CAMVID}


@dataclass(frozen=True)
class ConvertCommand:
    """Turn the DeepLab that another project trained into a checkpoint for evaluate, predict and train --weights.

    It knows torchvision, segmentation_models_pytorch, jfzhang95 and HaoranYao, CoinCheung and konami86, chenxi116,
    zym1119, hualin95 and VainF, TensorFlow's DeepLabv3 on a MobileNetV2 as a .tflite file, the checkpoints of
    tensorflow/models' research/deeplab, and the graph that each was trained in.
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """what that project's training saved; of TensorFlow's model.ckpt, one of its files, their folder or .tar.gz"""
    output: Path
    """the checkpoint to write; only a checkpoint of this project is replaced"""
    classes: Literal["voc", "cityscapes", "camvid"] | None = None
    """what the classes mean; None: by their number, 21, 19 or 11, else class 0, class 1, ..."""
    output_stride: Literal[8, 16, 32] | None = None
    """of the backbone; None: the one that the project trains with by default"""
    atrous_rates: tuple[int, ...] | None = None
    """ASPP's rates; None: the project's, at that output stride"""


def name_classes(count: int, name: str | None) -> tuple[Classes, str]:
    """Names and colours for `count` classes, and the data set that they are of. UserError where the number differs."""
    if name is None:
        name = next((known for known, classes in KNOWN.items() if len(classes) == count), None)
    if name is None:
        return Classes(tuple(f"class {i}" for i in range(count)), voc_palette(count)), "folder"
    if len(KNOWN[name]) != count:
        raise UserError(f"--classes {name}: has {len(KNOWN[name])} classes, the file has {count}")
    return KNOWN[name], name


def content(loaded: Loaded, name: str | None) -> dict:
    """What the checkpoint holds."""
    fields, state = dict(loaded.fields), loaded.model.state_dict()
    count = fields.pop("num_classes")
    if count == 20 and fields["backbone"] == "mobilenet_v2_zym1119":
        # Trained with one class more than Cityscapes has, which no pixel is labelled with.
        count = 19
        state |= {key: state[key][:count] for key in ("classifier.weight", "classifier.bias")}
    classes, data = name_classes(count, name)
    config = Config(data=DataConfig(name=data), model=ModelConfig(**fields), run=RunConfig(weights=None))
    return {
        "step": 0,
        "model": state,
        "config": config.to_dict(),
        "classes": checkpoint.classes_to_dict(classes),
        "metrics": None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    command = tyro.cli(ConvertCommand, prog="python -m deeplab_fast.convert", args=argv)
    if command.output.exists():
        checkpoint.load(command.output)  # raises for anything else
    given = {"output_stride": command.output_stride, "atrous_rates": command.atrous_rates}
    layout, _ = identify(command.file)
    if layout is not None and not layout.whole:
        raise UserError(f"{command.file}: holds a backbone alone: start from it with train --weights {command.file}")
    loaded = load_weights(None, command.file, **{k: v for k, v in given.items() if v is not None})
    saved = content(loaded, command.classes)
    make_folder(command.output.parent)
    checkpoint.save(command.output, saved)
    default = Config().to_dict()["model"]
    other = [f"{k} {v}" for k, v in saved["config"]["model"].items() if v != default[k]]
    print(f"{command.file}: {loaded.source}, {len(saved['classes']['names'])} classes; {', '.join(other)}")
    if loaded.left_over:
        print(f"left out: {', '.join(loaded.left_over)}")
    print(f"wrote {command.output}")
    return 0


if __name__ == "__main__":
    run_command(main)

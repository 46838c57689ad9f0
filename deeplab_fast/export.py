"""python -m deeplab_fast.export CHECKPOINT --output model.onnx: a trained model in, one file for other runtimes out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from . import __version__, checkpoint
from .cli import run_command
from .data.labels import Classes
from .errors import UserError
from .files import atomic_path, make_folder
from .model import DeepLab
from .ops import dispatch
from .ops.normalize_image import MEAN, STD

KEY = "deeplab_fast"
"""Of the JSON in either file: version, class names and colours."""
SMALLEST = 33
"""Pixels of a side: below it the last features are one pixel, and a graph for any size would be made for that."""
OPSET = 20
_PROBE = (97, 131)  # odd, of no stride's grid
# What rounding may do: to logits, of the largest; to labels, a share, where two logits tie but for it.
MOST_OF_LOGITS, MOST_OF_LABELS = 1e-4, 1e-3


@dataclass(frozen=True)
class ExportCommand:
    """Write a checkpoint as a graph from a photo to its label map, which needs nothing of this project to run.

    Input `image`: uint8 (batch, height, width, 3), RGB; normalisation is in the graph. Output `labels`: uint8 (batch,
    height, width), or `logits`. In fp32, of batches and images of any size. The file is run, and compared with the
    model, before it gets its name.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """best.pt or last.pt of a training run"""
    output: Path
    """NAME.onnx, for ONNX Runtime, TensorRT and OpenVINO, or NAME.pt2, for torch.export.load; only a file of this
    command is replaced"""
    size: tuple[int, int] | None = None
    """height and width that every image will have; None: any"""
    logits: bool = False
    """write fp32 logits (batch, classes, height, width) in place of labels"""
    output_stride: Literal[8, 16, 32] | None = None
    """of the backbone, with ASPP's rates to match; None: the one that the model was trained at"""


class Photo(nn.Module):
    """uint8 (N, H, W, 3) RGB -> labels uint8 (N, H, W), the lowest class where logits tie, or logits (N, K, H, W)."""

    def __init__(self, model: DeepLab, logits: bool) -> None:
        super().__init__()
        self.model, self.logits = model, logits
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255)

    def forward(self, image: Tensor) -> Tensor:
        x = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        logits = self.model.predict_logits(x)
        return logits if self.logits else logits.argmax(1).to(torch.uint8)


def about(classes: Classes) -> str:
    """What either file says of itself."""
    return json.dumps({"version": __version__, **checkpoint.classes_to_dict(classes)})


def trace(photo: Photo, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """The graph in torch's own operators, of any batch, and of any height and width unless `size` is given."""
    dim = torch.export.Dim
    free = {0: dim("batch")}
    if size is None:
        free |= {1: dim("height", min=SMALLEST), 2: dim("width", min=SMALLEST)}
    example = torch.zeros(2, *(size or _PROBE), 3, dtype=torch.uint8)
    with dispatch.requesting("reference"), torch.no_grad():
        return torch.export.export(photo, (example,), dynamic_shapes=(free,))


def write_onnx(program: torch.export.ExportedProgram, path: Path, output: str, text: str) -> None:
    """One ONNX file with its weights inside."""
    with _quiet():
        written = torch.onnx.export(
            program, dynamo=True, input_names=["image"], output_names=[output], opset_version=OPSET, verbose=False
        )
    written.model.producer_name, written.model.producer_version = KEY, __version__
    written.model.metadata_props[KEY] = text
    model = written.model_proto
    _name_sizes(model.graph)
    path.write_bytes(model.SerializeToString())


def _name_sizes(graph: Any) -> None:
    """`batch`, `height` and `width` in place of the tracer's symbols, in every shape of a GraphProto."""
    symbols = [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim[:3]]
    names = {symbol: name for symbol, name in zip(symbols, ("batch", "height", "width"), strict=True) if symbol}
    for value in (*graph.input, *graph.value_info, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)


def write_pt2(program: torch.export.ExportedProgram, path: Path, text: str) -> None:
    """One file for `torch.export.load`. Through memory: torch turns a full disk into an internal error."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={KEY: text})
    path.write_bytes(content.getbuffer())


def run_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    """The file in ONNX Runtime on the CPU; None where that is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as torch loads it."""
    return torch.export.load(path).module()


def compare(run: Callable[[Tensor], Tensor], photo: Photo, size: tuple[int, int] | None) -> float:
    """The largest difference of logits over their largest value, or the share of labels that differ, on noise."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    shapes = [(1, *size), (2, *size)] if size else [(1, *_PROBE), (3, 64, 160)]
    for shape in shapes:
        image = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            expected, found = photo(image), run(image)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise UserError(f"the exported graph gives {found.dtype} {tuple(found.shape)} for {tuple(image.shape)}")
        if photo.logits:
            worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
        else:
            worst = max(worst, (found != expected).float().mean().item())
    return worst


def check_output(path: Path) -> None:
    """UserError unless `path` ends in .onnx or .pt2 and is new or a file that this command wrote."""
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--output {path}: expected a name that ends in .onnx or .pt2")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"--output {path}: the package {missing[0]} is missing: pip install -e '.[onnx]' -c constraints.txt"
            )
    if not path.exists():
        return
    if path.is_dir() or not _is_own(path):
        raise UserError(f"--output {path} exists and is not a file of this command; choose another name")


def _is_own(path: Path) -> bool:
    """Whether this command wrote the file, by the JSON that it leaves in it."""
    if path.suffix == ".pt2":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return f"archive/extra/{KEY}" in archive.namelist()
        return False
    import onnx
    from google.protobuf.message import DecodeError  # a part of onnx

    with contextlib.suppress(DecodeError):
        return any(item.key == KEY for item in onnx.load(path, load_external_data=False).metadata_props)
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it has no use for."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def export(command: ExportCommand) -> None:
    """Run the command."""
    check_output(command.output)
    if command.size and min(command.size) < 1:
        raise UserError(f"--size {command.size[0]} {command.size[1]}: expected a height and a width in pixels")
    model, _, classes = checkpoint.load_model(command.checkpoint, output_stride=command.output_stride)
    photo = Photo(model.to(memory_format=torch.contiguous_format), command.logits).eval()
    text, output = about(classes), "logits" if command.logits else "labels"
    program = trace(photo, command.size)
    make_folder(command.output.parent)
    onnx = command.output.suffix == ".onnx"
    with atomic_path(command.output) as temporary:
        if onnx:
            write_onnx(program, temporary, output, text)
        else:
            write_pt2(program, temporary, text)
        run = run_onnx(temporary) if onnx else run_pt2(temporary)
        worst = None if run is None else compare(run, photo, command.size)
        if worst is not None and worst > (MOST_OF_LOGITS if command.logits else MOST_OF_LABELS):
            raise UserError(f"{command.output}: the graph differs from the model by {worst:.2g}; not written")
    size = "any size" if command.size is None else f"{command.size[0]} x {command.size[1]}"
    print(f"wrote {command.output}: image uint8 (batch, height, width, 3) RGB of {size} -> {output}")
    what = "logits differ by at most" if command.logits else "share of labels that differ:"
    how = f"run and compared with the model; {what} {worst:.2g}"
    print("not run: pip install onnxruntime" if worst is None else how)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises UserError."""
    export(tyro.cli(ExportCommand, prog="python -m deeplab_fast.export", args=argv))
    return 0


if __name__ == "__main__":
    run_command(main)

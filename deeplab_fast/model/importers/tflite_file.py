"""TensorFlow Lite's files, a flatbuffer of a graph: operators and constant tensors.

Parsed by the package tflite, an optional dependency; TensorFlow is not needed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import UserError

MAGIC = b"TFL3"  # at byte 4
TYPES = {"FLOAT32": "<f4", "FLOAT16": "<f2", "INT8": "i1", "UINT8": "u1", "INT32": "<i4"}
_CONVOLUTION = ("Padding", "StrideH", "StrideW", "DilationHFactor", "DilationWFactor", "FusedActivationFunction")
# The options that are read of an operator, by tflite's names.
OPTIONS = {
    "CONV_2D": ("Conv2DOptions", _CONVOLUTION),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", _CONVOLUTION),
    "ADD": ("AddOptions", ("FusedActivationFunction",)),
    "AVERAGE_POOL_2D": ("Pool2DOptions", ("FilterHeight", "FilterWidth")),
    "RESIZE_BILINEAR": ("ResizeBilinearOptions", ("AlignCorners", "HalfPixelCenters")),
}


@dataclass(frozen=True)
class Array:
    """A tensor of the graph; `data` is empty where it is computed, not constant."""

    name: str
    shape: tuple[int, ...]
    type: str
    """FLOAT32, INT8, ..."""
    data: bytes | memoryview
    scales: tuple[float, ...]
    """of a quantised tensor, one or one for each index of `axis`"""
    zero_points: tuple[int, ...]
    axis: int

    def values(self) -> np.ndarray:
        """fp32, of `shape`; of a quantised tensor the numbers that it stands for."""
        if self.type not in TYPES:
            raise UserError(f"its tensor {self.name} is {self.type}, expected {', '.join(TYPES)}")
        if not self.data:
            raise UserError(f"its tensor {self.name} is computed, expected a constant")
        stored = np.frombuffer(self.data, TYPES[self.type]).reshape(self.shape).astype(np.float32)
        if not self.scales:
            return stored
        shape = [-1 if i == self.axis and len(self.scales) > 1 else 1 for i in range(stored.ndim)]
        scales, zeros = (np.asarray(x, np.float32).reshape(shape) for x in (self.scales, self.zero_points))
        return (stored - zeros) * scales


@dataclass(frozen=True)
class Operator:
    """One node: its inputs and its output by their place among the tensors, an input of -1 left out."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    options: dict[str, int]
    """those of `OPTIONS`"""


@dataclass(frozen=True)
class Graph:
    """A network of one input and one output, operators in the order they run in."""

    tensors: list[Array]
    operators: list[Operator]
    input: int
    output: int


def is_tflite(path: str | Path) -> bool:
    """By its magic, or for a damaged one by its name."""
    try:
        with open(path, "rb") as file:
            return file.read(8)[4:] == MAGIC or Path(path).suffix == ".tflite"
    except OSError:
        return Path(path).suffix == ".tflite"


def read_graph(path: str | Path) -> Graph:
    """The graph of a .tflite file. UserError where it is none, is damaged, or the package tflite is not installed."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: no such weights file, or not readable ({error.strerror})") from error
    if content[4:8] != MAGIC:
        raise UserError(f"{path}: not a TensorFlow Lite file, expected {MAGIC.decode()} after its fourth byte")
    try:
        import tflite
    except ImportError as error:
        raise UserError(
            f"{path}: TensorFlow Lite's files are read by the package tflite: pip install 'deeplab_fast[tflite]'"
        ) from error
    try:
        return _parse(tflite, content)
    except (
        # What reading at an offset that points nowhere raises.
        *(struct.error, ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError),
    ) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, expected a whole TensorFlow Lite file ({reason})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parse(tflite: ModuleType, content: bytes) -> Graph:
    model = tflite.Model.GetRootAs(content, 0)
    if model.SubgraphsLength() != 1:
        raise UserError(f"holds {model.SubgraphsLength()} graphs, expected one")
    graph = model.Subgraphs(0)
    if (graph.InputsLength(), graph.OutputsLength()) != (1, 1):
        raise UserError(
            f"its graph has {graph.InputsLength()} inputs and {graph.OutputsLength()} outputs, expected one of each"
        )
    tensors = [_tensor(tflite, model, graph.Tensors(i)) for i in range(graph.TensorsLength())]
    operators, seen = [], set()
    for i in range(graph.OperatorsLength()):
        operator = _operator(tflite, model, graph.Operators(i), len(tensors))
        seen.update(operator.inputs)
        if operator.output in seen:  # else who follows the graph may come by again
            raise ValueError(f"an operator {operator.kind} writes what was there before it")
        seen.add(operator.output)
        if operator.kind == "DEQUANTIZE" and tensors[operator.inputs[0]].data:
            tensors[operator.output] = tensors[operator.inputs[0]]  # weights in half precision
        else:
            operators.append(operator)
    if not all(0 <= i < len(tensors) for i in (graph.Inputs(0), graph.Outputs(0))):
        raise ValueError("its input or output is no tensor")
    return Graph(tensors, operators, graph.Inputs(0), graph.Outputs(0))


def _tensor(tflite: ModuleType, model: Any, tensor: Any) -> Array:
    shape = tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
    kind = _name_of(tflite.TensorType, tensor.Type())
    buffer = model.Buffers(tensor.Buffer())
    # No copy: any number of tensors may name one buffer.
    data = memoryview(buffer.DataAsNumpy()) if buffer.DataLength() else b""
    if data and kind in TYPES and len(data) != math.prod(shape) * np.dtype(TYPES[kind]).itemsize:
        raise ValueError(f"{len(data)} bytes for a {kind} tensor of {shape}")
    if data and min(shape, default=0) < 0:
        raise ValueError(f"a tensor of {shape}")
    scales, zeros, axis = (), (), 0
    if (quantisation := tensor.Quantization()) is not None and quantisation.ScaleLength():
        scales = tuple(quantisation.Scale(i) for i in range(quantisation.ScaleLength()))
        zeros = tuple(quantisation.ZeroPoint(i) for i in range(quantisation.ZeroPointLength())) or (0,) * len(scales)
        axis = quantisation.QuantizedDimension()
        if len(zeros) != len(scales) or (len(scales) > 1 and (axis < 0 or len(scales) != shape[axis])):
            raise ValueError(f"{len(scales)} scales and {len(zeros)} zero points for a tensor of {shape}")
    return Array((tensor.Name() or b"").decode(), shape, kind, data, scales, zeros, axis)


def _operator(tflite: ModuleType, model: Any, operator: Any, count: int) -> Operator:
    code = model.OperatorCodes(operator.OpcodeIndex())
    # Old files have the first alone, new ones 127 there for what does not fit.
    kind = _name_of(tflite.BuiltinOperator, max(code.DeprecatedBuiltinCode(), code.BuiltinCode()))
    inputs = tuple(operator.Inputs(i) for i in range(operator.InputsLength()))
    outputs = tuple(operator.Outputs(i) for i in range(operator.OutputsLength()))
    if not all(-1 <= i < count for i in inputs) or not all(0 <= i < count for i in outputs) or not outputs:
        raise ValueError(f"an operator {kind} from {inputs} to {outputs} of {count} tensors")
    options = {}
    if kind in OPTIONS:
        name, items = OPTIONS[kind]
        reader, table = getattr(tflite, name)(), operator.BuiltinOptions()
        reader.Init(table.Bytes, table.Pos)
        options = {item: getattr(reader, item)() for item in items}
    return Operator(kind, inputs, outputs[0], options)


def _name_of(kinds: type, number: int) -> str:
    return next((name for name, value in vars(kinds).items() if value == number), f"number {number}")

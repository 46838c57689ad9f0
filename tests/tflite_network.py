"""TensorFlow's DeepLabv3 on a MobileNetV2, run in plain PyTorch and written as a .tflite file in the same breath.

Restated from tensorflow/models' tables, on none of this project's layers. A test spoils the tape before it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import tflite
import torch
import torch.nn.functional as F
from torch import Tensor

# Channels of each block at widths 1, 0.5 and 0.25 (multiples of 4, never a tenth under), repeats, strides.
STAGES = {
    1.0: (32, 16, 24, 32, 64, 96, 160, 320),
    0.5: (16, 8, 12, 16, 32, 48, 80, 160),
    0.25: (8, 4, 8, 8, 16, 24, 40, 80),
}
REPEATS, STRIDES = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)
OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONCATENATION": "ConcatenationOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "ARG_MAX": "ArgMaxOptions",
    "DEQUANTIZE": "DequantizeOptions",
}
ACTIVATIONS = {"NONE": lambda x: x, "RELU": F.relu, "RELU6": F.relu6}


def same_padded(x: Tensor, kernel: int, stride: int, rate: int) -> Tensor:
    """TensorFlow's SAME: what an uneven sum has left over goes to the end."""
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max(0, (-(-size // stride) - 1) * stride + rate * (kernel - 1) + 1 - size)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Tape:
    """Computes on NCHW tensors and remembers operators (kind, inputs, output, options) and tensors of NHWC."""

    def __init__(self, x: Tensor, weights: str = "FLOAT32") -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.weights = weights
        self.tensors: list[dict[str, Any]] = []
        self.operators: list[dict[str, Any]] = []
        self.values: dict[int, Tensor] = {}
        self.inputs = [self.computed(x, "image")]
        self.output = self.inputs[0]

    def add_tensor(self, name: str, shape: Sequence[int], kind: str, data: bytes = b"", **quantised: Any) -> int:
        self.tensors.append({"name": name, "shape": shape, "type": kind, "data": data, **quantised})
        return len(self.tensors) - 1

    def computed(self, x: Tensor, name: str) -> int:
        place = self.add_tensor(name, [x.shape[0], *x.shape[2:], x.shape[1]], "FLOAT32")
        self.values[place] = x
        return place

    def run(self, kind: str, inputs: list[int], y: Tensor, name: str, **options: Any) -> int:
        self.output = self.computed(y, name)
        self.operators.append({"kind": kind, "inputs": inputs, "output": self.output, "options": options})
        return self.output

    def weight(self, value: Tensor, axis: int, name: str) -> tuple[int, Tensor]:
        """A constant in the tape's type of weights, and what that type leaves of it."""
        array = value.numpy()
        if self.weights == "FLOAT16":
            half = self.add_tensor(f"{name}/half", array.shape, "FLOAT16", array.astype("<f2").tobytes())
            place = self.add_tensor(name, array.shape, "FLOAT32")
            self.operators.append({"kind": "DEQUANTIZE", "inputs": [half], "output": place, "options": {}})
            return place, torch.from_numpy(array.astype("<f2").astype("<f4"))
        if self.weights in ("INT8", "UINT8"):  # a scale for each channel, or one with a zero point
            signed = self.weights == "INT8"
            others = tuple(i for i in range(4) if i != axis or not signed)
            scales, zero = np.abs(array).max(others, keepdims=True) / 127, 0 if signed else 130
            stored = np.round(array / scales).clip(-127, 125) + zero
            quantised = {"scales": scales.ravel(), "axis": axis if signed else 0, "zero": zero}
            data = stored.astype("i1" if signed else "u1").tobytes()
            place = self.add_tensor(name, array.shape, self.weights, data, **quantised)
            return place, torch.from_numpy((stored - zero).astype("<f4") * scales.astype("<f4"))
        return self.add_tensor(name, array.shape, "FLOAT32", array.astype("<f4").tobytes()), value

    def conv(
        self, x: int, out: int, kernel: int = 1, *, name: str, act: str = "NONE", stride: int = 1, rate: int = 1,
        depthwise: bool = False,
    ) -> int:  # fmt: skip
        value = self.values[x]
        fan = kernel * kernel * (1 if depthwise else value.shape[1])
        shape = (1, kernel, kernel, out) if depthwise else (out, kernel, kernel, value.shape[1])
        raw = torch.randn(shape, generator=self.generator) * (2 / fan) ** 0.5
        place, weight = self.weight(raw, 3 if depthwise else 0, f"{name}/weights")
        bias = torch.randn(out, generator=self.generator) * 0.3
        inputs = [x, place, self.add_tensor(f"{name}/bias", [out], "FLOAT32", bias.numpy().tobytes())]
        weight = weight.permute((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        y = same_padded(value, kernel, stride, rate)
        y = F.conv2d(y, weight, bias, stride, 0, rate, out if depthwise else 1)
        options = {"StrideH": stride, "StrideW": stride, "DilationHFactor": rate, "DilationWFactor": rate}
        options |= {"DepthMultiplier": 1} if depthwise else {}
        kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        activation = getattr(tflite.ActivationFunctionType, act)
        return self.run(kind, inputs, ACTIVATIONS[act](y), name, FusedActivationFunction=activation, **options)

    def add(self, x: int, y: int, name: str) -> int:
        return self.run("ADD", [x, y], self.values[x] + self.values[y], name)

    def pool(self, x: int) -> int:
        h, w = self.values[x].shape[2:]
        y = F.avg_pool2d(self.values[x], (h, w))
        sizes = {"FilterHeight": h, "FilterWidth": w, "StrideH": h, "StrideW": w}
        return self.run("AVERAGE_POOL_2D", [x], y, "pool", Padding=1, **sizes)

    def resize(self, x: int, size: Sequence[int], *, corners: bool = True, half: bool = False) -> int:
        y = F.interpolate(self.values[x], size=tuple(size), mode="bilinear", align_corners=corners)
        wanted = self.add_tensor("size", [2], "INT32", np.array(size, "<i4").tobytes())
        return self.run("RESIZE_BILINEAR", [x, wanted], y, "resize", AlignCorners=corners, HalfPixelCenters=half)

    def concat(self, parts: Sequence[int]) -> int:
        return self.run("CONCATENATION", list(parts), torch.cat([self.values[p] for p in parts], 1), "concat", Axis=3)

    @property
    def logits(self) -> Tensor:
        """(1, K, H, W)"""
        return self.values[self.output]

    def write(self, path: Path) -> Path:
        path.write_bytes(serialised(self))
        return path


def deeplab(
    x: Tensor, classes: int = 5, *, width: float = 0.25, stride: int = 16, weights: str = "FLOAT32",
    pool_first: bool = True, corners: bool = True,
) -> Tape:  # fmt: skip
    """x (1, 3, H, W) from -1 to 1."""
    tape, channels = Tape(x, weights), STAGES[width]
    at = tape.conv(tape.inputs[0], channels[0], 3, name="Conv", act="RELU6", stride=2)
    reached, rate, number = 2, 1, 0
    for repeats, step, out in zip(REPEATS, STRIDES, channels[1:], strict=True):
        for i in range(repeats):
            begun, here, block = at, step if i == 0 else 1, f"expanded_conv_{number}"
            dilated, number = rate, number + 1
            if reached == stride:  # a stride that is left out dilates what comes after it
                rate, here = rate * here, 1
            reached *= here
            width_in = tape.values[at].shape[1]
            if number > 1:
                at, width_in = tape.conv(at, 6 * width_in, name=f"{block}/expand", act="RELU6"), 6 * width_in
            options = {"stride": here, "rate": dilated, "depthwise": True}
            at = tape.conv(at, width_in, 3, name=f"{block}/depthwise", act="RELU6", **options)
            at = tape.conv(at, out, name=f"{block}/project")
            if i > 0:
                at = tape.add(at, begun, f"{block}/add")
    size = tape.values[at].shape[2:]
    pool = tape.resize(tape.conv(tape.pool(at), 16, name="image_pooling", act="RELU"), size)
    branch = tape.conv(at, 16, name="aspp0", act="RELU")
    at = tape.concat((pool, branch) if pool_first else (branch, pool))
    at = tape.conv(tape.conv(at, 16, name="concat_projection", act="RELU"), classes, name="logits")
    tape.resize(tape.resize(at, size), x.shape[2:], corners=corners, half=not corners)
    return tape


def _vector(builder: flatbuffers.Builder, items: Sequence[int], size: int, prepend: Any) -> int:
    builder.StartVector(size, len(items), size)
    for item in reversed(items):
        prepend(item)
    return builder.EndVector()


def serialised(tape: Tape) -> bytes:
    """The bytes of a .tflite file."""
    b = flatbuffers.Builder(1 << 20)
    kinds = sorted({operator["kind"] for operator in tape.operators})

    def integers(items: Sequence[int]) -> int:
        return _vector(b, [int(i) for i in items], 4, b.PrependInt32)

    def made(table: str, **fields: Any) -> int:
        getattr(tflite, f"{table}Start")(b)
        for name, value in fields.items():
            getattr(tflite, f"{table}Add{name}")(b, value)
        return getattr(tflite, f"{table}End")(b)

    buffers, tensors, operators = [made("Buffer")], [], []
    for tensor in tape.tensors:
        fields = {"Shape": integers(tensor["shape"]), "Type": getattr(tflite.TensorType, tensor["type"])}
        fields |= {"Buffer": 0, "Name": b.CreateString(tensor["name"])}
        if tensor["data"]:
            buffers.append(made("Buffer", Data=b.CreateByteVector(tensor["data"])))
            fields["Buffer"] = len(buffers) - 1
        if (scales := tensor.get("scales")) is not None:
            scale = b.CreateNumpyVector(np.asarray(scales, "<f4"))
            zero = b.CreateNumpyVector(np.full(len(scales), tensor.get("zero", 0), "<i8"))
            quantised = {"Scale": scale, "ZeroPoint": zero, "QuantizedDimension": tensor.get("axis", 0)}
            fields["Quantization"] = made("QuantizationParameters", **quantised)
        tensors.append(made("Tensor", **fields))
    for operator in tape.operators:
        table = OPTIONS[operator["kind"]]
        operators.append(
            made(
                "Operator",
                **{
                    "Inputs": integers(operator["inputs"]),
                    "Outputs": integers([operator["output"]]),
                    "OpcodeIndex": kinds.index(operator["kind"]),
                    "BuiltinOptionsType": getattr(tflite.BuiltinOptions, table),
                    "BuiltinOptions": made(table, **operator["options"]),
                },
            )
        )
    codes = [getattr(tflite.BuiltinOperator, kind) for kind in kinds]
    versions = {"DEPTHWISE_CONV_2D": 2, "RESIZE_BILINEAR": 3, "DEQUANTIZE": 2}
    codes = [
        made("OperatorCode", DeprecatedBuiltinCode=code, BuiltinCode=code, Version=versions.get(kind, 1))
        for kind, code in zip(kinds, codes, strict=True)
    ]
    offsets = [_vector(b, items, 4, b.PrependUOffsetTRelative) for items in (tensors, operators, codes, buffers)]
    ends = {"Inputs": integers(tape.inputs), "Outputs": integers([tape.output])}
    graph = made("SubGraph", Tensors=offsets[0], Operators=offsets[1], **ends)
    graphs = _vector(b, [graph], 4, b.PrependUOffsetTRelative)
    b.Finish(made("Model", Version=3, OperatorCodes=offsets[2], Subgraphs=graphs, Buffers=offsets[3]), b"TFL3")
    return bytes(b.Output())

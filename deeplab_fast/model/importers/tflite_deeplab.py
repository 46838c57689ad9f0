"""TensorFlow's DeepLabv3 on a MobileNetV2 as a TensorFlow Lite file: its graph, read operator by operator.

tensorflow/models research/deeplab at its smallest: the head is the 1x1 branch and the image pooling. Such a file has
every batch norm folded into its convolution. Here the norm keeps the bias that is left, with a weight of 1, a mean of 0
and a variance of 1 less its epsilon: it computes exactly x + bias. These are no statistics of any data: the model is
built with norm "frozen_batch", which trains the convolutions and never takes a batch's statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..deeplab import build_model
from ..mobilenet import STAGES, scaled
from .tflite_file import Graph, Operator

State = dict[str, Tensor]
BLOCKS = sum(depth for _, _, depth, _ in STAGES)
EXPECTED = "expected TensorFlow's DeepLabv3 on a MobileNetV2, with image pooling and no atrous branch or decoder"
ACTIVATIONS = {0: "none", 1: "relu", 3: "relu6"}
JOINS = ("ADD", "CONCATENATION")
EPS = 1e-5  # of this project's norms


class Walk:
    """Follows a graph and gathers the tensors of each layer it passes, by this project's names."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.state: State = {}

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.graph.tensors[tensor].shape

    def then(self, tensor: int, *kinds: str) -> Operator:
        """The one operator of these kinds that takes `tensor`."""
        users = [o for o in self.graph.operators if tensor in (o.inputs if o.kind in JOINS else o.inputs[:1])]
        found = [operator for operator in users if operator.kind in kinds]
        if len(found) != 1:
            followers = ", ".join(operator.kind for operator in users) or "nothing"
            name = self.graph.tensors[tensor].name
            raise UserError(f"{followers} after {name} where {' or '.join(kinds)} was looked for; {EXPECTED}")
        return found[0]

    def layer(
        self, tensor: int, kernel: int, activation: str, conv: str, norm: str | None = None, depthwise: bool = False
    ) -> Operator:
        """The convolution that takes `tensor`; its weight goes to `conv`, its bias to `norm` where there is one."""
        operator = self.then(tensor, "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D")
        output = self.graph.tensors[operator.output]
        if output.type != "FLOAT32":
            raise UserError(f"{output.name} is computed in {output.type}, expected a network that computes in FLOAT32")
        # (O, h, w, I), or (1, h, w, O) of a depthwise one.
        weight = self._values(operator, 1)
        weight = (
            weight.permute((3, 0, 1, 2) if depthwise else (0, 3, 1, 2)).contiguous() if weight.dim() == 4 else weight
        )
        wanted = (*output.shape[3:], 1 if depthwise else self.channels(tensor), kernel, kernel)
        done = ACTIVATIONS.get(operator.options["FusedActivationFunction"])
        if tuple(weight.shape) != wanted or done != activation:
            raise UserError(
                f"{output.name} has a weight of {tuple(weight.shape)} and the activation {done} where {wanted} and "
                f"{activation} were looked for; {EXPECTED}"
            )
        if kernel > 1:
            self._check_padding(operator, self.shape(tensor), output.name)
        elif stride(operator) != 1:
            raise UserError(f"{output.name} is a 1x1 convolution with a stride; {EXPECTED}")
        bias = self._values(operator, 2) if max(operator.inputs[2:], default=-1) >= 0 else torch.zeros(len(weight))
        if bias.shape != (len(weight),):
            raise UserError(f"{output.name} has a bias of {tuple(bias.shape)}, expected {(len(weight),)}")
        self.state[f"{conv}.weight"] = weight
        self.state |= {f"{conv}.bias": bias} if norm is None else folded(bias, norm)
        return operator

    def channels(self, tensor: int) -> int:
        shape = self.shape(tensor)
        if len(shape) != 4:
            raise UserError(f"{self.graph.tensors[tensor].name} is of {shape}, expected (1, height, width, channels)")
        return shape[3]

    def _values(self, operator: Operator, place: int) -> Tensor:
        if len(operator.inputs) <= place or operator.inputs[place] < 0:
            raise UserError(f"{self.graph.tensors[operator.output].name} has no weight")
        return torch.from_numpy(self.graph.tensors[operator.inputs[place]].values())

    def _check_padding(self, operator: Operator, shape: tuple[int, ...], name: str) -> None:
        """SAME pads both sides alike unless a stride meets an even size."""
        if operator.options["Padding"] != 0:
            raise UserError(f"{name} is not padded to its size (VALID), expected SAME")
        if stride(operator) != 1 and not all(size % 2 for size in shape[1:3]):
            raise UserError(
                f"{name} halves a map of {shape[1]} x {shape[2]}, which TensorFlow pads at one side only and this "
                f"project at both: expected odd sizes, which a network for 257 x 257 or 513 x 513 has"
            )

    def pooled(self, tensor: int) -> int:
        """The mean over a whole map."""
        operator = self.then(tensor, "AVERAGE_POOL_2D", "MEAN")
        whole = self.shape(tensor)[1:3]
        if operator.kind == "AVERAGE_POOL_2D":
            whole = operator.options["FilterHeight"], operator.options["FilterWidth"]
        if whole != self.shape(tensor)[1:3] or self.shape(operator.output)[1:3] != (1, 1):
            raise UserError(f"its pooling does not take the mean of the whole map; {EXPECTED}")
        return operator.output


def stride(operator: Operator) -> int:
    """0 where it differs in the two directions: no model has that."""
    h, w = operator.options["StrideH"], operator.options["StrideW"]
    return h if h == w else 0


def dilation(operator: Operator) -> int:
    """As `stride`."""
    h, w = operator.options["DilationHFactor"], operator.options["DilationWFactor"]
    return h if h == w else 0


def folded(bias: Tensor, norm: str) -> State:
    """A batch norm in evaluation that adds `bias` and nothing else, exactly."""
    return {
        f"{norm}.weight": torch.ones_like(bias),
        f"{norm}.bias": bias,
        f"{norm}.running_mean": torch.zeros_like(bias),
        f"{norm}.running_var": torch.full_like(bias, 1 - EPS),
    }


def translate(graph: Graph) -> tuple[State, dict[str, Any]]:
    """The tensors of `DeepLab` by name, and the fields of `build_model` for the graph."""
    walk = Walk(graph)
    given = graph.tensors[graph.input]
    if len(given.shape) != 4 or given.shape[3] != 3 or given.type != "FLOAT32":
        raise UserError(f"its input is {given.type} of {given.shape}, expected FLOAT32 of (1, height, width, 3)")
    x, plan = _backbone(walk)
    channels, align_corners = _head(walk, x)
    fields = {
        "name": "deeplabv3",
        "num_classes": len(walk.state["classifier.bias"]),
        "backbone": "mobilenet_v2",
        **_widths(walk.state),
        "atrous_rates": (),
        "aspp_channels": channels,
        "align_corners": align_corners,
        "norm": "frozen_batch",
        "pixels": "symmetric",
    }
    return walk.state, fields | _strides(plan, fields)


Plan = list[tuple[int, int, bool]]  # stride, dilation and shortcut of each block


def _backbone(walk: Walk) -> tuple[int, Plan]:
    prefix = "backbone.features.0"
    operator = walk.layer(walk.graph.input, 3, "relu6", f"{prefix}.0", f"{prefix}.1")
    plan, x = [(stride(operator), dilation(operator), False)], operator.output
    for i in range(1, BLOCKS + 1):
        conv, y, part = f"backbone.features.{i}.conv", x, 0
        if i > 1:
            y, part = walk.layer(y, 1, "relu6", f"{conv}.0.0", f"{conv}.0.1").output, 1
        depthwise = walk.layer(y, 3, "relu6", f"{conv}.{part}.0", f"{conv}.{part}.1", depthwise=True)
        y = walk.layer(depthwise.output, 1, "none", f"{conv}.{part + 1}", f"{conv}.{part + 2}").output
        sums = [o for o in walk.graph.operators if o.kind == "ADD" and sorted(o.inputs) == sorted((x, y))]
        sums = [o for o in sums if o.options["FusedActivationFunction"] == 0]
        plan.append((stride(depthwise), dilation(depthwise), bool(sums)))
        x = sums[0].output if sums else y
    return x, plan


def _head(walk: Walk, x: int) -> tuple[int, bool]:
    """The width of the head, and the corners of the upsampling of its logits."""
    pool = walk.layer(walk.pooled(x), 1, "relu", "aspp.pool.conv", "aspp.pool.norm").output
    pool = walk.then(pool, "RESIZE_BILINEAR").output
    branch = walk.layer(x, 1, "relu", "aspp.branches.0.conv", "aspp.branches.0.norm").output
    concat = walk.then(branch, "CONCATENATION")
    if sorted(concat.inputs) != sorted((pool, branch)):
        raise UserError(f"its head joins {len(concat.inputs)} maps; {EXPECTED}")
    project = walk.layer(concat.output, 1, "relu", "aspp.project.conv", "aspp.project.norm").output
    logits = walk.layer(project, 1, "none", "classifier").output
    if concat.inputs[0] == pool:  # here it comes last
        name, first = "aspp.project.conv.weight", len(walk.state["aspp.pool.conv.weight"])
        weight = walk.state[name]
        walk.state[name] = torch.cat([weight[:, first:], weight[:, :first]], 1)
    return len(walk.state["aspp.project.conv.weight"]), _corners(walk, logits)


def _corners(walk: Walk, x: int) -> bool:
    """Whether what upsamples the logits to the size of the input aligns their corners; a label map may follow."""
    size, corners = walk.shape(walk.graph.input)[1:3], None
    while walk.shape(x)[1:3] != size:
        operator = walk.then(x, "RESIZE_BILINEAR")
        if walk.shape(operator.output)[1:3] != walk.shape(x)[1:3]:
            if corners is not None:
                raise UserError(f"its logits are upsampled more than once; {EXPECTED}")
            corners = bool(operator.options["AlignCorners"])
            if not corners and not operator.options["HalfPixelCenters"]:
                raise UserError(
                    "its logits are upsampled from the corners of pixels, expected align_corners or half_pixel_centers"
                )
        x = operator.output
    return bool(corners)


def _widths(state: State) -> dict[str, Any]:
    """width_mult and width_divisor of a MobileNetV2 with these widths."""
    out = [len(state["backbone.features.0.0.weight"]), len(state["backbone.features.1.conv.2.bias"])]
    out += [len(state[f"backbone.features.{i}.conv.3.bias"]) for i in range(2, BLOCKS + 1)]
    bases = [32] + [base for _, base, depth, _ in STAGES for _ in range(depth)]
    # The last is rounded the least, the first the next.
    for multiplier in (out[-1] / 320, out[0] / 32):
        for divisor in (8, 4):
            if [scaled(base, multiplier, divisor) for base in bases] == out:
                return {"width_mult": multiplier, "width_divisor": divisor}
    raise UserError(f"its MobileNetV2 has the widths {', '.join(map(str, out))}, those of no width multiplier")


def _strides(plan: Plan, fields: dict[str, Any]) -> dict[str, Any]:
    """output_stride and first_block_dilation with which `build_model` makes these strides, dilations and shortcuts."""
    reached = 1
    for step, _, _ in plan:
        reached *= step
    if reached not in (8, 16, 32):
        raise UserError(f"its MobileNetV2 has the output stride {reached}, expected 8, 16 or 32")
    for first in ("stage", "previous"):
        found = {"output_stride": reached, "first_block_dilation": first}
        with torch.device("meta"):
            blocks = build_model(**fields, **found).backbone.features
        ours = [_plan_of(block) for block in blocks]
        if ours == plan:
            return found
    i = next(i for i, (a, b) in enumerate(zip(plan, ours, strict=True)) if a != b)
    raise UserError(
        f"block {i} of its MobileNetV2 has stride, dilation and shortcut {plan[i]}, expected {ours[i]} at an output "
        f"stride of {reached}"
    )


def _plan_of(block: nn.Module) -> tuple[int, int, bool]:
    conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    return conv.stride[0], conv.dilation[0], getattr(block, "residual", False)

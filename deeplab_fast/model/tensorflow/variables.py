"""The variables of tensorflow/models, research/deeplab, by this project's names, axes and order of concatenation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..mobilenet import STAGES, scaled
from ..resnet_beta import RESNETS_BETA
from ..xception import XCEPTIONS

# A layer of TensorFlow's -> its convolution and its norm here.
Scopes = dict[str, tuple[str, str]]

# What an optimiser and a moving average keep beside a variable, and what belongs to none.
SLOTS = ("Momentum", "RMSProp", "RMSProp_1", "Adam", "Adam_1", "Adagrad", "biased", "local_step")
COUNTERS = ("global_step", "learning_rate", "beta1_power", "beta2_power", "save_counter")
AVERAGE = "/ExponentialMovingAverage"

NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}

XCEPTION_SCOPES = tuple(name.replace("xception", "xception_") for name in XCEPTIONS)
RESNET_SCOPES = tuple(name.removesuffix("_beta") for name in RESNETS_BETA)

REFUSED = {
    "meta_architecture/": "has a dense prediction cell for a head, which this project does not have",
    "MobilenetV3/": "has MobileNetV3 for a backbone, which this project does not have",
    "MobilenetEdgeTPU/": "has MobileNet EdgeTPU for a backbone, which this project does not have",
    "pnasnet/": "has PNASNet for a backbone, which this project does not have",
    "hnasnet/": "has the backbone of Auto-DeepLab, which this project does not have",
}

# How the names of a backbone begin, and of ImageNet's classifiers.
SCOPES = (*(f"{scope}/" for scope in (*XCEPTION_SCOPES, *RESNET_SCOPES)), "MobilenetV2/", *REFUSED)
IMAGENET_HEADS = (
    *(f"{scope}/logits/" for scope in (*XCEPTION_SCOPES, *RESNET_SCOPES)),
    *("MobilenetV2/Conv_1/", "MobilenetV2/Logits/"),
)


def weight_names(names: Collection[str]) -> dict[str, str]:
    """Of a checkpoint's names those of weights, each with the name to read it from.

    Counters and an optimiser's slots are no weights; an exponential moving average is read where there is no plain one.
    """
    chosen = {}
    for name in names:
        plain = name.removesuffix(AVERAGE)
        if plain.rpartition("/")[2] in SLOTS or plain in COUNTERS or (plain != name and plain in names):
            continue
        chosen[plain] = name
    return chosen


def is_translatable(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these names is one of research/deeplab, whole or a backbone."""
    return any(name.startswith(SCOPES) for name in names)


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Variables -> tensors of `DeepLab` by name, with what has no place left as it is; and fields of `build_model`.

    The fields are of the graph that is in no file: pixels from -1 to 1, aligned corners, norm and ReLU after both parts
    of a separable convolution. UserError for a model that this project does not have.
    """
    for beginning, reason in REFUSED.items():
        if any(name.startswith(beginning) for name in state):
            raise UserError(f"this checkpoint {reason}")
    fields, scopes = _backbone(state)
    scopes |= _head()
    fields |= {"pixels": "symmetric", "align_corners": True, "separable_order": "norm_each"}
    translated = {}
    for name, value in state.items():
        key, value = _placed(scopes, name, value)
        translated[key] = value
    if "aspp.project.conv.weight" in translated and not any(k.startswith("aspp.branches.1.") for k in translated):
        fields["atrous_rates"] = ()
    project = translated.get("aspp.project.conv.weight")
    if project is not None and "aspp.pool.conv.weight" in translated:
        # TensorFlow concatenates the image pooling first, this project last.
        width = len(translated["aspp.pool.conv.weight"])
        translated["aspp.project.conv.weight"] = torch.roll(project, -width, dims=1)
    return translated, fields


def _placed(scopes: Scopes, name: str, value: Tensor) -> tuple[str, Tensor]:
    """A variable's name and axes here; one that has no place keeps both."""
    scope, _, part = name.rpartition("/")
    conv, norm = scopes.get(scope.removesuffix("/BatchNorm"), (None, None))
    if conv is None:
        return name, value
    if scope.endswith("/BatchNorm"):
        return (f"{norm}.{NORM[part]}", value) if norm and part in NORM else (name, value)
    if part == "biases":
        return f"{conv}.bias", value
    if value.dim() != 4:
        return name, value
    if part == "weights":  # H, W, in, out
        return f"{conv}.weight", value.permute(3, 2, 0, 1).contiguous()
    if part == "depthwise_weights":  # H, W, C, filters of each of the C
        return f"{conv}.weight", value.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1).contiguous()
    return name, value


def _plain(scope: str, ours: str) -> Scopes:
    return {scope: (f"{ours}.conv", f"{ours}.norm")}


def _either(scope: str, ours: str) -> Scopes:
    """A 3x3 layer, ordinary or separable."""
    return _plain(scope, ours) | _separable(scope, ours)


def _separable(scope: str, ours: str) -> Scopes:
    return {
        f"{scope}_depthwise": (f"{ours}.depthwise", f"{ours}.depthwise_norm"),
        f"{scope}_pointwise": (f"{ours}.pointwise", f"{ours}.norm"),
    }


def _head() -> Scopes:
    scopes = _plain("aspp0", "aspp.branches.0") | _plain("image_pooling", "aspp.pool")
    for i in range(1, 10):
        scopes |= _either(f"aspp{i}", f"aspp.branches.{i}")
    scopes |= _plain("concat_projection", "aspp.project")
    scopes |= _plain("decoder/feature_projection0", "decoder.low_level")
    for i in (0, 1):
        scopes |= _separable(f"decoder/decoder_conv{i}", f"decoder.refinements.{i}")
        scopes |= _plain(f"decoder/decoder_conv0/decoder_conv0_{i + 1}", f"decoder.refinements.{i}")
    return scopes | {"logits/semantic": ("classifier", "")}


def _backbone(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Scopes]:
    """The backbone's fields and scopes."""
    scope = next((scope for scope in SCOPES if any(name.startswith(scope) for name in state)), None)
    if scope is None:
        raise UserError(f"this checkpoint has no backbone that is known, expected one of {', '.join(SCOPES)}")
    scope = scope.removesuffix("/")
    if scope == "MobilenetV2":
        return _mobilenet_fields(state), _mobilenet(scope)
    if scope in XCEPTION_SCOPES:
        name = scope.replace("_", "")
        return {"backbone": name}, _xception(scope, name)
    name = f"{scope}_beta"
    if f"{scope}/conv1_1/weights" not in state:
        raise UserError(f"this checkpoint's backbone is {scope} with a 7x7 stem, expected {name}, which has three 3x3")
    return {"backbone": name}, _resnet(scope, RESNETS_BETA[name])


def _mobilenet_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Its widths are multiples of 8, or of 1 where the multiplier is not 1; of 4 is the same at 0.5."""
    if "decoder/feature_projection0/weights" in state:
        raise UserError(
            "this checkpoint has a decoder on MobileNetV2, which takes features that this project's does not"
        )
    ends = [sum(depth for _, _, depth, _ in STAGES[: i + 1]) - 1 for i in range(len(STAGES))]
    names = [f"MobilenetV2/expanded_conv{f'_{i}' if i else ''}/project/weights" for i in ends]
    if lacking := [name for name in names if name not in state]:
        raise UserError(f"this checkpoint has no {lacking[0]}, expected a whole MobileNetV2")
    widths = [state[name].shape[-1] for name in names]
    multiplier = widths[-1] / STAGES[-1][1]
    for divisor in (8, 4, 1):
        if widths == [scaled(base, multiplier, divisor) for _, base, _, _ in STAGES]:
            fields = {"backbone": "mobilenet_v2_tf", "first_block_dilation": "previous", "width_mult": multiplier}
            return fields | {"width_divisor": divisor}
    raise UserError(
        f"this checkpoint's MobileNetV2 has the widths {widths}, expected one multiple of the published ones"
    )


def _mobilenet(scope: str) -> Scopes:
    scopes = {f"{scope}/Conv": ("backbone.features.0.0", "backbone.features.0.1")}
    for i in range(sum(depth for _, _, depth, _ in STAGES)):
        block, ours = f"{scope}/expanded_conv{f'_{i}' if i else ''}", f"backbone.features.{i + 1}.conv"
        layers = [f"{block}/expand", f"{block}/depthwise"] if i else [f"{block}/depthwise"]
        scopes |= {layer: (f"{ours}.{j}.0", f"{ours}.{j}.1") for j, layer in enumerate(layers)}
        scopes[f"{block}/project"] = (f"{ours}.{len(layers)}", f"{ours}.{len(layers) + 1}")
    return scopes


def _xception(scope: str, name: str) -> Scopes:
    entry, _, middle = XCEPTIONS[name]
    scopes = {}
    for i in (1, 2):
        scopes |= _plain(f"{scope}/entry_flow/conv1_{i}", f"backbone.stem.{i - 1}")
    units = [f"entry_flow/block{i + 1}/unit_1" for i in range(len(entry))]
    units += [f"middle_flow/block1/unit_{i + 1}" for i in range(middle)]
    for i, unit in enumerate([*units, "exit_flow/block1/unit_1"]):
        module, ours = f"{scope}/{unit}/xception_module", f"backbone.blocks.{i}"
        for j in (1, 2, 3):
            scopes |= _separable(f"{module}/separable_conv{j}", f"{ours}.conv{j}")
        scopes |= _plain(f"{module}/shortcut", f"{ours}.shortcut")
    for j in (1, 2, 3):
        last = f"{scope}/exit_flow/block2/unit_1/xception_module/separable_conv{j}"
        scopes |= _separable(last, f"backbone.exit.{j - 1}")
    return scopes


def _resnet(scope: str, depths: tuple[int, ...]) -> Scopes:
    scopes = {
        f"{scope}/conv1_1": ("backbone.conv1.0", "backbone.conv1.1"),
        f"{scope}/conv1_2": ("backbone.conv1.3", "backbone.conv1.4"),
        f"{scope}/conv1_3": ("backbone.conv1.6", "backbone.bn1"),
    }
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            unit, ours = f"{scope}/block{stage}/unit_{i + 1}/bottleneck_v1", f"backbone.layer{stage}.{i}"
            scopes |= {f"{unit}/conv{j}": (f"{ours}.conv{j}", f"{ours}.bn{j}") for j in (1, 2, 3)}
            scopes[f"{unit}/shortcut"] = (f"{ours}.downsample.0", f"{ours}.downsample.1")
    return scopes

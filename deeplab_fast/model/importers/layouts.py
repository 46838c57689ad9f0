"""What each project calls the layers of its DeepLab, and the graph that its weights were trained in.

A translation gives the tensors this project's names, and the fields of `build_model` that rebuild the graph: dilations,
corners and activations are in no file. Facts from the repositories' sources; the tests restate each graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import UserError
from .. import tensorflow
from ..resnet import RESNETS
from .tensors import absolute_scales, fold_biases, low_level_last, rename

State = dict[str, Tensor]
Rules = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """One project's file."""

    name: str
    signature: tuple[str, ...]
    """keys of which any tells the layout; one that ends with a slash is how a key begins"""
    translate: Callable[[State], tuple[State, dict[str, Any]]]
    """its tensors -> those of `DeepLab` by name, with what has no place left as it is; and fields"""
    spare: tuple[str, ...] = ()
    """how names begin that a model here may have no use for: another head"""
    whole: bool = True
    """a DeepLab, not a backbone alone"""


def layer(conv: str, norm: str, ours: str) -> Rules:
    """A 3x3 layer, ordinary or depthwise-separable."""
    rules = {conv: f"{ours}.conv.", norm: f"{ours}.norm."}
    for inner in (conv, f"{conv}body."):
        rules |= {f"{inner}0.": f"{ours}.depthwise.", f"{inner}1.": f"{ours}.pointwise."}
    return rules


def plain(conv: str, norm: str, ours: str) -> Rules:
    """Any other layer."""
    return {conv: f"{ours}.conv.", norm: f"{ours}.norm."}


def torchvision_aspp(prefix: str) -> Rules:
    """torchvision's ASPP, which segmentation_models_pytorch and VainF/DeepLabV3Plus-Pytorch took over."""
    rules = plain(f"{prefix}convs.0.0.", f"{prefix}convs.0.1.", "aspp.branches.0")
    for i in (1, 2, 3):
        rules |= layer(f"{prefix}convs.{i}.0.", f"{prefix}convs.{i}.1.", f"aspp.branches.{i}")
    rules |= plain(f"{prefix}convs.4.1.", f"{prefix}convs.4.2.", "aspp.pool")
    return rules | plain(f"{prefix}project.0.", f"{prefix}project.1.", "aspp.project")


def torchvision(state: State) -> tuple[State, dict[str, Any]]:
    if "backbone.0.0.weight" in state:
        raise UserError("this DeepLabv3 has torchvision's MobileNetV3 for a backbone, which this project does not have")
    rules = torchvision_aspp("classifier.0.") | layer("classifier.1.", "classifier.2.", "aspp.refine")
    state = rename(state, rules | {"classifier.4.": "classifier."})
    return state, {"output_stride": 8, "first_block_dilation": "previous", "dropout": 0.5}


def smp(state: State) -> tuple[State, dict[str, Any]]:
    rules = {"encoder.": "backbone.", "segmentation_head.0.": "classifier."}
    fields = {"atrous_rates": (12, 24, 36), "align_corners": True, "dropout": 0.5}
    if "decoder.block1.0.weight" in state:
        rules |= torchvision_aspp("decoder.aspp.0.")
        rules |= layer("decoder.aspp.1.", "decoder.aspp.2.", "aspp.refine")
        rules |= plain("decoder.block1.0.", "decoder.block1.1.", "decoder.low_level")
        rules |= layer("decoder.block2.0.", "decoder.block2.1.", "decoder.refinements.0")
        return rename(state, rules), fields
    # Before version 0.3 of the package v3's decoder was a Sequential.
    for aspp, conv, norm in (("aspp", "conv", "bn"), ("0", "1", "2")):
        rules |= torchvision_aspp(f"decoder.{aspp}.")
        rules |= layer(f"decoder.{conv}.", f"decoder.{norm}.", "aspp.refine")
    return rename(state, rules), fields | {"output_stride": 8}


# A tensor of a backbone that this project does not have, and what that backbone is.
_OTHER = {
    "backbone.block20.rep.1.conv1.weight": (
        "an Xception that is not xception65: its decoder reads the 128 channels of the first block, and the last three "
        "convolutions have no ReLU between depthwise and pointwise"
    ),
    "backbone.block12.rep.1.conv1.weight": (
        "Chollet's Xception: max pooling, and nothing between depthwise and pointwise convolutions; xception65 is the "
        "aligned one"
    ),
    "backbone.layer0.0.weight": "a DRN",
    "backbone.stage4.0.branches.0.0.conv1.weight": "an HRNet",
    "backbone.features.0.0.weight": "a MobileNetV2",
}


def _other(state: State) -> str | None:
    """The backbone of a file where it is no ResNet."""
    unknown = None if "backbone.layer1.0.conv1.weight" in state else "another"
    return next((text for key, text in _OTHER.items() if key in state), unknown)


def jfzhang95(state: State) -> tuple[State, dict[str, Any]]:
    if other := _other(state):
        raise UserError(f"of jfzhang95/pytorch-deeplab-xception the models with a ResNet can be read, this has {other}")
    rules: Rules = {}
    for i in range(4):
        aspp = f"aspp.aspp{i + 1}."
        rules |= plain(f"{aspp}atrous_conv.", f"{aspp}bn.", f"aspp.branches.{i}")
    rules |= plain("aspp.global_avg_pool.1.", "aspp.global_avg_pool.2.", "aspp.pool")
    rules |= plain("aspp.conv1.", "aspp.bn1.", "aspp.project")
    rules |= plain("decoder.conv1.", "decoder.bn1.", "decoder.low_level")
    rules |= plain("decoder.last_conv.0.", "decoder.last_conv.1.", "decoder.refinements.0")
    # An early version has no dropout between them.
    conv, norm, logits = (3, 4, 6) if "decoder.last_conv.6.weight" in state else (4, 5, 8)
    rules |= plain(f"decoder.last_conv.{conv}.", f"decoder.last_conv.{norm}.", "decoder.refinements.1")
    rules[f"decoder.last_conv.{logits}."] = "classifier."
    return rename(state, rules), {"multi_grid": (1, 2, 4), "align_corners": True, "dropout": 0.5}


def coincheung(state: State) -> tuple[State, dict[str, Any]]:
    if "aspp.conv1x1.conv.weight" in state:
        raise UserError(
            "this file's ASPP has the image pooling that CoinCheung/DeepLab-v3-plus-cityscapes pads wrongly "
            "and leaves off: expected a file without it"
        )
    # Every norm that is InPlaceABN; the plain ones count their batches.
    state = absolute_scales(state)
    rules: Rules = {"decoder.conv_out.": "classifier."}
    for i in range(4):
        rules |= plain(f"aspp.conv{i + 1}.conv.", f"aspp.conv{i + 1}.bn.", f"aspp.branches.{i}")
    rules |= plain("aspp.conv_out.conv.", "aspp.conv_out.bn.", "aspp.project")
    rules |= plain("decoder.conv_low.conv.", "decoder.conv_low.bn.", "decoder.low_level")
    for i in range(2):
        conv = f"decoder.conv_cat.{i}."
        rules |= plain(f"{conv}conv.", f"{conv}bn.", f"decoder.refinements.{i}")
    state = low_level_last(fold_biases(rename(state, rules)))
    return state, {"activation": "leaky_relu", "align_corners": True, "dropout": 0.0}


def chenxi116(state: State) -> tuple[State, dict[str, Any]]:
    if "conv1.0.weight" in state:
        raise UserError(
            "this file was trained with --beta: three convolutions for a stem with nothing between, which this "
            "project does not have"
        )
    rules = {name: f"backbone.{name}" for name in ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")}
    for i in range(5):
        ours = "aspp.pool" if i == 4 else f"aspp.branches.{i}"
        rules |= plain(f"aspp.aspp{i + 1}.", f"aspp.aspp{i + 1}_bn.", ours)
    rules |= plain("aspp.conv2.", "aspp.bn2.", "aspp.project") | {"aspp.conv3.": "classifier."}
    return rename(state, rules), {"first_block_dilation": "previous", "align_corners": True, "dropout": 0.0}


def zym1119(state: State) -> tuple[State, dict[str, Any]]:
    rules: Rules = {"0.0.": "backbone.features.0.0.", "0.1.": "backbone.features.0.1.", "22.": "classifier."}
    parts = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
    for i in range(1, 21):
        rules |= {f"{i}.block.{a}.": f"backbone.features.{i}.conv.{b}." for a, b in parts.items()}
        rules[f"{i}.res_conv."] = f"backbone.features.{i}.shortcut."
    for i, name in enumerate(("conv11", "conv33_1", "conv33_2", "conv33_3")):
        rules |= plain(f"21.{name}.0.", f"21.{name}.1.", f"aspp.branches.{i}")
    state = rename(state, rules | plain("21.concate_conv.0.", "21.concate_conv.1.", "aspp.project"))
    # One convolution serves the 1x1 branch and the image pooling.
    first = "aspp.branches.0."
    state |= {f"aspp.pool.{k.removeprefix(first)}": v.clone() for k, v in state.items() if k.startswith(first)}
    fields = {"backbone": "mobilenet_v2_zym1119", "multi_grid": (1, 2, 4), "aspp_activation": False}
    return state, fields | {"pixels": "bgr_unit", "dropout": 0.0}


def hualin95(state: State) -> tuple[State, dict[str, Any]]:
    # The encoder is a module of its own with the backbone inside in some versions.
    state = {k.removeprefix("encoder.") if k.startswith("encoder.Resnet101.") else k: v for k, v in state.items()}
    rules: Rules = {"Resnet101.": "backbone.", "decoder.conv4.": "classifier."}
    for i in range(4):
        conv = f"encoder.ASPP._atrous_convolution{i + 1}."
        rules |= plain(f"{conv}0.", f"{conv}1.", f"aspp.branches.{i}")
    pool = "encoder.ASPP._image_pool."
    rules |= plain(f"{pool}1.", f"{pool}2.", "aspp.pool")
    rules |= plain("encoder.conv1.", "encoder.bn1.", "aspp.project")
    for i, ours in enumerate(("decoder.low_level", "decoder.refinements.0", "decoder.refinements.1")):
        rules |= plain(f"decoder.conv{i + 1}.", f"decoder.bn{i + 1}.", ours)
    return rename(state, rules), {"align_corners": True, "dropout": 0.5}


def vainf(state: State) -> tuple[State, dict[str, Any]]:
    features = ("backbone.low_level_features.", "backbone.high_level_features.")
    rules = dict.fromkeys(features, "backbone.features.")
    fields: dict[str, Any] = {"first_block_dilation": "previous"}
    if any(k.startswith(features) for k in state):
        fields["backbone"] = "mobilenet_v2_vainf"
    elif other := _other(state):
        raise UserError(
            f"of VainF/DeepLabV3Plus-Pytorch the models with a ResNet or MobileNetV2 can be read, this has {other}"
        )
    if "classifier.project.0.weight" not in state:
        rules |= torchvision_aspp("classifier.classifier.0.")
        rules |= layer("classifier.classifier.1.", "classifier.classifier.2.", "aspp.refine")
        return rename(state, rules | {"classifier.classifier.4.": "classifier."}), fields
    rules |= torchvision_aspp("classifier.aspp.") | {"classifier.classifier.3.": "classifier."}
    rules |= plain("classifier.project.0.", "classifier.project.1.", "decoder.low_level")
    rules |= layer("classifier.classifier.0.", "classifier.classifier.1.", "decoder.refinements.0")
    return low_level_last(rename(state, rules)), fields


def backbone_only(state: State) -> tuple[State, dict[str, Any]]:
    return {f"backbone.{k}": v for k, v in state.items()}, {}


LAYOUTS = (
    Layout("tensorflow/models, research/deeplab", ("logits/semantic/",), tensorflow.translate),
    Layout(
        "tensorflow/models' backbone",
        tensorflow.SCOPES,
        tensorflow.translate,
        tensorflow.IMAGENET_HEADS,
        whole=False,
    ),
    Layout("hualin95/Deeplab-v3plus", ("Resnet101.conv1.weight", "encoder.Resnet101.conv1.weight"), hualin95),
    Layout("CoinCheung or konami86/DeepLab-v3-plus-cityscapes", ("aspp.conv_out.conv.weight",), coincheung),
    Layout("chenxi116/DeepLabv3.pytorch", ("aspp.aspp1_bn.weight",), chenxi116, ("fc.",)),
    Layout(
        "HaoranYao/DD2424-Project or jfzhang95/pytorch-deeplab-xception", ("aspp.aspp1.atrous_conv.weight",), jfzhang95
    ),
    Layout(
        "VainF/DeepLabV3Plus-Pytorch",
        ("classifier.aspp.convs.0.0.weight", "classifier.classifier.0.convs.0.0.weight"),
        vainf,
    ),
    Layout("zym1119/DeepLabv3_MobileNetv2_PyTorch", ("21.conv11.0.weight",), zym1119),
    Layout("torchvision's DeepLabv3", ("classifier.0.convs.0.0.weight",), torchvision, ("aux_classifier.",)),
    Layout(
        "segmentation_models_pytorch",
        ("decoder.aspp.0.convs.0.0.weight", "decoder.aspp.convs.0.0.weight", "decoder.0.convs.0.0.weight"),
        smp,
        ("classification_head.",),
    ),
    Layout(
        "torchvision's backbone",
        ("layer1.0.conv1.weight", "features.0.0.weight"),
        backbone_only,
        ("backbone.fc.", "backbone.classifier.", "backbone.features.18."),
        whole=False,
    ),
)


def find_layout(keys: Iterable[str]) -> Layout | None:
    """The layout of a file with these names; None: none that is known."""
    keys = set(keys)
    # What TensorFlow's names begin with.
    keys |= {key[: i + 1] for key in keys for i, letter in enumerate(key) if letter == "/"}
    return next((layout for layout in LAYOUTS if keys.intersection(layout.signature)), None)


def shape_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `build_model` that the shapes of a translated file tell."""
    if "backbone.stem.0.conv.weight" in state:
        fields = {}  # an Xception, whose names tell which
    else:
        fields = _resnet(state) if "backbone.layer1.0.conv1.weight" in state else _mobilenet(state)
    if "aspp.project.conv.weight" not in state:
        return fields
    fields |= {
        "name": "deeplabv3plus" if "decoder.low_level.conv.weight" in state else "deeplabv3",
        "num_classes": len(state["classifier.weight"]),
        "aspp_channels": len(state["aspp.project.conv.weight"]),
        "image_pooling": "aspp.pool.conv.weight" in state,
        "aspp_refine": "aspp.refine.norm.weight" in state,
        "separable": "aspp.branches.1.pointwise.weight" in state,
    }
    if fields["name"] == "deeplabv3plus":
        fields |= {
            "low_level_channels": len(state["decoder.low_level.conv.weight"]),
            "decoder_channels": len(state["decoder.refinements.0.norm.weight"]),
            "refinements": 1 + ("decoder.refinements.1.norm.weight" in state),
        }
    return fields


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    def depth(stage: int) -> int:
        return len([k for k in state if k.startswith(f"backbone.layer{stage}.") and k.endswith(".conv1.weight")])

    depths, bottleneck = tuple(depth(stage) for stage in (1, 2, 3, 4)), "backbone.layer1.0.conv3.weight" in state
    for name, (block, wanted) in RESNETS.items():
        if wanted == depths and (block.expansion == 4) == bottleneck:
            batch = "backbone.bn1.running_mean" in state
            return {"backbone": name, "norm": "batch" if batch else "group"}
    raise UserError(f"its ResNet has {depths} blocks, expected one of {', '.join(RESNETS)}")


def _mobilenet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stem, head = state["backbone.features.0.0.weight"], state.get("aspp.branches.0.conv.weight")
    if "backbone.features.20.conv.3.weight" in state:
        return {"backbone": "mobilenet_v2_zym1119", "width_mult": len(stem) / 32}
    last = len(state["backbone.features.17.conv.3.weight"])
    # Where ASPP does not read features.17 it reads features.18.
    name = "mobilenet_v2" if head is None or head.shape[1] == last else "mobilenet_v2_1280"
    return {"backbone": name, "width_mult": last / 320}

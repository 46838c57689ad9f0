"""`load_weights`: a file that another project wrote, into a model here or as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..deeplab import DeepLab, build_model
from ..norm import FrozenBatchNorm2d
from ..weights import read_state_dict, some_of
from . import tflite_deeplab
from .layouts import Layout, find_layout, shape_fields
from .tflite_file import is_tflite, read_graph


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` made of a file."""

    model: DeepLab
    source: str
    """the project that wrote the file"""
    fields: dict[str, Any]
    """keywords of `build_model` for the graph that the weights were trained in"""
    missing: tuple[str, ...]
    """tensors of the model that the file gave no value"""
    left_over: tuple[str, ...]
    """tensors of the file that the model has no use for, by this project's names where they have one"""


def identify(path: str | Path) -> tuple[Layout | None, dict[str, Tensor]]:
    """The layout of a file, None where none is known, and its tensors by its own names for `Layout.translate`."""
    if is_tflite(path):
        graph = read_graph(path)
        return Layout("TensorFlow's DeepLab, by TensorFlow Lite", (), lambda _: tflite_deeplab.translate(graph)), {}
    state = read_state_dict(path)
    return find_layout(state), state


def load_weights(
    model: DeepLab | None, path: str | Path, *, partial: bool = False, new_classifier: bool = False, **fields: Any
) -> Loaded:
    """Weights of another project into `model`, or with None into a model built for them, in eval mode.

    Knows torchvision's backbones and DeepLabv3, segmentation_models_pytorch, jfzhang95/pytorch-deeplab-xception and
    HaoranYao/DD2424-Project, CoinCheung's and konami86's DeepLab-v3-plus-cityscapes, chenxi116/DeepLabv3.pytorch,
    zym1119/DeepLabv3_MobileNetv2_PyTorch, hualin95/Deeplab-v3plus and VainF/DeepLabV3Plus-Pytorch, by their tensors'
    names, with `module.` before them and in a training script's dictionary or not; TensorFlow's DeepLabv3 on a
    MobileNetV2 as a TensorFlow Lite file (see `tflite_deeplab`; needs the package tflite); and the checkpoints of
    tensorflow/models, research/deeplab, of which path may be the beginning of their names, one of them, their folder or
    .tar.gz. Only tensors and plain types are read; no code of the file runs.

    partial: take what fits in name and shape. new_classifier: let the model's classifier be where the file's has other
    classes. fields: keywords of `build_model` for what no file tells, such as output_stride, and num_classes for a
    backbone; only with None.
    Raises UserError for a file that is none of these, for tensors that are missing, left over or of another shape, and
    for a model that computes another graph (dilations, corners, activations) at its own output stride.
    """
    layout, state = identify(path)
    if layout is None and "aspp.branches.0.conv.weight" in state:
        raise UserError(
            f"{path} is a checkpoint of this project: evaluate, predict and train --weights take it as it is"
        )
    if layout is None:
        raise UserError(f"{path}: no project's layout that is known; its tensors begin with {some_of(sorted(state))}")
    try:
        state, known = layout.translate(state)
        known = shape_fields(state) | known
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: a file of {layout.name} without {error}, expected a whole one") from error
    if "classifier.weight" in state and "classifier.bias" not in state:
        state["classifier.bias"] = torch.zeros(len(state["classifier.weight"]))
    if model is None:
        model = _build(layout, path, known | fields).eval()
        known = known | fields
    elif fields:
        raise UserError(f"{', '.join(fields)}: a model that is given is what it is, expected no field with it")
    elif layout.whole and not partial:
        _check_graph(model, known, path)
    missing, left_over = _fill(model, state, layout, path, partial, new_classifier)
    return Loaded(model, layout.name, known, missing, left_over)


def _build(layout: Layout, path: str | Path, fields: dict[str, Any]) -> DeepLab:
    if "num_classes" not in fields:
        raise UserError(
            f"{path}: {layout.name} has no classifier to tell the classes: expected num_classes, or a model"
        )
    return build_model(**fields)


def _fill(
    model: DeepLab, state: dict[str, Tensor], layout: Layout, path: str | Path, partial: bool, new_classifier: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copies what fits; the names of what is missing and left over. UserError where the rest is not allowed."""
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    missing = [k for k in own if k not in fits and not k.endswith("num_batches_tracked")]
    left_over = [k for k in state if k not in fits]
    if not partial:
        free = ("classifier.",) if new_classifier and _other_classes(own, state) else ()
        lacking = [k for k in missing if k not in state and (layout.whole or k.startswith("backbone."))]
        other = [k for k in left_over if k in own and not k.startswith(free)]
        unknown = [k for k in left_over if k not in own and not k.startswith(layout.spare)]
        found = [f"lacks {some_of(lacking)}"] if lacking else []
        found += [f"holds {some_of(unknown)}, unknown to the model"] if unknown else []
        found += [f"has {k} of {tuple(state[k].shape)} where the model has {tuple(own[k].shape)}" for k in other[:1]]
        if found:
            raise UserError(
                f"{path}, a file of {layout.name}, {' and '.join(found)}: expected a file for this model, or partial"
            )
    model.load_state_dict(fits, strict=False)
    return tuple(missing), tuple(left_over)


def _other_classes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    a, b = own["classifier.weight"], state.get("classifier.weight")
    return b is not None and a.shape[1:] == b.shape[1:] and len(a) != len(b)


def _check_graph(model: DeepLab, fields: dict[str, Any], path: str | Path) -> None:
    """UserError where equal shapes would compute something else than the weights were trained for."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if fields.get("norm") == "frozen_batch" and not all(isinstance(m, FrozenBatchNorm2d) for m in norms):
        raise UserError(
            f"{path} has its batch norms folded into the convolutions and their statistics lost: expected a model with "
            "norm 'frozen_batch', or partial"
        )
    with torch.device("meta"):
        wanted = _graph(build_model(**{**fields, "output_stride": model.output_stride}))
    ours = _graph(model)
    differing = [k for k in wanted if k in ours and ours[k] != wanted[k]]
    if differing:
        k = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        told = (
            "backbone",
            "multi_grid",
            "first_block_dilation",
            "activation",
            "aspp_activation",
            "align_corners",
            "pixels",
        )
        names = ", ".join(f"{name} {fields[name]!r}" for name in told if name in fields)
        raise UserError(
            f"{path} was trained in another graph: {k} is {ours[k]} in the model and was {wanted[k]}{more}; expected "
            f"a model with {names or 'the default fields'}, or partial"
        )


def _graph(model: DeepLab) -> dict[str, Any]:
    """What a graph computes beside its tensors, by the name of the part."""
    parts: dict[str, Any] = {
        "align_corners": model.align_corners,
        "pixels": "imagenet" if model.pixels is None else model.pixels.kind,
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parts[f"{name} (stride, padding, dilation)"] = (module.stride, module.padding, module.dilation)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            parts[f"{name}.eps"] = module.eps
        elif isinstance(getattr(module, "activation", None), str):
            parts[f"{name}.activation"] = module.activation
    return parts

"""The weights a model starts from: ImageNet weights for its backbone, or another model's."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from . import mobilenet, tensorflow, timm_encoder, xception
from .deeplab import DeepLab
from .norm import FrozenBatchNorm2d

_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
# torchvision's IMAGENET1K_V1 files, and TensorFlow's Xceptions as timm converted them; the last part of a name is the
# start of the file's SHA-256.
IMAGENET = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "resnet152": "https://download.pytorch.org/models/resnet152-394f9c45.pth",
    "mobilenet_v2": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
    "mobilenet_v2_zym1119": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
    "xception41": _TIMM + "tf_xception_41-e6439c97.pth",
    "xception65": _TIMM + "tf_xception_65-c9ae96e8.pth",
    "xception71": _TIMM + "tf_xception_71-8eec7df1.pth",
}

# What an ImageNet file holds beyond the backbone of a DeepLab.
IMAGENET_HEADS = ("fc.", "classifier.", "features.18.0.", "features.18.1.")

# The keys under which training scripts keep the state_dict.
NESTINGS = ("state_dict", "model_state", "model_state_dict", "model")

# Training scripts keep their best score as a number of NumPy's. Under both names that the function has had.
_NUMPY_SCALARS: list[Any] = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]


def load_backbone_weights(model: DeepLab, source: str) -> None:
    """Load weights with torchvision's key names, timm's of an Xception or TensorFlow's into `model.backbone`.

    source: the path of a file, or of a TensorFlow checkpoint (see `tensorflow.find_bundle`), a URL or a name in
    `IMAGENET`, whose downloads are kept in torch.hub's folder, or timm:NAME, whose are timm's.
    The file may nest its state_dict (see `NESTINGS`), have `module.` before its keys, hold a whole DeepLab
    (then its `backbone.` keys are taken) and ImageNet's classifier. A mobilenet_v2_zym1119 takes what it shares with
    torchvision's file. Any other difference raises UserError.
    """
    if source.startswith(timm_encoder.PREFIX):
        state = timm_encoder.pretrained_state(source, model.output_stride)
        _load(model.backbone, state, f"the published weights of {source}")
        return
    path = _locate(source)
    state = read_state_dict(path)
    if tensorflow.is_translatable(state):
        try:
            state, _ = tensorflow.translate(state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        # A backbone's variable that has no place is an error below.
        odd = [k for k in state if k.startswith(tensorflow.SCOPES) and not k.startswith(tensorflow.IMAGENET_HEADS)]
        state |= {f"backbone.{k}": state[k] for k in odd}
    if inner := {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}:
        state = inner
    if "blocks.0.stack.conv1.conv_dw.weight" in state:
        state = xception.from_timm(state)
    state = {k: v for k, v in state.items() if not k.startswith(IMAGENET_HEADS)}
    torchvisions = "features.17.conv.3.weight" in state and "features.18.conv.3.weight" not in state
    if torchvisions and isinstance(model.backbone, mobilenet.MobileNetV2Zym1119):
        state = model.backbone.state_dict() | mobilenet.shared_with_zym1119(state)
    _explain_other_kind(model.backbone, state, path)
    _load(model.backbone, state, f"the backbone weights of {path}")


def load_matching(model: DeepLab, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Load a DeepLab's state_dict, all but classifiers of another number of classes.

    Returns the names of those that were left out; an auxiliary head that only one of the two has is, too. Every other
    difference raises UserError, and so do folded norms (see `importers.tflite_deeplab`) for a model that would train.
    """
    own, state = model.state_dict(), dict(state_dict)
    _check_statistics(model, state)
    with_head = [any(k.startswith("auxiliary.") for k in keys) for keys in (own, state)]
    if with_head == [False, True]:
        state = {k: v for k, v in state.items() if not k.startswith("auxiliary.")}
    elif with_head == [True, False]:
        state |= {k: v for k, v in own.items() if k.startswith("auxiliary.")}
    names = [f"{head}classifier.{item}" for head in ("", "auxiliary.") for item in ("weight", "bias")]
    other = [k for k in names if k in state and state[k].shape[1:] == own[k].shape[1:] and len(state[k]) != len(own[k])]
    _load(model, {k: own[k] if k in other else v for k, v in state.items()}, "the saved weights")
    return other


def _check_statistics(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """A mean of 0 and a variance of 1 less the epsilon, to the bit, are no statistics: a batch's would differ."""
    for name, norm in model.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._NormBase) or isinstance(norm, FrozenBatchNorm2d):
            continue
        mean, var = (state.get(f"{name}.running_{item}") for item in ("mean", "var"))
        if mean is not None and var is not None and not mean.any() and bool((var == 1 - norm.eps).all()):
            raise UserError(
                f"the saved weights have their batch norms folded into the convolutions and their statistics lost "
                f"({name}), as a .tflite file does: expected norm frozen_batch"
            )


def read_file(path: str | Path) -> Any:
    """What torch.save wrote to the file, on the CPU; tensors and plain Python types only, no code is run."""
    path = Path(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such weights file") from error
    except (
        # What unpickling raises on bytes that are no pickle, beside its own error.
        *(EOFError, RuntimeError, OSError, pickle.UnpicklingError, struct.error),
        *(LookupError, ValueError, TypeError, AttributeError),
    ) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise UserError(
            f"{path}: not a readable weights file, expected tensors saved by torch.save ({reason})"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, on the CPU, without nesting and `module.` before the keys.

    Of a TensorFlow checkpoint its weights, in TensorFlow's axes and by its names.
    """
    if (variables := tensorflow.read_variables(path)) is not None:
        return variables
    content = read_file(path)
    while isinstance(content, Mapping) and (nesting := next((k for k in NESTINGS if k in content), None)):
        content = content[nesting]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds {_describe(content)}, expected a state_dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    other = next(k for k, v in content.items() if not isinstance(v, Tensor))
    return f"a dictionary whose {other!r} is no tensor"


def is_local(source: str) -> bool:
    """Whether it is a file, or the folder or the common beginning of a TensorFlow checkpoint's files."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.index"))
    return path.is_file() or Path(f"{source}.index").is_file()


def _locate(source: str) -> Path:
    """The file of a path, a URL or a name; what comes from the network is downloaded once."""
    url = IMAGENET.get(source, source)
    if urlparse(url).scheme not in ("http", "https"):
        if not is_local(source):
            raise UserError(f"{source}: no such weights file, nor a URL, nor one of {', '.join(IMAGENET)}")
        return Path(source)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not cached.is_file():
        digest = cached.stem.rpartition("-")[2] if source in IMAGENET else None
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), digest)
        # RuntimeError: the digest differs.
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(
                f"{url} could not be downloaded ({error}): put the file at {cached} by hand, give its path, or train "
                "from random weights with --weights None"
            ) from error
    return cached


def _explain_other_kind(backbone: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Differences that a list of keys would not explain."""
    own = backbone.state_dict()
    if any(k.endswith("running_mean") for k in state) and not any(k.endswith("running_mean") for k in own):
        raise UserError(
            f"{path}: holds batch normalisation, the model has norm group with weight standardisation: "
            "expected weights trained with it, or norm batch, sync_batch or frozen_batch"
        )
    if "conv1.weight" in state and "conv1.0.weight" in own:
        raise UserError(f"{path}: has the plain 7x7 stem, the model has beta_stem: expected weights trained with it")


def _load(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """load_state_dict that names what differs; num_batches_tracked, which old files lack, may be missing."""
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    if missing or unknown:
        found = [f"lack {some_of(missing)}"] if missing else []
        found += [f"hold {some_of(unknown)}, unknown to it"] if unknown else []
        raise UserError(f"{what} are not for this model: they {' and '.join(found)}")
    shapes = [
        f"{k} is {tuple(v.shape)} where the model has {tuple(own[k].shape)}"
        for k, v in state.items()
        if v.shape != own[k].shape
    ]
    if shapes:
        raise UserError(f"{what} have other shapes: {some_of(shapes)}")
    module.load_state_dict(state, strict=False)


def some_of(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

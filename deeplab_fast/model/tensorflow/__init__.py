"""Checkpoints of tensorflow/models, research/deeplab, read without TensorFlow."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .bundle import find_bundle
from .variables import IMAGENET_HEADS, SCOPES, is_translatable, translate, weight_names

__all__ = ["IMAGENET_HEADS", "SCOPES", "find_bundle", "is_translatable", "read_variables", "translate"]


def read_variables(path: str | Path) -> dict[str, Tensor] | None:
    """The weights of a checkpoint by TensorFlow's names; None: the path is none, see `find_bundle`."""
    bundle = find_bundle(path)
    if bundle is None:
        return None
    chosen = weight_names({name for name, entry in bundle.entries.items() if entry.dtype is not None})
    values = bundle.read(chosen.values())
    return {name: values[source] for name, source in chosen.items()}

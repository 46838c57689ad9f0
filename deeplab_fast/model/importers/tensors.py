"""What a file's tensors are turned into: names, and numbers where another graph computed the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ABN_EPS = 1e-5


def rename(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """Each key with the longest beginning that `rules` has replaced; a key that has none stays."""
    renamed = {}
    for key, value in state.items():
        # A beginning ends with a dot.
        ends = [i + 1 for i, letter in enumerate(key) if letter == "."]
        start = next((key[:end] for end in reversed(ends) if key[:end] in rules), None)
        renamed[key if start is None else rules[start] + key.removeprefix(start)] = value
    return renamed


def fold_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of convolutions before a batch norm, taken off its running mean: norm(y + b) is the same.

    In training batch norm takes any bias out again.
    """
    state = dict(state)
    for key in [k for k in state if k.endswith(".conv.bias")]:
        mean = key.removesuffix("conv.bias") + "norm.running_mean"
        if mean in state:
            state[mean] = state[mean] - state.pop(key)
    return state


def absolute_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InPlaceABN scales by |weight| + eps. Its norms are those that count no batches."""
    state = dict(state)
    for key in [k for k in state if k.endswith(".running_mean")]:
        norm = key.removesuffix("running_mean")
        if f"{norm}num_batches_tracked" not in state:
            state[f"{norm}weight"] = state[f"{norm}weight"].abs() + ABN_EPS
    return state


def low_level_last(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A decoder that concatenates the low-level features first, turned into one that has them last."""
    state = dict(state)
    low, first = len(state["decoder.low_level.conv.weight"]), "decoder.refinements.0."
    for name, axis in (("conv", 1), ("depthwise", 0), ("pointwise", 1)):
        weight = state.get(f"{first}{name}.weight")
        if weight is not None:
            state[f"{first}{name}.weight"] = torch.cat(
                [weight.narrow(axis, low, weight.shape[axis] - low), weight.narrow(axis, 0, low)], axis
            )
    return state

"""A pytest plugin under which every native backend is a little wrong: a check that still passes checks nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deeplab_fast.ops import dispatch


def spoiled(value: Any) -> Any:
    """A tensor moved by a third of its largest value, a count by one; of several scalars only the first.

    Were both a sum of losses and its sum of weights a third larger, their quotient would be right.
    """
    if isinstance(value, torch.Tensor):
        return value + (value.abs().max() / 3 if value.is_floating_point() else 1) if value.numel() else value
    if isinstance(value, (tuple, list)):
        scalars = [i for i, item in enumerate(value) if item.numel() == 1]
        return type(value)(item if i in scalars[1:] else spoiled(item) for i, item in enumerate(value))
    return value


def spoil(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: spoiled(run(*arguments))


for op in dispatch.OPS.values():
    if "native" in op.backends:
        op.backends["native"] = op.backends["native"]._replace(run=spoil(op.backends["native"].run))

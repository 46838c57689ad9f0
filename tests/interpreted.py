"""What the tests of the ops do less of in Triton's interpreter, where a program takes tens of milliseconds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def crossed(shapes: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[tuple[Any, torch.dtype]]:
    """Every shape in every dtype; in the interpreter every shape in the first and every third in each other one.

    A kernel computes in fp32: a dtype changes its loads and stores, and how many values fill a vector.
    """
    pairs = itertools.product(enumerate(shapes), enumerate(dtypes))
    return [(shape, dtype) for (i, shape), (j, dtype) in pairs if not INTERPRET or j == 0 or i % 3 == j]

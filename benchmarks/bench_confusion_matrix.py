"""Confusion matrix: masked bincount in torch and numpy, as evaluation loops have it, against the backends.

Of labels without runs every pixel is a store to an address of its own. A Zen 4 core does one a cycle, whatever the
width of the counts and the number of tables: .29 ms at 3.6 GHz for each of two threads' 2^20 pixels. In
results/amd_epyc_counting_and_depthwise.json random uint8 labels take .68 ms beside runs' .14, for which the bound alone
leaves 2.1 times; int64 ones wait for memory in both cases, 1.9 ms and 1.3 ms.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.shapes import LABEL_MAPS
from deeplab_fast.ops import confusion_matrix, dispatch
from deeplab_fast.testing import assert_close

OP = "confusion_matrix"
IGNORE = 255


@functools.cache
def label_maps(
    shape: tuple[int, ...], classes: int, kind: str, dtypes: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """prediction and target, of which a tenth is ignored.

    objects: 60 convex cells, and the same a little shifted, with the long runs of real masks; random: no runs
    """
    generator = np.random.default_rng(0)
    if kind == "random":
        target, prediction = (generator.integers(0, classes, shape) for _ in range(2))
    else:
        target = np.stack([cells(shape[1:], classes, generator) for _ in range(shape[0])])
        prediction = np.roll(target, (2, 3), (1, 2))
    target[:, : shape[1] // 10] = IGNORE
    types = [getattr(torch, name) for name in dtypes.split("/")]
    return tuple(torch.from_numpy(x).to(device, t) for x, t in zip((prediction, target), types, strict=True))


def cells(size: tuple[int, int], classes: int, generator: np.random.Generator) -> np.ndarray:
    """(H, W) labels of the nearest of 60 random points."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    nearest = np.full(size, np.inf)
    labels = np.zeros(size, dtype=np.int64)
    for row, column in generator.random((60, 2)) * size:
        distance = (rows - row) ** 2 + (columns - column) ** 2
        closer = distance < nearest
        nearest[closer] = distance[closer]
        labels[closer] = generator.integers(classes)
    return labels


def masked_bincount(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    valid = target != IGNORE
    bins = classes * target[valid].long() + prediction[valid]
    return torch.bincount(bins, minlength=classes**2).reshape(classes, classes)


def numpy_bincount(prediction: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    valid = target != IGNORE
    bins = classes * target[valid].astype(np.int64) + prediction[valid]
    return np.bincount(bins, minlength=classes**2).reshape(classes, classes)


@functools.cache
def expected_counts(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Row after row, with the code of none of the variants."""
    rows = [torch.histc(prediction[target == k].float(), classes, min=-0.5, max=classes - 0.5) for k in range(classes)]
    return torch.stack(rows).long()


@pytest.mark.parametrize("variant", ["native", "reference", "masked_bincount", "numpy"])
@pytest.mark.parametrize("dtypes", ["int64/int64", "int64/uint8", "uint8/uint8"])
@pytest.mark.parametrize("kind", ["objects", "random"])
@pytest.mark.parametrize("name", LABEL_MAPS)
def bench_confusion_matrix(timed, device, name, kind, dtypes, variant):
    shape, classes = LABEL_MAPS[name]
    prediction, target = label_maps(shape, classes, kind, dtypes, device)
    if variant == "numpy" and device.type != "cpu":
        pytest.skip("numpy has no GPU")
    if variant == "numpy":
        arrays = prediction.numpy(), target.numpy()
        run = lambda: torch.from_numpy(numpy_bincount(*arrays, classes))  # noqa: E731
    elif variant == "masked_bincount":
        run = lambda: masked_bincount(prediction, target, classes)  # noqa: E731
    else:
        if reason := dispatch.explain(OP, prediction, target, classes, IGNORE)[variant]:
            pytest.skip(reason)
        run = lambda: confusion_matrix(prediction, target, classes, backend=variant)[0]  # noqa: E731

    def check(counts: Tensor) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        assert_close(counts, expected_counts(prediction, target, classes))

    # Both maps are read once; the (K, K) result is nothing beside them.
    bytes_moved = prediction.numel() * (prediction.element_size() + target.element_size())
    timed(f"{OP} {name} {kind} {dtypes}", variant, run, check, bytes_moved)

"""Checkpoints of tensorflow/models, research/deeplab: restated (`restated_tf.py`), written (`bundles.py`), loaded, and
compared by what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deeplab_fast.model.importers import load_weights
from deeplab_fast.model import build_model
from deeplab_fast.model.tensorflow import translate
from deeplab_fast.model.layers import resize
from deeplab_fast.model.tensorflow.crc32c import crc32c
from deeplab_fast.ops.normalize_image import MEAN, STD

from . import restated_tf as tf
from .bundles import write_bundle

# Whole networks at 16 n + 1 pixels, where TensorFlow's SAME and this project's padding are the same.
SIZE = (65, 97)


def masked(data: bytes) -> int:
    """The reader's own checksum: test_tf_bundle.py compares it with tensorboard's, which takes minutes for these."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write(prefix: Path, variables: dict[str, Tensor], **others: np.ndarray) -> Path:
    values = {name: value.numpy() for name, value in variables.items()} | others
    write_bundle(prefix, values, shards=2, per_block=16, checksum=masked)
    return prefix


def images() -> tuple[Tensor, Tensor]:
    """RGB from 0 to 255, and the same as this project's models take it."""
    pixels = torch.randint(0, 256, (1, 3, *SIZE), generator=torch.Generator().manual_seed(3)).double()
    mean, std = (
        torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1),
        torch.tensor(STD, dtype=torch.float64).view(3, 1, 1),
    )
    return pixels, (pixels / 255 - mean) / std


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert actual.shape == expected.shape and 1e-3 < scale < 1e6
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


GRAPHS: dict[str, dict] = {
    "xception_41": {},
    "xception_71": {"output_stride": 8},
    "resnet_v1_50": {},
    "resnet_v1_50 ordinary": {"separable": False, "output_stride": 8},
    "xception_41 v3": {"decoder": False},
}


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_a_built_model_computes_the_graph_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    pixels, x = images()
    variables, options = tf.Variables(), GRAPHS[name]
    expected = tf.deeplab(variables, pixels, name.split()[0], 5, **options)
    prefix = write(tmp_path / "model.ckpt", variables, global_step=np.int64(30_000).reshape(()))
    stride = {k: v for k, v in options.items() if k == "output_stride"}
    loaded = load_weights(None, prefix, **stride)
    assert not loaded.missing and not loaded.left_over and loaded.source == "tensorflow/models, research/deeplab"
    assert loaded.fields["name"] == ("deeplabv3plus" if options.get("decoder", True) else "deeplabv3")
    assert_same(resize(loaded.model.double()(x), SIZE, align_corners=True), expected)

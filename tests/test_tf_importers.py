"""Checkpoints of tensorflow/models, research/deeplab: restated (`restated_tf.py`), loaded, and compared by what they
compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deeplab_fast import checkpoint, convert
from deeplab_fast.config import Config, ModelConfig, RunConfig
from deeplab_fast.data.labels import VOC
from deeplab_fast.errors import UserError
from deeplab_fast.model import DeepLab, build_model, load_backbone_weights, weights
from deeplab_fast.model.importers import load_weights
from deeplab_fast.model.layers import resize
from deeplab_fast.model.tensorflow import translate
from deeplab_fast.ops.normalize_image import MEAN, STD
from deeplab_fast.state import load_initial_weights

from . import restated_tf as tf
from .bundles import number, write_bundle

# 16 n + 1 pixels, where TensorFlow's SAME and this project's padding are the same.
SIZE = (65, 97)


def images() -> Tensor:
    """RGB from 0 to 255."""
    return torch.randint(0, 256, (1, 3, *SIZE), generator=torch.Generator().manual_seed(3)).double()


def logits(model: DeepLab, pixels: Tensor) -> Tensor:
    """Of the image as this project normalises it, in fp64 but for the constants in fp32, which are undone exactly."""
    pixels = pixels / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    model = model.double()
    x = (pixels * 2 - 1 - model.pixels.shift) / model.pixels.scale
    torch.testing.assert_close(x, (pixels - mean) / std, rtol=1e-6, atol=1e-6)
    return resize(model(x), SIZE, align_corners=True)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert actual.shape == expected.shape and 1e-2 < scale < 1e2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8 * scale)


GRAPHS: dict[str, dict] = {
    "xception_41": {},
    "xception_71": {"output_stride": 8},
    "resnet_v1_50": {},
    "resnet_v1_50 ordinary": {"separable": False, "output_stride": 8},
    "MobilenetV2": {},
    "MobilenetV2 half": {"multiplier": 0.5, "output_stride": 8},
}


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_a_built_model_computes_the_graph_of_the_checkpoint(name: str, monkeypatch) -> None:
    variables, options = tf.Variables(), GRAPHS[name]
    expected = tf.deeplab(variables, images(), name.split()[0], 5, **options)
    monkeypatch.setattr(weights.tensorflow, "read_variables", lambda _: dict(variables))  # test_tf_bundle.py's
    stride = {k: v for k, v in options.items() if k == "output_stride"}
    loaded = load_weights(None, "model.ckpt", **stride)
    assert not loaded.missing and not loaded.left_over and loaded.source == "tensorflow/models, research/deeplab"
    assert loaded.fields["name"] == ("deeplabv3" if "Mobilenet" in name else "deeplabv3plus")
    assert_same(logits(loaded.model, images()), expected)


@pytest.mark.parametrize("name", ["xception_41", "xception_65", "xception_71", "resnet_v1_50", "resnet_v1_101"])
def test_every_variable_of_the_published_networks_has_its_place(name: str) -> None:
    with torch.device("meta"):
        variables = tf.Shapes()
        tf.deeplab(variables, images().to("meta"), name, 21)
        state, fields = translate(variables)
        own = build_model(num_classes=21, **fields).state_dict()
    assert len(state) == len(variables)
    counts = {k for k in own if k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items() if k not in counts}


@pytest.fixture(scope="module")
def half() -> tuple[dict[str, np.ndarray], Tensor]:
    """The variables of mobilenetv2_dm05, and its logits for `images`."""
    variables = tf.Variables()
    with torch.no_grad():
        expected = tf.deeplab(variables, images(), "MobilenetV2", 21, multiplier=0.5)
    return {k: v.numpy() for k, v in variables.items()}, expected


def training_state(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    slots = {f"{k}/Momentum": np.ones(1, np.float32) for k in variables}
    averages = {f"{k}/ExponentialMovingAverage": np.ones(1, np.float32) for k in list(variables)[:9]}
    return {**variables, **slots, **averages, "global_step": np.int64(30_000).reshape(())}


@pytest.fixture(scope="module")
def written(half: tuple, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("tf") / "deeplabv3_mnv2_dm05" / "model.ckpt"
    write_bundle(prefix, training_state(half[0]), shards=2, per_block=16, others={"saver/graph": number(1, 7)})
    return prefix


@torch.no_grad()
def test_a_checkpoint_is_converted(written: Path, half: tuple, tmp_path: Path, capsys) -> None:
    assert convert.main([str(written), "--output", str(tmp_path / "model.pt")]) == 0
    out = capsys.readouterr().out
    assert f"{written}: tensorflow/models, research/deeplab, 21 classes" in out and "left out" not in out
    model, config, classes = checkpoint.load_model(tmp_path / "model.pt")
    assert classes == VOC and config.model.atrous_rates == () and config.model.pixels == "symmetric"
    assert_same(logits(model, images()), half[1])


def test_training_starts_from_a_checkpoint(written: Path, capsys) -> None:
    loaded = load_weights(None, written.parent)
    fields = {k: v for k, v in loaded.fields.items() if k != "num_classes"}
    model = build_model(num_classes=3, **fields)
    load_initial_weights(model, Config(model=ModelConfig(**fields), run=RunConfig(weights=str(written))))
    left = "all but classifier.weight, classifier.bias"
    assert capsys.readouterr().out == f"weights from {written}, tensorflow/models, research/deeplab, {left}\n"
    expected, own = loaded.model.state_dict(), model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in own.items() if not k.startswith("classifier."))


def test_a_model_of_another_graph_is_refused(written: Path) -> None:
    fields = {**load_weights(None, written).fields, "num_classes": 21}
    for change, message in (
        ({"pixels": "imagenet"}, "another graph: pixels is imagenet in the model and was symmetric"),
        ({"align_corners": False}, "another graph: align_corners is False"),
        (
            {"first_block_dilation": "stage"},
            r"another graph: backbone.features.14.conv.1.0 \(stride, padding, dilation\)",
        ),
        ({"width_divisor": 8}, "has backbone.features.* where the model has"),
        ({"backbone": "mobilenet_v2"}, "another graph: backbone.features.0.1.eps is 1e-05 in the model and was 0.001"),
    ):
        model = build_model(**{**fields, **change})
        with pytest.raises(UserError, match=message):
            load_weights(model, written)


def test_an_imagenet_checkpoint_gives_the_backbone(half: tuple, tmp_path: Path) -> None:
    variables = {k: v for k, v in half[0].items() if k.startswith("MobilenetV2/")}
    head = {"MobilenetV2/Logits/Conv2d_1c_1x1/weights": np.zeros((1, 1, 2, 3), np.float32)}
    write_bundle(tmp_path / "model.ckpt-10", variables | head)
    loaded = load_weights(None, tmp_path / "model.ckpt-10", num_classes=4)
    assert loaded.source == "tensorflow/models' backbone" and loaded.left_over == tuple(head)
    model = build_model(num_classes=2, backbone="mobilenet_v2_tf", width_mult=0.5, width_divisor=4)
    load_backbone_weights(model, str(tmp_path / "model.ckpt-10"))
    expected = loaded.model.backbone.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.backbone.state_dict().items())
    write_bundle(tmp_path / "more", variables | head | {"MobilenetV2/Conv/extra": np.ones(1, np.float32)})
    with pytest.raises(UserError, match="more are not for this model: they hold MobilenetV2/Conv/extra, unknown to it"):
        load_backbone_weights(model, str(tmp_path / "more"))
    write_bundle(tmp_path / "part", {"MobilenetV2/Conv/weights": np.zeros((3, 3, 3, 16), np.float32)})
    with pytest.raises(UserError, match="part: this checkpoint has no MobilenetV2/expanded_conv/project/weights"):
        load_backbone_weights(model, str(tmp_path / "part"))
    with pytest.raises(UserError, match="holds a backbone alone: start from it with train --weights"):
        convert.main([str(tmp_path / "model.ckpt-10.index"), "--output", str(tmp_path / "model.pt")])


def test_averages_are_read_where_there_is_nothing_else(half: tuple, tmp_path: Path) -> None:
    name, step = "image_pooling/weights", np.int64(3).reshape(())
    variables = {k: v for k, v in half[0].items() if not k.startswith("MobilenetV2/")} | {"global_step": step}
    variables[f"{name}/ExponentialMovingAverage"] = variables.pop(name)
    write_bundle(tmp_path / "a", variables)
    state = weights.read_state_dict(tmp_path / "a")
    assert "global_step" not in state and state.keys() == {k for k in half[0] if not k.startswith("MobilenetV2/")}
    np.testing.assert_array_equal(state[name].numpy(), half[0][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("aspp0/weights"), "lacks aspp.branches.0.conv.weight: expected a file for this model"),
        (lambda s: s.update({"aspp0/other": s["aspp0/weights"]}), "holds aspp0/other, unknown to the model"),
        (lambda s: s.pop("concat_projection/BatchNorm/gamma"), "lacks aspp.project.norm.weight"),
        (lambda s: s.update({"meta_architecture/branch0/weights": s["aspp0/weights"]}), "has a dense prediction cell"),
        (lambda s: s.update({"decoder/feature_projection0/weights": s["aspp0/weights"]}), "has a decoder on Mobile"),
        (lambda s: s.pop("MobilenetV2/expanded_conv_16/project/weights"), "has no MobilenetV2/expanded_conv_16"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("Mobile")], "has no backbone that is known"),
        (
            lambda s: [s.update({k.replace("MobilenetV2", "resnet_v1_50"): s.pop(k)}) for k in list(s)],
            "backbone is resnet_v1_50 with a 7x7 stem, expected resnet_v1_50_beta",
        ),
    ],
)  # fmt: skip
def test_checkpoints_of_other_networks_say_why(half: tuple, monkeypatch, change, message: str) -> None:
    state = {k: torch.from_numpy(v) for k, v in half[0].items()}
    change(state)
    monkeypatch.setattr(weights.tensorflow, "read_variables", lambda _: dict(state))
    with pytest.raises(UserError, match=f"^model.ckpt.*{message}"):
        load_weights(None, "model.ckpt")

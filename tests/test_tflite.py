"""TensorFlow Lite's files: written here with random weights, and a published one beside LiteRT."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deeplab_fast import checkpoint, convert, predict
from deeplab_fast.config import Config, ModelConfig, RunConfig
from deeplab_fast.data.labels import VOC, Classes
from deeplab_fast.errors import UserError
from deeplab_fast.model import build_model
from deeplab_fast.model.importers import Loaded, load_weights
from deeplab_fast.model.importers.tflite_file import read_graph
from deeplab_fast.ops.normalize_image import MEAN, STD
from deeplab_fast.state import load_initial_weights

pytest.importorskip("tflite", reason="the package tflite is not installed: pip install 'deeplab_fast[test]'")
from .tflite_network import Tape, deeplab  # noqa: E402

ATOL = 1e-3


def image(height: int = 33, width: int = 65) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalised(x: Tensor) -> Tensor:
    """Pixels from -1 to 1 as this project's models are given them."""
    return ((x + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def logits(loaded: Loaded, x: Tensor) -> Tensor:
    return loaded.model.predict_logits(normalised(x))


def run_litert(path: Path, x: Tensor) -> Tensor:
    """(1, 3, H, W) from -1 to 1 -> what TensorFlow Lite's own runtime computes, (1, K, H, W)."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    network = interpreter.Interpreter(str(path), num_threads=1)
    network.allocate_tensors()
    network.set_tensor(network.get_input_details()[0]["index"], x.permute(0, 2, 3, 1).contiguous().numpy())
    network.invoke()
    return torch.from_numpy(network.get_tensor(network.get_output_details()[0]["index"])).permute(0, 3, 1, 2)


NETWORKS = {
    "stride 16": {},
    "stride 8": {"stride": 8, "width": 0.5},
    "stride 32": {"stride": 32},
    "full width": {"width": 1.0},
    "half precision": {"weights": "FLOAT16"},
    "8 bits": {"weights": "INT8"},
    "8 bits and a zero point": {"weights": "UINT8"},
    "corners": {"corners": False},
    "1x1 branch first": {"pool_first": False},
}


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_file_becomes_the_model_that_it_was(tmp_path: Path, fields: dict) -> None:
    x = image()
    tape = deeplab(x, **fields)
    loaded = load_weights(None, tape.write(tmp_path / "file.tflite"))
    assert not loaded.missing and not loaded.left_over and not loaded.model.training
    assert loaded.source.startswith("TensorFlow's DeepLab") and tape.logits.abs().max() > 0.5
    torch.testing.assert_close(logits(loaded, x), tape.logits, rtol=0, atol=ATOL)
    if "INT8" not in fields.get("weights", ""):  # there LiteRT computes in integers
        torch.testing.assert_close(run_litert(tmp_path / "file.tflite", x), tape.logits, rtol=0, atol=ATOL)


def test_the_fields_are_read_from_the_graph(tmp_path: Path) -> None:
    path = deeplab(image(), 7, width=0.5, stride=8, corners=False).write(tmp_path / "file.tflite")
    found = load_weights(None, path).fields
    expected = {"width_mult": 0.5, "width_divisor": 4, "output_stride": 8, "first_block_dilation": "previous"}
    expected |= {"name": "deeplabv3", "backbone": "mobilenet_v2", "num_classes": 7, "aspp_channels": 16}
    expected |= {"atrous_rates": (), "image_pooling": True, "align_corners": False, "pixels": "symmetric"}
    assert {key: found[key] for key in expected} == expected and found["norm"] == "frozen_batch"
    assert load_weights(None, path, output_stride=16).model.output_stride == 16


def test_a_label_map_may_follow_the_logits(tmp_path: Path) -> None:
    x = image()
    tape = deeplab(x)
    expected, axis = tape.logits, tape.add_tensor("axis", [], "INT32", bytes([3, 0, 0, 0]))
    tape.run("ARG_MAX", [tape.output, axis], expected.argmax(1, keepdim=True).float(), "labels")
    found = logits(load_weights(None, tape.write(tmp_path / "file.tflite")), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_folded_norms_add_their_bias_and_nothing_else(tmp_path: Path) -> None:
    tape = deeplab(image())
    model = load_weights(None, tape.write(tmp_path / "file.tflite")).model
    norm = model.backbone.features[0][1]
    x = torch.randn(2, len(norm.bias), 5, 5)
    assert norm.bias.abs().max() > 0.1 and torch.equal(norm(x), x + norm.bias.view(1, -1, 1, 1))
    # Frozen: a step of training moves convolutions, and no norm takes the batch's statistics.
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.randn(2, 3, 33, 33)).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01).step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} | {"classifier.bias"}


def test_a_given_model_must_be_of_that_graph(tmp_path: Path) -> None:
    path = deeplab(image(), width=0.5).write(tmp_path / "file.tflite")
    fields = load_weights(None, path).fields
    assert load_weights(build_model(**fields), path).missing == ()
    for change, message in (
        ({"norm": "batch"}, "folded into the convolutions and their statistics lost: expected a model with norm 'froz"),
        ({"pixels": "imagenet"}, "another graph: pixels is imagenet in the model and was symmetric"),
        ({"align_corners": False}, "another graph: align_corners is False in the model and was True"),
        ({"first_block_dilation": "stage"}, "another graph: backbone.features.14"),
        ({"width_divisor": 8}, r"has backbone.features.2.conv.2.weight of \(12, 48, 1, 1\) where the model has \(16,"),
        ({"atrous_rates": (6,)}, "lacks aspp.branches.1"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(build_model(**{**fields, **change}), path)
    assert load_weights(build_model(**{**fields, "norm": "batch"}), path, partial=True).missing == ()


def spoiled(change: Callable[[Tape], object], **fields: object) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        tape = deeplab(image(), **fields)
        change(tape)
        return tape.write(path)

    return write


def named(tape: Tape, name: str) -> dict:
    """The operator whose output has this name."""
    return next(o for o in tape.operators if tape.tensors[o["output"]]["name"] == name)


def retyped(tape: Tape) -> None:
    """As a network that computes in integers has it."""
    for tensor in tape.tensors:
        if tensor["type"] == "FLOAT32" and not tensor["data"]:
            tensor.update(type="UINT8", scales=[0.1])


def strided(tape: Tape) -> None:
    """Both directions of a 1x1 convolution."""
    named(tape, "expanded_conv_3/project")["options"].update(StrideH=2, StrideW=2)


def with_bias(*shape: int) -> Callable[[Tape], None]:
    def change(tape: Tape) -> None:
        data = np.ones(shape, "<f4").tobytes()
        named(tape, "logits")["inputs"][2] = tape.add_tensor("bias", shape, "FLOAT32", data)

    return change


def with_branch(tape: Tape) -> None:
    concat = named(tape, "concat")
    concat["inputs"] = [*concat["inputs"], concat["inputs"][1]]


DILATED = {"DilationHFactor": 3, "DilationWFactor": 3}
SPOILED = {
    "even": (
        lambda path: deeplab(image(64, 64)).write(path),
        "Conv halves a map of 64 x 64, which TensorFlow pads at one side only .* expected odd sizes",
    ),
    "integers": (spoiled(retyped), r"its input is UINT8 of \(1, 33, 65, 3\), expected FLOAT32"),
    "integers inside": (
        spoiled(lambda t: t.tensors[named(t, "expanded_conv_3/project")["output"]].update(type="INT8", scales=[0.1])),
        "expanded_conv_3/project is computed in INT8, expected a network that computes in FLOAT32",
    ),
    "padding": (
        spoiled(lambda t: named(t, "expanded_conv_4/depthwise")["options"].update(Padding=1)),
        r"expanded_conv_4/depthwise is not padded to its size \(VALID\), expected SAME",
    ),
    "activation": (
        spoiled(lambda t: named(t, "expanded_conv_2/expand")["options"].update(FusedActivationFunction=1)),
        "expanded_conv_2/expand has a weight of .* and the activation relu where .* relu6 were looked for",
    ),
    "dilation": (
        spoiled(lambda t: named(t, "expanded_conv_9/depthwise")["options"].update(DILATED)),
        r"block 10 of its MobileNetV2 has stride, dilation and shortcut \(1, 3, True\), expected \(1, 1, True\) at an",
    ),
    "uneven stride": (
        spoiled(lambda t: named(t, "expanded_conv_1/depthwise")["options"].update(StrideW=1)),
        "has the output stride 0, expected 8, 16 or 32",
    ),
    "no shortcut": (
        spoiled(lambda t: named(t, "expanded_conv_4/add").update(kind="CONCATENATION")),
        "CONCATENATION after expanded_conv_4/project where CONV_2D was looked for; expected TensorFlow's DeepLabv3",
    ),
    "not the mean": (
        spoiled(lambda t: named(t, "pool")["options"].update(FilterHeight=2)),
        "its pooling does not take the mean of the whole map",
    ),
    "atrous branch": (spoiled(with_branch), "its head joins 3 maps; expected TensorFlow's DeepLabv3 on a MobileNetV2"),
    "corners": (
        spoiled(lambda t: t.operators[-1]["options"].update(AlignCorners=False)),
        "its logits are upsampled from the corners of pixels, expected align_corners or half_pixel_centers",
    ),
    "computed weight": (
        spoiled(lambda t: named(t, "aspp0")["inputs"].__setitem__(1, named(t, "pool")["output"])),
        "its tensor pool is computed, expected a constant",
    ),
    "stride of 1x1": (spoiled(strided), "expanded_conv_3/project is a 1x1 convolution with a stride; expected Tens"),
    "scalar bias": (spoiled(with_bias()), r"logits has a bias of \(\), expected \(5,\)"),
    "short bias": (spoiled(with_bias(4)), r"logits has a bias of \(4,\), expected \(5,\)"),
    "itself": (
        spoiled(lambda t: t.operators[-1].update(output=t.operators[-1]["inputs"][0])),
        "damaged, .*an operator RESIZE_BILINEAR writes what was there before it",
    ),
    "negative shape": (
        spoiled(lambda t: t.tensors[named(t, "aspp0")["inputs"][2]].update(shape=[-1, -16])),
        r"damaged, .*a tensor of \(-1, -16\)",
    ),
    "negative axis": (
        spoiled(lambda t: t.tensors[named(t, "aspp0")["inputs"][1]].update(axis=-4), weights="INT8"),
        "damaged, .*16 scales and 16 zero points for a tensor of",
    ),
    "no output": (spoiled(lambda t: setattr(t, "output", -1)), "damaged, .*its input or output is no tensor"),
    "two inputs": (spoiled(lambda t: setattr(t, "inputs", [0, 1])), "its graph has 2 inputs and 1 outputs, expected"),
    "bfloat16": (
        spoiled(lambda t: t.tensors[named(t, "aspp0")["inputs"][1]].update(type="BFLOAT16")),
        "its tensor aspp0/weights is BFLOAT16, expected FLOAT32, FLOAT16, INT8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("write", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_graph_of_another_kind_is_named(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=f"file.tflite: .*{message}"):
        load_weights(None, write(tmp_path / "file.tflite"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = deeplab(image()).write(tmp_path / "file.tflite")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:40], whole[:8], whole[:4] + b"TFL3" + b"\xff" * 400):
        path.write_bytes(content)
        with pytest.raises(UserError, match="file.tflite: damaged, expected a whole TensorFlow Lite file"):
            load_weights(None, path)
    for content in (b"", b"PK\x03\x04" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="file.tflite: not a TensorFlow Lite file, expected TFL3 after its fourth"):
            load_weights(None, path)
    with pytest.raises(UserError, match=r"none.tflite: no such weights file, or not readable \(No such file"):
        load_weights(None, tmp_path / "none.tflite")


def test_any_byte_may_be_wrong(tmp_path: Path) -> None:
    """Of what is not weights: the file is read, or refused in a sentence."""
    path = deeplab(image()).write(tmp_path / "file.tflite")
    whole, generator = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    tail = np.flatnonzero(whole == 0)  # fields and offsets are mostly zeros, weights are not
    refused = 0
    for _ in range(60):
        content = whole.copy()
        content[generator.choice(tail, 2)] = generator.integers(1, 256, 2)
        path.write_bytes(content.tobytes())
        try:
            load_weights(None, path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 10


def test_tensors_of_one_buffer_hold_no_copies_of_it(tmp_path: Path) -> None:
    path = deeplab(image()).write(tmp_path / "file.tflite")
    constants = [tensor for tensor in read_graph(path).tensors if tensor.data]
    assert len(constants) > 50 and len({id(memoryview(tensor.data).obj.base) for tensor in constants}) == 1


def test_what_convert_made_trains_with_frozen_norms_alone(tmp_path: Path) -> None:
    path = deeplab(image(), 7).write(tmp_path / "file.tflite")
    assert convert.main([str(path), "--output", str(tmp_path / "model.pt")]) == 0
    _, config, classes = checkpoint.load_model(tmp_path / "model.pt")
    config = replace(config, run=RunConfig(weights=str(tmp_path / "model.pt")))
    load_initial_weights(checkpoint.build(config, classes), config)
    for norm in ("batch", "sync_batch"):
        other = replace(config, model=replace(config.model, norm=norm))
        expected = r"statistics lost \(backbone.features.0.1\), as a .tflite file does: expected norm frozen_batch"
        with pytest.raises(UserError, match=expected):
            load_initial_weights(checkpoint.build(other, classes), other)


def test_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = deeplab(image()).write(tmp_path / "renamed.bin")  # known by what it holds
    monkeypatch.setitem(sys.modules, "tflite", None)
    with pytest.raises(
        UserError, match=r"renamed.bin: .* read by the package tflite: pip install 'deeplab_fast\[tflite"
    ):
        load_weights(None, path)


def test_training_starts_from_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = deeplab(image(), 7).write(tmp_path / "file.tflite")
    fields = {k: v for k, v in load_weights(None, path).fields.items() if k != "num_classes"}
    config = Config(model=ModelConfig(**fields), run=RunConfig(weights=str(path)))
    model = checkpoint.build(config, Classes(("a", "b"), ((0, 0, 0), (1, 1, 1))))
    load_initial_weights(model, config)
    assert "TensorFlow's DeepLab, by TensorFlow Lite, all but classifier.weight" in capsys.readouterr().out
    expected = load_weights(None, path).model.state_dict()
    assert torch.equal(model.state_dict()["aspp.project.conv.weight"], expected["aspp.project.conv.weight"])


@pytest.fixture
def published() -> Path:
    folder = os.environ.get("DEEPLAB_FAST_TEST_DATA")
    if not folder:
        pytest.skip("DEEPLAB_FAST_TEST_DATA is not set: it names the folder of weights/")
    return Path(folder) / "weights"


def test_the_published_network_is_litert_s_on_every_pixel(published: Path) -> None:
    path = published / "deeplabv3_mnv2_dm05_voc_257.tflite"
    with Image.open(published / "segmentation_input_rotation0.jpg") as photo:
        x = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    loaded = load_weights(None, path)
    found = logits(loaded, x)
    assert loaded.fields["output_stride"] == 8 and found.shape == (1, 21, 257, 257)
    with Image.open(published / "segmentation_golden_rotation0.png") as golden:  # ten times the class
        assert np.array_equal(found[0].argmax(0).numpy() * 10, np.asarray(golden))
    expected = run_litert(path, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_the_published_network_through_the_commands(published: Path, tmp_path: Path, capsys) -> None:
    checkpoint_path, photo = tmp_path / "model.pt", published / "segmentation_input_rotation0.jpg"
    file = published / "deeplabv3_mnv2_dm05_voc_257.tflite"
    assert convert.main([str(file), "--output", str(checkpoint_path)]) == 0
    out = capsys.readouterr().out
    assert "21 classes" in out and "width_divisor 4" in out and "norm frozen_batch" in out and "multi_grid" not in out
    assert checkpoint.load_model(checkpoint_path)[2] == VOC
    predict.main([str(checkpoint_path), str(photo), "--output", str(tmp_path / "out"), "--precision", "fp32"])
    with (
        Image.open(tmp_path / "out" / f"{photo.stem}.png") as mask,
        Image.open(published / "segmentation_golden_rotation0.png") as golden,
    ):
        assert np.array_equal(np.asarray(mask).astype(int) * 10, np.asarray(golden).astype(int))

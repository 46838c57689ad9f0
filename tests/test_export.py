"""A checkpoint as a graph for other runtimes: what they compute is what the model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deeplab_fast import checkpoint, export
from deeplab_fast.config import Config, DataConfig, ModelConfig
from deeplab_fast.data.augment import prepare
from deeplab_fast.data.labels import CAMVID
from deeplab_fast.errors import UserError
from deeplab_fast.inference import predict_image

SMALL = {"aspp_channels": 16, "decoder_channels": 16, "low_level_channels": 8}


def written(path: Path, **fields) -> Path:
    """A checkpoint of a small random network whose norms have the statistics of noise: else all but the norms fades."""
    torch.manual_seed(0)
    config = Config(data=DataConfig(name="camvid"), model=ModelConfig(**{**SMALL, **fields}))
    model = checkpoint.build(config, CAMVID)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(prepare(noise(4, 97, 97), dtype=torch.float32, channels_last=False))
    content = {"step": 0, "model": model.state_dict(), "config": config.to_dict(), "metrics": None}
    checkpoint.save(path, {**content, "classes": checkpoint.classes_to_dict(CAMVID)})
    return path


def run(*arguments: object) -> None:
    assert export.main([str(argument) for argument in arguments]) == 0


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


def test_onnx_of_any_size_gives_what_predict_gives(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "new" / "model.onnx"
    run(written(tmp_path / "a.pt", backbone="mobilenet_v2"), "--output", path)
    assert "compared with the model" in capsys.readouterr().out
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("image", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (out.name, out.type) == ("labels", "tensor(uint8)")
    kept = json.loads(session.get_modelmeta().custom_metadata_map[export.KEY])
    assert kept["names"] == list(CAMVID.names)
    model, _, _ = checkpoint.load_model(tmp_path / "a.pt")
    images = noise(2, 120, 75)
    (labels,) = session.run(None, {"image": images.numpy()})
    for image, found in zip(images, torch.from_numpy(labels), strict=True):
        expected = predict_image(model, image, device=torch.device("cpu"), dtype=torch.float32)
        assert expected.unique().numel() > 3
        assert (found != expected).float().mean() <= export.MOST_OF_LABELS


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "deeplabv3", "backbone": "resnet18", "norm": "group", "align_corners": True, "separable": False},
        {"backbone": "xception41", "separable_order": "norm_each", "pixels": "symmetric", "image_pooling": False},
    ],
    ids=lambda fields: fields["backbone"],
)
def test_logits_of_one_size(tmp_path, fields):
    """In a graph of torch's own operators, which a process without this project loads."""
    path = tmp_path / "model.pt2"
    run(written(tmp_path / "a.pt", **fields), "--output", path, "--size", 65, 97, "--logits", "--output-stride", 16)
    program = torch.export.load(path)
    assert not [node for node in program.graph.nodes if "deeplab" in str(node.target)]
    model, _, _ = checkpoint.load_model(tmp_path / "a.pt")
    image = noise(3, 65, 97)
    with torch.no_grad():
        expected = model.predict_logits(prepare(image, dtype=torch.float32, channels_last=False))
    assert expected.shape == (3, len(CAMVID), 65, 97)
    assert (program.module()(image) - expected).abs().max() <= export.MOST_OF_LOGITS * expected.abs().max()


def test_onnx_of_one_size(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    fields = {"name": "deeplabv3", "backbone": "resnet18", "align_corners": True, "output_stride": 32}
    run(written(tmp_path / "a.pt", **fields), "--output", path, "--size", 65, 97, "--logits")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 65, 97, 3]
    assert session.get_outputs()[0].shape == ["batch", len(CAMVID), 65, 97]
    run(tmp_path / "a.pt", "--output", path, "--size", 33, 33, "--logits")  # its own file is replaced
    assert runtime.InferenceSession(path).get_inputs()[0].shape == ["batch", 33, 33, 3]


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    source = written(tmp_path / "a.pt", name="deeplabv3", backbone="resnet18", output_stride=32)
    honest = export.run_pt2
    monkeypatch.setattr(export, "run_pt2", lambda path: lambda image: honest(path)(image).clone().fill_(99))
    with pytest.raises(UserError, match="differs from the model by 1; not written"):
        run(source, "--output", path, "--size", 33, 33)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    source = written(tmp_path / "a.pt", backbone="resnet18", output_stride=32)
    with pytest.raises(UserError, match=r"model\.txt: expected a name that ends in \.onnx or \.pt2"):
        run(source, "--output", tmp_path / "model.txt")
    with pytest.raises(UserError, match="--size 0 33: expected a height and a width"):
        run(source, "--output", tmp_path / "model.pt2", "--size", 0, 33)
    with pytest.raises(UserError, match=r"none\.pt"):
        run(tmp_path / "none.pt", "--output", tmp_path / "model.pt2")
    for name in ("photo.onnx", "photo.pt2"):
        if name.endswith("onnx"):
            pytest.importorskip("onnx")
        (tmp_path / name).write_bytes(b"a photo")
        with pytest.raises(UserError, match="exists and is not a file of this command"):
            run(source, "--output", tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"a photo"
    other = tmp_path / "deeplab_fast.pt2"
    torch.save({"x": torch.zeros(1)}, other)  # a zip whose entries begin with the file's name
    with pytest.raises(UserError, match="exists and is not a file of this command"):
        run(source, "--output", other)
    assert torch.load(other)["x"].numel() == 1
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package onnx is missing: pip install -e '.\[onnx\]'"):
        run(source, "--output", tmp_path / "model.onnx")

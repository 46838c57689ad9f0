"""The trained weights of another project, through the command, to a model that evaluate and predict take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast import checkpoint, convert, predict
from deeplab_fast.config import Config, ModelConfig, RunConfig
from deeplab_fast.data.labels import CITYSCAPES
from deeplab_fast.errors import UserError
from deeplab_fast.model.importers import load_weights
from deeplab_fast.state import load_initial_weights

from . import restated as peers


def written(path: Path, peer: torch.nn.Module) -> Path:
    torch.save({"model_state": peer.state_dict(), "best_score": 0.7}, path)
    return path


@torch.no_grad()
def test_a_converted_file_computes_what_it_did_and_predicts(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    file = written(tmp_path / "file.pth", peers.Vainf(19, None))
    assert convert.main([str(file), "--output", str(tmp_path / "new" / "model.pt"), "--output-stride", "8"]) == 0
    out = capsys.readouterr().out
    assert "VainF/DeepLabV3Plus-Pytorch, 19 classes" in out and "backbone mobilenet_v2_vainf" in out
    model, config, classes = checkpoint.load_model(tmp_path / "new" / "model.pt")
    assert classes == CITYSCAPES and config.data.name == "cityscapes" and config.model.output_stride == 8
    x = torch.randn(1, 3, 65, 97)
    torch.testing.assert_close(model(x), load_weights(None, file, output_stride=8).model(x))

    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    predict.main([str(tmp_path / "new" / "model.pt"), str(tmp_path / "photo.png"), "--output", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "photo.png") as mask:
        assert mask.size == (60, 40)


@torch.no_grad()
def test_the_class_that_zym1119_never_labels_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = written(tmp_path / "file.pth", peers.Zym1119(20))
    convert.main([str(file), "--output", str(tmp_path / "model.pt")])
    model, _, classes = checkpoint.load_model(tmp_path / "model.pt")
    assert classes == CITYSCAPES
    x = torch.randn(1, 3, 33, 33)
    torch.testing.assert_close(model(x), load_weights(None, file).model(x)[:, :19])


def test_unnamed_classes_and_a_wrong_name(tmp_path: Path) -> None:
    file, output = written(tmp_path / "file.pth", peers.Vainf(3, None)), tmp_path / "model.pt"
    with pytest.raises(UserError, match="--classes voc: has 21 classes, the file has 3"):
        convert.main([str(file), "--output", str(output), "--classes", "voc"])
    assert not output.exists()
    convert.main([str(file), "--output", str(output)])
    assert checkpoint.load_model(output)[2].names == ("class 0", "class 1", "class 2")
    convert.main([str(file), "--output", str(output)])  # its own file is replaced
    with pytest.raises(UserError, match="file.pth: not a checkpoint of this project"):
        convert.main([str(file), "--output", str(file)])


def test_a_backbone_is_for_training(tmp_path: Path) -> None:
    torch.save(peers.ResNet((2, 2, 2, 2), (1, 1, 1)).state_dict(), tmp_path / "file.pth")
    with pytest.raises(UserError, match="file.pth: holds a backbone alone: start from it with train --weights"):
        convert.main([str(tmp_path / "file.pth"), "--output", str(tmp_path / "model.pt")])


def test_training_starts_from_another_projects_model(tmp_path: Path, capsys) -> None:
    file = written(tmp_path / "file.pth", peers.Vainf(19, None))
    fields = ModelConfig(backbone="mobilenet_v2_vainf", first_block_dilation="previous", separable=False, refinements=1)
    config = Config(model=fields, run=RunConfig(weights=str(file)))
    model = checkpoint.build(config, CITYSCAPES)
    load_initial_weights(model, config)
    assert capsys.readouterr().out == f"weights from {file}, VainF/DeepLabV3Plus-Pytorch\n"
    expected = load_weights(None, file).model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())

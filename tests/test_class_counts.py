"""Class counts and weights against counts by hand, their cache, the command, and a run that measures them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast import checkpoint, statistics
from deeplab_fast import train as training
from deeplab_fast.cli import parse_train
from deeplab_fast.config import DataConfig
from deeplab_fast.data import class_counts
from deeplab_fast.data.class_counts import ClassCounts, cache_path, class_weights, count_classes
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.errors import UserError
from deeplab_fast.state import Training

# Class 2 is in the second image only, class 3 in none.
COUNTS = ClassCounts(pixels=(90 + 10, 60, 20, 0), images=(2, 2, 1, 0), pixels_there=(180, 180, 80, 0))


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    """Two images of 10 x 10, 90 + 10 pixels of class 0 and the rest as in COUNTS; 20 are ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = np.repeat([0, 1], [90, 10]).reshape(10, 10)
    second = np.repeat([0, 1, 2, 255], [10, 50, 20, 20]).reshape(10, 10)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for name, mask in (("a", first), ("b", second)):
            folder = tmp_path / "data" / split
            Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
            Image.new("RGB", (10, 10)).save(folder / "images" / f"{name}.png")
    (tmp_path / "data" / "dataset.toml").write_text('names = ["sky", "road", "car", "boat"]\n')
    return tmp_path / "data"


def open_folder(root: Path):
    return open_dataset(DataConfig(name="folder", root=str(root)), "train")


def test_counts(root):
    assert count_classes(open_folder(root), 0) == COUNTS


def test_weights_follow_the_formulas():
    enet = class_weights(COUNTS, "enet")
    assert enet == pytest.approx([1 / math.log(1.02 + n / 180) for n in (100, 60, 20)] + [0])
    frequencies = (100 / 180, 60 / 180, 20 / 80)
    assert class_weights(COUNTS, "median") == pytest.approx([(60 / 180) / f for f in frequencies] + [0])


def test_scenes_and_masks_of_files_agree_with_what_is_trained_on():
    dataset = open_dataset(DataConfig(scene_count=3, scene_size=(32, 64)), "train")
    masks = np.stack([dataset.load(i)[1] for i in range(3)])
    counts = count_classes(dataset, 0, cache=False)
    assert counts.pixels == tuple(int((masks == k).sum()) for k in range(len(dataset.classes)))


def test_the_cache_holds_while_the_masks_do(root, monkeypatch):
    dataset = open_folder(root)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert count_classes(dataset, 0) == COUNTS
    read = dataset.read_mask
    monkeypatch.setattr(type(dataset), "read_mask", lambda *_: pytest.fail("a mask was read"))
    assert count_classes(open_folder(root), 0) == COUNTS
    monkeypatch.setattr(type(dataset), "read_mask", lambda _, path: read(path))
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before

    path = root / "train" / "masks" / "a.png"
    Image.fromarray(np.full((10, 10), 3, np.uint8)).save(path)
    os.utime(path, ns=(1, 1))
    assert count_classes(open_folder(root), 0).pixels == (10, 50, 20, 100)


def test_a_mask_written_anew_is_not_the_one_that_was_counted(root):
    """Its size may be the same."""
    before = cache_path(open_folder(root))
    assert cache_path(open_folder(root)) == before
    os.utime(root / "train" / "masks" / "b.png", ns=(5, 5))
    assert cache_path(open_folder(root)) != before


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"pixels": [1], "images": [1], "pixels_there": [1]}'])
def test_a_broken_cache_is_counted_anew(root, content):
    path = cache_path(open_folder(root))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert count_classes(open_folder(root), 0) == COUNTS
    assert json.loads(path.read_text())["pixels"] == list(COUNTS.pixels)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_does_not_end_a_run(root, monkeypatch, capsys):
    (root.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "file"))
    assert count_classes(open_folder(root), 0) == COUNTS
    assert "the class counts are not kept for the next run: " in capsys.readouterr().out


def test_the_command_prints_and_writes(root, tmp_path, capsys):
    flags = ["--data", "folder", "--root", str(root), "--workers", "0", "--json", str(tmp_path / "new" / "counts.json")]
    for _ in range(2):
        assert statistics.main(flags) == 0
    saved = json.loads((tmp_path / "new" / "counts.json").read_text())
    assert saved["pixels"] == list(COUNTS.pixels) and saved["classes"] == ["sky", "road", "car", "boat"]
    assert saved["enet"] == pytest.approx(class_weights(COUNTS, "enet"))
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["sky"][:3] == ["100", "55.556%", "2"] and rows["boat"] == ["0", "0.000%", "0", "absent", "absent"]
    (tmp_path / "other.json").write_text('{"confusion": 1, "checkpoint": 2}')
    with pytest.raises(UserError, match="other.json exists and does not hold counts of this command"):
        statistics.main([*flags[:-1], str(tmp_path / "other.json")])


def test_nothing_to_count_is_one_sentence(root):
    for path in (root / "train" / "masks").iterdir():
        Image.fromarray(np.full((10, 10), 255, np.uint8)).save(path)
    with pytest.raises(UserError, match="no pixel of the split train of the data set folder carries a class"):
        count_classes(open_folder(root), 0)


def test_a_run_measures_them_once(root, tmp_path, monkeypatch, capsys):
    tiny = ("--aspp-channels", "8", "--decoder-channels", "8", "--width-mult", "0.25", "--crop-size", "32", "32")
    plain = ("--weights", "None", "--workers", "0", "--no-tensorboard", "--device", "cpu", "--batch-size", "2")
    given = ("--data", "folder", "--root", str(root), "--steps", "2", "--class-weights", "median", *tiny, *plain)
    parsed, _ = parse_train([*given, "--output", str(tmp_path / "run")])
    assert parsed.config.optim.class_weights == "median"
    folder = training.train(parsed, None)
    assert "class weights (median): sky 0.6, road 1, car 1.33, boat 0" in capsys.readouterr().out
    saved = checkpoint.load(folder / "last.pt")
    assert saved["training"]["class_weights"] == pytest.approx(class_weights(COUNTS, "median"))

    monkeypatch.setattr(class_counts, "_count", lambda *_: pytest.fail("counted again"))
    for path in (root / "train" / "masks").iterdir():
        os.utime(path, ns=(1, 1))
    parsed, resumed = parse_train(["--resume", str(folder)])
    dataset = open_folder(root)
    again = Training(parsed.config, dataset, open_dataset(parsed.config.data, "val"))
    again.start(resumed)
    torch.testing.assert_close(again.class_weights, torch.tensor(class_weights(COUNTS, "median")))

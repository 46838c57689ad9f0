"""train, evaluate and predict one after the other, as a user does, on each kind of data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.forked import python

SMALL = [
    *("--steps", "3", "--batch-size", "2", "--crop-size", "96", "96", "--width-mult", "0.35", "--workers", "0"),
    *("--aspp-channels", "16", "--decoder-channels", "16", "--weights", "None", "--log-every", "1"),
]


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("DEEPLAB_FAST_TEST_DATA")
    if not folder:
        pytest.skip("DEEPLAB_FAST_TEST_DATA names no folder of real images")
    return Path(folder) / "data"


def run(command: str, *arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    argv = [*python(), "-m", f"deeplab_fast.{command}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_all(tmp_path: Path, photos: list[Path], *data: object, classes: int) -> dict:
    """The three commands; returns what evaluate wrote as JSON."""
    run("train", *data, *SMALL, "--output", "run", cwd=tmp_path)
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    out = run("evaluate", "run/best.pt", "--json", "scores.json", "--output", "masks", cwd=tmp_path).stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["class_iou"]) == len(scores["confusion"]) == classes
    assert f"{scores['miou']:.4f}" in out or f"{100 * scores['miou']:.2f}" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert scores["miou"] == pytest.approx(next(line["miou"] for line in lines if "miou" in line))
    assert len(list((tmp_path / "masks").rglob("*.png"))) == scores["images"]

    run("predict", "run/best.pt", *photos, "--output", "out", cwd=tmp_path)
    for photo in photos:
        with Image.open(photo) as image, Image.open(tmp_path / "out" / f"{photo.stem}.png") as mask:
            assert mask.mode == "P" and mask.size == image.size
            assert np.asarray(mask).max() < classes
        assert (tmp_path / "out" / f"{photo.stem}_overlay.jpg").exists()
    return scores


def test_voc_layout(tmp_path, real_data):
    photos = sorted((real_data / "voc53/VOC2012/JPEGImages").glob("*.jpg"))[:2]
    scores = run_all(tmp_path, photos, "--data", "voc", "--root", real_data / "voc53", *RESNET, classes=21)
    assert scores["images"] == 27


# The preset of VOC asks for ResNet-101 with multi-grid; a test wants a small network.
RESNET = ("--backbone", "mobilenet_v2", "--multi-grid", "1", "1", "1")


def test_camvid(tmp_path, real_data):
    """Nine pictures of CamVid, in its layout."""
    for split, count in (("train", 6), ("val", 3)):
        for source in sorted((real_data / "camvid" / split).glob("*.jpg"))[:count]:
            for folder, name in ((split, source.name), (f"{split}annot", f"{source.stem}.png")):
                (tmp_path / "camvid" / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(real_data / "camvid" / folder / name, tmp_path / "camvid" / folder / name)
    photos = sorted((tmp_path / "camvid" / "val").glob("*.jpg"))[:1]
    scores = run_all(tmp_path, photos, "--data", "camvid", "--root", "camvid", "--class-weights", "None", classes=11)
    assert scores["images"] == 3


def test_folder_of_five_photos(tmp_path, real_data):
    """Five photos with colour masks, split by a fraction."""
    palette = ((0, 0, 0), (200, 30, 30))
    root = tmp_path / "mine"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    photos = sorted((real_data / "voc53/VOC2012/JPEGImages").glob("*.jpg"))[:5]
    for photo in photos:
        shutil.copy(photo, root / "images" / photo.name)
        with Image.open(real_data / "voc53/VOC2012/SegmentationClass" / f"{photo.stem}.png") as mask:
            thing = np.asarray(mask) > 0
        Image.fromarray(np.array(palette, np.uint8)[thing.astype(int)]).save(root / "masks" / f"{photo.stem}.png")
    (root / "dataset.toml").write_text(
        'names = ["background", "thing"]\nmasks = "colour"\n'
        f"palette = {[list(colour) for colour in palette]}\nval_fraction = 0.4\n"
    )
    scores = run_all(tmp_path, photos[:1], "--data", "folder", "--root", "mine", classes=2)
    assert scores["images"] == 2
    assert scores["classes"] == ["background", "thing"]


def test_mistakes_in_the_data_are_all_named_before_training(tmp_path, real_data):
    root = tmp_path / "voc"
    shutil.copytree(real_data / "voc53" / "VOC2012", root / "VOC2012")
    names = (root / "VOC2012/ImageSets/Segmentation/train.txt").read_text().split()
    masks, images = root / "VOC2012/SegmentationClass", root / "VOC2012/JPEGImages"
    (masks / f"{names[0]}.png").unlink()
    with Image.open(masks / f"{names[1]}.png") as mask:
        wrong = np.full(mask.size[::-1], 200, np.uint8)
    Image.fromarray(wrong).save(masks / f"{names[1]}.png")
    photo = images / f"{names[2]}.jpg"
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    err = run("train", "--data", "voc", "--root", root, *SMALL, *RESNET, cwd=tmp_path, status=2).stderr
    for name in names[:3]:
        assert name in err
    assert "200" in err
    assert not (tmp_path / "runs").exists()

"""Every preset runs at a tiny size on a data set in its own layout, and the recipes are what their sources say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast import train as command
from deeplab_fast.cli import parse_train
from deeplab_fast.config import Config
from deeplab_fast.data.labels import voc_palette
from deeplab_fast.errors import UserError
from deeplab_fast.presets import PRESETS
from deeplab_fast.schedule import lr_factor


def save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def pair(seed: int, values: list[int], size: tuple[int, int] = (80, 96)) -> tuple[Image.Image, Image.Image]:
    """An image, and a palette mask of blocks of `values` whose colour the image has."""
    rng = np.random.default_rng(seed)
    mask = rng.choice(values, (5, 6)).astype(np.uint8).repeat(size[0] // 5, 0).repeat(size[1] // 6, 1)
    noise = rng.integers(0, 40, (*size, 3))
    labels = Image.fromarray(mask).convert("L")
    labels.putpalette(np.array(voc_palette(256), np.uint8).tobytes())
    return Image.fromarray((noise + mask[:, :, None] * 5).clip(0, 255).astype(np.uint8)), labels


def write_cityscapes(root: Path) -> None:
    for split, count in (("train", 5), ("val", 2)):
        for number in range(count):
            stem = f"aachen/aachen_{number:06}_000019"
            image, mask = pair(number, [0, 7, 8, 11, 26])
            save(root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", image)
            save(root / "gtFine" / split / f"{stem}_gtFine_labelIds.png", mask)


def write_voc(root: Path) -> None:
    stems = [f"2007_{number:06}" for number in range(7)]
    for number, stem in enumerate(stems):
        image, mask = pair(number, [0, 5, 15, 255])
        save(root / "VOC2012" / "JPEGImages" / f"{stem}.jpg", image)
        save(root / "VOC2012" / "SegmentationClass" / f"{stem}.png", mask)
        save(root / "VOC2012" / "SegmentationClassAug" / f"{stem}.png", mask)
    lists = root / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, part in (("train", stems[:3]), ("val", stems[5:]), ("train_aug", stems[:5])):
        (lists / f"{name}.txt").write_text("\n".join(part) + "\n")


def write_camvid(root: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            image, mask = pair(number, [0, 3, 8, 11])
            save(root / split / f"{number}.png", image)
            save(root / f"{split}annot" / f"{number}.png", mask)


def write_folder(root: Path) -> None:
    for split in ("train", "val"):
        for number in range(3):
            image, mask = pair(number, [0, 1, 255])
            save(root / split / "images" / f"{number}.png", image)
            save(root / split / "masks" / f"{number}.png", mask)
    (root / "dataset.toml").write_text('names = ["a", "b"]\n')


WRITERS = {"cityscapes": write_cityscapes, "voc": write_voc, "camvid": write_camvid, "folder": write_folder}


def run_smoke(name: str, tmp_path: Path, *flags: str) -> tuple[Config, list[float]]:
    """Its config, and the loss of every step."""
    data = PRESETS[name]().data.name
    if data in WRITERS:
        WRITERS[data](tmp_path / "data")
        flags = (*flags, "--root", str(tmp_path / "data"))
    run = ("--preset", name, "--smoke", "--device", "cpu", "--log-every", "1", "--output", str(tmp_path / "run"))
    parsed, _ = parse_train([*run, *flags])
    folder = command.train(parsed, None)
    assert {"best.pt", "last.pt", "samples.png"} <= {p.name for p in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("miou" in line for line in lines) == 1
    return parsed.config, [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n]().data.name in ("scenes", *WRITERS)])
def test_twenty_steps_of_every_preset(name, tmp_path):
    weights = ["--class-weights", "None"] if name == "scenes" else []
    _, losses = run_smoke(name, tmp_path, *weights)
    assert len(losses) == 20 and all(map(math.isfinite, losses)) and min(losses) > 0


def test_the_mobilenet_recipe(tmp_path):
    config, losses = run_smoke("cityscapes_mobilenetv2_zym1119", tmp_path)
    assert config.optim.optimizer == "rmsprop" and len(losses) == 20 and all(map(math.isfinite, losses))


def test_the_ohem_recipe(tmp_path):
    config, losses = run_smoke("cityscapes_resnet101_coincheung", tmp_path, "--backbone", "resnet18", "--steps", "6")
    assert config.optim.mining == "ohem" and len(losses) == 6 and losses[0] == pytest.approx(math.log(19), rel=0.5)


def test_epochs_are_counted_in_steps():
    """Images of the split times epochs over the batch."""
    train, train_aug = 2975, 10_582
    for name, images, epochs in (
        ("cityscapes_resnet101_haoranyao", train, 40),
        ("cityscapes_mobilenetv2_zym1119", train, 150),
        ("voc_deeplabv3_resnet101_chenxi116", train_aug, 50),
        ("voc_deeplabv3_resnet101_gn_ws_chenxi116", train_aug, 50),
    ):
        optim = PRESETS[name]().optim
        assert optim.steps == images * epochs // optim.batch_size


def test_the_ohem_recipes_rate_starts_at_5e_6():
    optim = PRESETS["cityscapes_resnet50_konami86"]().optim
    assert optim.lr * lr_factor(0, optim) == pytest.approx(5e-6)
    assert lr_factor(1000, optim) == 1 and optim.steps == 60_000


def test_the_division_by_the_batch_that_one_recipe_had_is_in_its_numbers():
    """With loss L / 8, rate r, decay d: w -= r (g / 8 + d w) = (r / 8) (g + 8 d w)."""
    optim = PRESETS["cityscapes_resnet101_haoranyao"]().optim
    assert optim.lr * 8 == pytest.approx(0.01) and optim.weight_decay / 8 == pytest.approx(5e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_writes_its_own_folder_and_smoke_keeps_its_recipe(name):
    full = PRESETS[name]()
    assert full.run.output == f"runs/{name}"
    parsed, _ = parse_train(["--preset", name, "--smoke"])
    small = parsed.config
    small.check()
    kept = ("optimizer", "lr", "weight_decay", "mining", "schedule", "warmup", "class_weights", "head_lr_mult")
    assert [getattr(small.optim, k) for k in kept] == [getattr(full.optim, k) for k in kept]
    assert small.model.name == full.model.name and small.model.norm == full.model.norm
    assert small.optim.steps == 20 and max(small.augment.crop_size) == 65 and small.run.weights is None
    changed, _ = parse_train(["--preset", name, "--smoke", "--steps", "3"])
    assert changed.config.optim.steps == 3


def test_smoke_does_not_go_with_resume():
    with pytest.raises(UserError, match="--smoke and --resume runs/x"):
        parse_train(["--smoke", "--resume", "runs/x"])

"""Every preset runs at a tiny size on a data set in its own layout, and the recipes are what their sources say."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deeplab_fast import checkpoint, presets, recipes
from deeplab_fast import train as command
from deeplab_fast.checkpoint import build
from deeplab_fast.cli import parse_train
from deeplab_fast.config import Config, DataName
from deeplab_fast.data.augment import draw_scale
from deeplab_fast.data.labels import VOC, voc_palette
from deeplab_fast.errors import UserError
from deeplab_fast.presets import PRESETS
from deeplab_fast.schedule import lr_factor, parameter_groups


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
    for name, part in (("train", stems[:3]), ("val", stems[5:]), ("trainval", stems[:5]), ("train_aug", stems[:5])):
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


def write_ade20k(root: Path) -> None:
    for part, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            image, mask = pair(number, [0, 1, 13, 150])
            save(root / "ADEChallengeData2016" / "images" / part / f"ADE_{number:08}.jpg", image)
            save(root / "ADEChallengeData2016" / "annotations" / part / f"ADE_{number:08}.png", mask)


def write_coco(root: Path) -> None:
    """Every image has a dog of 48 x 40 pixels, of whose class the pixels are brighter."""
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            picture = np.random.default_rng(number).integers(0, 100, (80, 96, 3), np.uint8)
            picture[20:60, 24:72] += 120
            save(root / f"{split}2017" / f"{number:012}.jpg", Image.fromarray(picture))
        outline = [[24, 20, 72, 20, 72, 60, 24, 60]]
        content = {
            "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 96, "height": 80} for n in range(count)],
            "categories": [{"id": 18, "name": "dog"}],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 18, "iscrowd": 0, "area": 48 * 40, "segmentation": outline}
                for n in range(count)
            ],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


WRITERS = {
    "scenes": lambda root: None,  # painted
    "voc": write_voc,
    "cityscapes": write_cityscapes,
    "camvid": write_camvid,
    "ade20k": write_ade20k,
    "coco": write_coco,
    "folder": write_folder,
}


def run_smoke(name: str, tmp_path: Path, *flags: str) -> tuple[Config, list[float]]:
    """Its config, and the loss of every step."""
    data = PRESETS[name]().data.name
    if data == "coco":
        pytest.importorskip("pycocotools")
    if not (tmp_path / "data").exists():
        WRITERS[data](tmp_path / "data")
    if data != "scenes":
        flags = (*flags, "--root", str(tmp_path / "data"))
    run = ("--preset", name, "--smoke", "--device", "cpu", "--log-every", "1", "--output", str(tmp_path / "run"))
    parsed, _ = parse_train([*run, *flags])
    folder = command.train(parsed, None)
    assert {"best.pt", "last.pt", "samples.png"} <= {p.name for p in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("miou" in line for line in lines) == 1
    return parsed.config, [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_twenty_steps_of_every_preset(name, tmp_path):
    weights = ["--class-weights", "None"] if name == "scenes" else []
    _, losses = run_smoke(name, tmp_path, *weights)
    assert len(losses) == 20 and all(map(math.isfinite, losses)) and min(losses) > 0


def test_every_preset_is_run_on_a_tree_of_its_data_set():
    """The run above takes all of PRESETS, and could take none whose tree cannot be written."""
    (marker,) = [m for m in test_twenty_steps_of_every_preset.pytestmark if m.name == "parametrize"]
    assert set(marker.args[1]) == set(PRESETS)
    assert {PRESETS[name]().data.name for name in PRESETS} == set(WRITERS) == set(get_args(DataName))
    functions = {f for module in (presets, recipes) for _, f in inspect.getmembers(module, inspect.isfunction)}
    assert {f for f in functions if f.__annotations__ == {"return": "Config"}} == set(PRESETS.values())


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


def test_tensorflows_recipes():
    """tensorflow/models, research/deeplab: train.py's defaults and core/feature_extractor.py; DeepLabv3+, section 4."""
    steps = {"voc": 30_000, "coco": 500_000, "cityscapes": 90_000}
    for data, count in steps.items():
        config = PRESETS[f"{data}_xception65_tensorflow"]()
        assert config.data.name == data and config.optim.steps == count and config.run.weights == "imagenet"
        assert config.augment.crop_size == ((769,) * 2 if data == "cityscapes" else (513,) * 2)
        assert config.optim.lr == (0.01 if data == "cityscapes" else 0.007) and config.optim.batch_size == 16
        assert lr_factor(count // 2, config.optim) == pytest.approx(0.5**0.9) and lr_factor(count, config.optim) == 0
        rng = np.random.default_rng(0)
        drawn = {draw_scale(rng, config.augment) for _ in range(300)}
        assert drawn == {0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0}

        with torch.device("meta"):
            model = build(config, VOC)
        momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        assert momenta == {0.0003} and model.align_corners and model.pixels.kind == "symmetric"
        assert {m.eps for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
        decayed = {p.shape for g in parameter_groups(model, config.optim) if g["weight_decay"] for p in g["params"]}
        assert decayed and not any(shape[1:] == (1, 3, 3) for shape in decayed)
        assert {g["lr_mult"] for g in parameter_groups(model, config.optim)} == {1.0}


@pytest.mark.slow
def test_tensorflows_second_stage_goes_on_from_the_first(tmp_path):
    """As the preset's docstring has it: VOC's own masks, output stride 8, frozen norms."""
    name, best = "voc_xception65_tensorflow", tmp_path / "best.pt"
    config = presets.smoke(PRESETS[name]())
    state = build(config, VOC).state_dict()
    content = {"model": state, "config": config.to_dict(), "classes": checkpoint.classes_to_dict(VOC)}
    checkpoint.save(best, content)
    flags = ("--train-split", "trainval", "--output-stride", "8", "--norm", "frozen_batch", "--lr", "0.001")
    run_smoke(name, tmp_path, *flags, "--weights", str(best), "--steps", "1")
    model, config, _ = checkpoint.load_model(tmp_path / "run" / "best.pt")
    assert config.model.output_stride == 8 and config.optim.lr == 0.001
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert "aspp.project.conv.weight" in moved and "backbone.blocks.3.conv1.pointwise.weight" in moved
    assert not any("norm" in key for key in moved)


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

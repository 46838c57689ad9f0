"""Slow, by hand: the README's CamVid command, whole. The record of such a run is benchmarks/results/camvid.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deeplab_fast import train
from deeplab_fast.cli import parse_train
from deeplab_fast.config import Config


@pytest.mark.slow
def test_camvid_reaches_its_score_within_1000_steps(tmp_path):
    folder = os.environ.get("DEEPLAB_FAST_TEST_DATA")
    if not folder:
        pytest.skip("DEEPLAB_FAST_TEST_DATA names no folder of real images and weights")
    weights = Path(folder) / "weights" / "mobilenet_v2_imagenet_features.pth"
    flags = ["--data", "camvid", "--root", str(Path(folder) / "data" / "camvid"), "--weights", str(weights)]
    command, resumed = parse_train([*flags, "--output", str(tmp_path / "run")])
    assert command.config.optim.steps * command.config.optim.accumulate <= 1000
    assert command.config.optim.batch_size == 8
    train.train(command, resumed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["miou"] for line in lines if "miou" in line) >= 0.55


@pytest.mark.parametrize("name", ["camvid", "camvid_kernels"])
def test_committed_record_is_of_the_preset_and_reaches_the_score(name):
    """The README's figures come from these records."""
    record = Path(__file__).parent.parent / "benchmarks" / "results" / f"{name}.jsonl"
    first, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    command, _ = parse_train(["--data", "camvid"])
    saved = Config.from_dict(first["config"])  # fields that came later have their defaults, which change nothing
    for group in ("augment", "model", "optim"):
        assert getattr(saved, group) == getattr(command.config, group)
    scores = {line["step"]: line["miou"] for line in lines if "miou" in line}
    assert max(scores.values()) >= 0.55
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"{scores[1000]:.3f}".removeprefix("0") in readme


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "camvid_mobilenetv2_zym1119",
            "--preset cityscapes_mobilenetv2_zym1119 --crop-size 320 320 --base-size 0 --batch-size 8",
        ),
        (
            "camvid_ohem_resnet18",
            "--preset cityscapes_resnet101_coincheung --backbone resnet18 --crop-size 256 256 --warmup-steps 50",
        ),
    ],
)
def test_committed_records_are_of_the_recipes_and_in_the_readme(name, flags):
    root = Path(__file__).parent.parent
    first, *lines = [json.loads(line) for line in (root / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]
    command, _ = parse_train(["--data", "camvid", "--root", "camvid", *flags.split(), "--steps", "800"])
    saved = Config.from_dict(first["config"])
    for group in ("augment", "model", "optim"):
        assert getattr(saved, group) == getattr(command.config, group)
    scores = [f"{line['miou']:.3f}".removeprefix("0") for line in lines if "miou" in line]
    (row,) = [
        line
        for line in (root / "README.md").read_text().splitlines()
        if line.startswith("| `" + flags.split()[1]) and scores[0] in line
    ]
    assert row.replace("*", "").split("|")[3:-1] == [f" {score} " for score in scores]

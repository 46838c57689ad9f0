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


def test_committed_record_is_of_the_preset_and_reaches_the_score():
    """The README's figures come from this record."""
    record = Path(__file__).parent.parent / "benchmarks" / "results" / "camvid.jsonl"
    first, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    command, _ = parse_train(["--data", "camvid"])
    saved = Config.from_dict(first["config"])  # fields that came later have their defaults, which change nothing
    for group in ("augment", "model", "optim"):
        assert getattr(saved, group) == getattr(command.config, group)
    scores = {line["step"]: line["miou"] for line in lines if "miou" in line}
    assert max(scores.values()) >= 0.55
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"{scores[1000]:.3f}".removeprefix("0") in readme

"""Settings of a run, as its checkpoints and its TensorBoard events show them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deeplab_fast import checkpoint
from deeplab_fast import train as command

from .test_train import lines, run


def test_rates_and_decay_reach_the_optimiser(tmp_path):
    fixed = ("--schedule", "constant", "--warmup-steps", "0", "--steps", "1")
    flags = ("--optimizer", "sgd", "--lr", "0.02", "--head-lr-mult", "5", "--weight-decay", "0.01")
    folder = run(*fixed, *flags, output=tmp_path / "run")
    groups = checkpoint.load(folder / "last.pt")["training"]["optimizer"]["param_groups"]
    found = {(round(group["lr"], 9), group["weight_decay"]) for group in groups}
    assert found == {(0.02, 0.01), (0.02, 0.0), (0.1, 0.01), (0.1, 0.0)}


@pytest.mark.parametrize(("decay", "averaged"), [("0.9", True), ("0", False)])
def test_the_averaged_weights_are_validated_and_saved_as_the_model(tmp_path, monkeypatch, decay, averaged):
    validated = []
    evaluate = command.evaluate_dataset

    def spy(model, *arguments, **options):
        validated.append(model.classifier.weight.detach().clone())
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(command, "evaluate_dataset", spy)
    folder = run("--ema-decay", decay, "--lr", "0.01", "--steps", "3", output=tmp_path / "run")
    saved = checkpoint.load(folder / "last.pt")
    ours, trained = saved["model"]["classifier.weight"], saved["training"]["model"]["classifier.weight"]
    assert torch.equal(ours, trained) is not averaged
    best, _, _ = checkpoint.load_model(folder / "best.pt")
    assert torch.equal(best.classifier.weight, ours) and torch.equal(validated[0], ours)


def test_a_worse_validation_leaves_the_best_checkpoint(tmp_path, monkeypatch):
    scores = iter((0.3, 0.9, 0.8))
    evaluate = command.evaluate_dataset

    def rated(*arguments, **options):
        metrics, samples = evaluate(*arguments, **options)
        return {**metrics, "miou": next(scores)}, samples

    monkeypatch.setattr(command, "evaluate_dataset", rated)
    folder = run("--steps", "3", "--val-every", "1", output=tmp_path / "run")
    best, last = checkpoint.load(folder / "best.pt"), checkpoint.load(folder / "last.pt")
    assert (best["step"], best["metrics"]["miou"], last["step"]) == (2, 0.9, 3)


def test_a_run_in_bf16_keeps_its_weights_in_fp32(tmp_path, monkeypatch):
    seen = []
    prepare = command.prepare
    monkeypatch.setattr(command, "prepare", lambda *a, **k: seen.append(prepare(*a, **k)) or seen[-1])
    monkeypatch.setattr(command, "training_loss", spy := Spy(command.training_loss))
    folder = run("--precision", "bf16", "--steps", "2", output=tmp_path / "run")
    assert [x.dtype for x in seen] == spy.dtypes == [torch.bfloat16] * 2
    saved = checkpoint.load(folder / "last.pt")
    assert saved["training"]["precision"] == "bfloat16"
    assert {v.dtype for v in saved["training"]["model"].values()} == {torch.float32, torch.int64}


class Spy:
    """A loss that notes the dtype of its logits."""

    def __init__(self, loss) -> None:
        self.loss, self.dtypes = loss, []

    def __call__(self, logits, *arguments, **options):
        self.dtypes.append(logits.dtype)
        return self.loss(logits, *arguments, **options)


def test_tensorboard_holds_the_figures_and_the_samples(tmp_path):
    folder = run("--tensorboard", "--steps", "4", "--val-every", "2", output=tmp_path / "run")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    records = lines(folder)
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("val/miou", "miou"), ("val/fw_iou", "fw_iou")):
        expected = [(line["step"], pytest.approx(line[key])) for line in records if key in line]
        assert len(expected) in (2, 4) and [(e.step, e.value) for e in events.Scalars(tag)] == expected
    pictures = events.Images("samples")
    assert [picture.step for picture in pictures] == [2, 4]
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as shown, Image.open(folder / "samples.png") as file:
        np.testing.assert_array_equal(np.array(shown.convert("RGB")), np.array(file.convert("RGB")))

"""The training command: its record, its resumption, and how it ends when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast import checkpoint
from deeplab_fast import train as command
from deeplab_fast.cli import parse_train
from deeplab_fast.errors import UserError
from tests.forked import python

TINY = [
    *("--scene-size", "32", "64", "--crop-size", "32", "64", "--scene-count", "12", "--scene-val-count", "3"),
    *("--backbone", "mobilenet_v2", "--width-mult", "0.25", "--aspp-channels", "8", "--decoder-channels", "8"),
    *("--low-level-channels", "4", "--batch-size", "2", "--workers", "0", "--no-tensorboard", "--device", "cpu"),
    *("--warmup-steps", "2", "--dropout", "0.2", "--ema-decay", "0.9", "--log-every", "1", "--sample-count", "2"),
    *("--threads", "1"),  # the bits of a sum depend on how many share it
]


EIGHT = ("--steps", "8", "--val-every", "4", "--save-every", "3")


def run(*flags: str, output: Path) -> Path:
    """Train in this process."""
    parsed, resumed = parse_train([*TINY, *flags, "--output", str(output)])
    return command.train(parsed, resumed)


def resume(folder: Path, *flags: str) -> Path:
    parsed, resumed = parse_train(["--resume", str(folder), *flags])
    return command.train(parsed, resumed)


def start(*flags: str, output: Path) -> subprocess.Popen:
    """Train in a process of its own."""
    argv = [*python(), "-m", "deeplab_fast.train", *TINY, *flags, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "no-compiler"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Both ended with the same weights, optimiser state and figures, bit for bit."""
    first, second = checkpoint.load(one / "last.pt"), checkpoint.load(other / "last.pt")
    for content in (first, second):
        content["config"]["run"] = None
    assert_equal(first, second, "checkpoint")
    drop = ("images_per_second",)
    kept = [[{k: v for k, v in line.items() if k not in drop} for line in lines(folder)] for folder in (one, other)]
    assert kept[0] == kept[1]


def assert_equal(one, other, name: str) -> None:
    """Nested dictionaries and lists of tensors and plain values, bit for bit."""
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{name}.{number}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of eight steps, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run(*EIGHT, output=folder)


def test_folder_holds_the_whole_record(finished):
    assert {p.name for p in finished.iterdir()} == {
        *("config.json", "metrics.jsonl", "curves.png", "confusion.png", "samples.png", "best.pt", "last.pt"),
    }
    records = lines(finished)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in records if "miou" in r] == [4, 8]
    assert all(0 <= r["miou"] <= 1 and len(r["class_iou"]) == 10 for r in records if "miou" in r)
    for name in ("curves.png", "confusion.png", "samples.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 100
    best = checkpoint.load(finished / "best.pt")
    assert best["metrics"]["miou"] == max(r["miou"] for r in records if "miou" in r)
    assert "training" not in best


def test_learning_rate_follows_warm_up_and_poly(finished):
    rates = [r["lr"] for r in lines(finished) if "loss" in r]
    expected = [0.01 * (1 - s / 8) ** 0.9 for s in range(8)]
    peak = json.loads((finished / "config.json").read_text())["optim"]["lr"]
    assert rates[2:] == pytest.approx([e * peak / 0.01 for e in expected][2:])
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw", "--lr", "0.001")], ids=["sgd", "adamw"])
def test_resume_equals_a_run_that_was_never_interrupted(tmp_path, monkeypatch, flags):
    """Stopped between two saves: the steps since the last save are repeated."""
    whole = run(*EIGHT, *flags, output=tmp_path / "whole")
    optimise = command.optimise

    def killed(training, batches):
        if training.step == 7:
            raise MemoryError  # as abrupt as a kill for the code that writes
        return optimise(training, batches)

    monkeypatch.setattr(command, "optimise", killed)
    with pytest.raises(MemoryError):
        run(*EIGHT, *flags, output=tmp_path / "cut")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "cut" / "last.pt")["step"] == 6
    resume(tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")


def test_resume_does_a_validation_that_the_stop_cut_short(tmp_path, finished, monkeypatch):
    validate = command.validate

    def stopped(training, *rest):
        raise command.Stopped if training.step == 4 else AssertionError

    monkeypatch.setattr(command, "validate", stopped)
    with pytest.raises(SystemExit):
        run(*EIGHT, output=tmp_path / "cut")
    monkeypatch.setattr(command, "validate", validate)
    resume(tmp_path / "cut")
    assert_same_run(finished, tmp_path / "cut")


def test_resume_does_not_depend_on_the_workers(tmp_path, finished):
    run(*EIGHT, "--workers", "2", output=tmp_path / "two")
    first, second = checkpoint.load(finished / "last.pt"), checkpoint.load(tmp_path / "two" / "last.pt")
    assert_equal(first["model"], second["model"], "model")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_saves_and_says_how_to_go_on(tmp_path, number, status):
    folder = tmp_path / "run"
    process = start("--steps", "100000", "--workers", "1", output=folder)
    wait_for_steps(folder, process, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"go on with: python -m deeplab_fast.train --resume {folder}" in out
    assert "Traceback" not in err
    assert checkpoint.load(folder / "last.pt")["step"] >= 3


def test_kill_then_resume(tmp_path, finished):
    """SIGKILL in the middle of a run of the same eight steps, whatever it was doing, then --resume."""
    folder = tmp_path / "killed"
    process = start(*EIGHT, output=folder)
    wait_for_steps(folder, process, 4)
    process.kill()
    process.communicate()
    resume(folder)
    assert_same_run(finished, folder)


def test_killed_before_its_first_save_it_can_be_gone_on_from(tmp_path, monkeypatch):
    def killed(training, batches):
        raise MemoryError

    monkeypatch.setattr(command, "optimise", killed)
    with pytest.raises(MemoryError):
        run(*EIGHT, output=tmp_path / "cut")
    monkeypatch.undo()
    resume(tmp_path / "cut")
    assert_same_run(run(*EIGHT, output=tmp_path / "whole"), tmp_path / "cut")


def wait_for_steps(folder: Path, process: subprocess.Popen, count: int) -> None:
    for _ in range(3600):
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} has no {count} steps after three minutes")


def test_accumulation_takes_as_many_images(tmp_path):
    folder = run("--steps", "2", "--accumulate", "3", output=tmp_path / "run")
    assert [r["step"] for r in lines(folder) if "loss" in r] == [1, 2]


def test_nan_names_step_rate_and_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d+ with learning rate .*") as error:
        run("--lr", "1e30", "--clip-norm", "0", "--steps", "50", "--save-every", "1", output=folder)
    assert f"last good checkpoint is {folder / 'last.pt'}" in str(error.value)
    assert all(torch.isfinite(v).all() for v in checkpoint.load(folder / "last.pt")["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """A finite loss can have an infinite gradient; the file of the step before stays."""
    optimise = command.optimise

    def explode(training, batches):
        loss = optimise(training, batches)
        if training.step == 3:
            training.model.classifier.bias.data.fill_(float("inf"))
        return loss

    monkeypatch.setattr(command, "optimise", explode)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"the weights are not finite after step 3 with learning rate .*last good"):
        run("--steps", "5", "--save-every", "1", output=folder)
    assert checkpoint.load(folder / "last.pt")["step"] == 2


def test_labels_that_are_no_class_end_the_run(tmp_path):
    root = make_folder_data(tmp_path / "data", value=1)
    (root / "dataset.toml").write_text('names = ["a", "b"]\n')
    flags = (*FOLDER, "--root", str(root), "--steps", "2", "--no-check")
    parsed, _ = parse_train([*TINY, *flags, "--output", str(tmp_path / "run")])
    bad = np.full((40, 40), 7, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deeplab_fast.data.base.FileDataset.load", lambda self, i: (np.zeros((40, 40, 3), np.uint8), bad))
        with pytest.raises(UserError, match="pixels had labels that are neither a class nor 255, up to step 1"):
            command.train(parsed, None)


def test_resume_refuses_other_data(tmp_path):
    root = make_folder_data(tmp_path / "data", value=1)
    folder = run(*FOLDER, "--root", str(root), "--steps", "1", output=tmp_path / "run")
    for kind in ("images", "masks"):
        (root / "train" / kind / "0.png").rename(tmp_path / f"{kind}.png")
    with pytest.raises(UserError, match="began with the train split train with 2 images, and now finds train with 1"):
        resume(folder)
    (root / "dataset.toml").write_text('names = ["a", "c"]\n')
    with pytest.raises(UserError, match="the classes of folder are no longer those that the run began with"):
        resume(folder)


def test_resume_keeps_the_precision_it_began_with(finished):
    """`auto` may mean another one on another machine."""
    parsed, content = parse_train(["--resume", str(finished)])
    assert content["config"]["run"]["precision"] == "auto"
    assert parsed.config.run.precision == {"float32": "fp32", "bfloat16": "bf16"}[content["training"]["precision"]]


def test_a_batch_that_is_all_ignored_changes_nothing_but_decay(tmp_path):
    root = make_folder_data(tmp_path / "data", value=255)
    labelled = np.zeros((40, 40), np.uint8)  # validation has something to score
    Image.fromarray(labelled).save(root / "val" / "masks" / "0.png")
    folder = run(*FOLDER, "--root", str(root), "--steps", "2", "--no-check", output=tmp_path / "run")
    assert [r["loss"] for r in lines(folder) if "loss" in r] == [0.0, 0.0]


def test_all_but_the_classifier_is_taken_from_another_number_of_classes(tmp_path, finished, capsys):
    root = make_folder_data(tmp_path / "data", value=1)
    flags = (*FOLDER, "--root", str(root), "--steps", "1", "--lr", "0", "--ema-decay", "0")
    folder = run(*flags, "--weights", str(finished / "best.pt"), output=tmp_path / "run")
    assert "all but classifier.weight, classifier.bias" in capsys.readouterr().out
    old, new = checkpoint.load(finished / "best.pt")["model"], checkpoint.load(folder / "best.pt")["model"]
    assert new["classifier.weight"].shape[0] == 2
    torch.testing.assert_close(new["aspp.project.conv.weight"], old["aspp.project.conv.weight"])


FOLDER = ("--data", "folder", "--scale-min", "1", "--scale-max", "1", "--weights", "None", "--precision", "fp32")


def make_folder_data(root: Path, value: int) -> Path:
    """Two training and two validation images of 40 x 40 with masks of one value."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(2):
            image = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(np.full((40, 40), value, np.uint8)).save(root / split / "masks" / f"{number}.png")
    (root / "dataset.toml").write_text('names = ["a", "b"]\n')
    return root


def test_a_run_is_never_written_over(tmp_path, finished, monkeypatch):
    with pytest.raises(UserError, match="holds a run already: give another --output, or go on with --resume"):
        run("--steps", "1", output=finished)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "scenes").mkdir(parents=True)
    (tmp_path / "runs" / "scenes" / "config.json").write_text("{}")
    parsed, resumed = parse_train([*TINY, "--steps", "1"])
    assert command.train(parsed, resumed) == Path("runs/scenes-2")


def test_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"--output .*taken is a file; expected a folder"):
        run("--steps", "1", output=tmp_path / "taken")


def test_resume_refuses_what_would_change_the_numbers(finished):
    with pytest.raises(UserError, match=r"--batch-size was 2 and cannot become 4"):
        parse_train(["--resume", str(finished), "--batch-size", "4"])
    parsed, _ = parse_train(["--resume", str(finished), "--workers", "1"])
    assert parsed.config.data.workers == 1


def test_resume_from_nothing_is_one_sentence(tmp_path, finished):
    with pytest.raises(UserError, match=r"last\.pt: no such weights file"):
        parse_train(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match=r"best\.pt: holds a model but no training state; go on from last\.pt"):
        parse_train(["--resume", str(finished / "best.pt")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "voc", "--root", "/nowhere"], "/nowhere"),
        (["--class-weights", "1", "2"], "--class-weights has 2 numbers; the data set has 10 classes"),
        (["--backbone", "vgg16"], "backbone is 'vgg16': expected one of"),
        (["--weights", "missing.pth"], "missing.pth: no such weights file"),
        (["--data", "folder", "--root", "."], "dataset.toml"),
        (["--compile"], "--compile: torch.compile needs a C++ compiler on a CPU, and none was found"),
        (["--batch-size", "1"], "expected a batch"),
    ],
)
def test_mistakes_are_one_sentence_with_status_2(tmp_path, flags, message):
    process = start("--steps", "1", *flags, output=tmp_path / "run")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in err and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")

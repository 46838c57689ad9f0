"""Several processes over gloo: the training of one, shared; and how a job ends when one of them does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast import checkpoint
from deeplab_fast.cli import StopRequest, parse_train
from deeplab_fast.config import Config, DataConfig, OptimConfig
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.loader import loader_workers, train_batches
from deeplab_fast.distributed import ALONE, Processes, start
from deeplab_fast.errors import UserError
from deeplab_fast.order import largest_of_all
from tests.forked import python

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")

# Frozen norms keep rounding what it is; with statistics of tiny batches it grows tenfold a step.
TINY = [
    *("--scene-size", "32", "64", "--crop-size", "32", "64", "--scene-count", "12", "--scene-val-count", "5"),
    *("--backbone", "resnet18", "--norm", "frozen_batch", "--aspp-channels", "8", "--decoder-channels", "8"),
    *("--low-level-channels", "4", "--batch-size", "5", "--workers", "0", "--no-tensorboard", "--device", "cpu"),
    *("--precision", "fp32", "--optimizer", "sgd", "--warmup-steps", "0", "--log-every", "1", "--sample-count", "3"),
]
HARD = [
    *("--accumulate", "2", "--mining", "ohem", "--ohem-min-kept", "0.3", "--ohem-threshold", "0.05"),
    *(
        "--class-weights",
        "1",
        "2",
        "1",
        "0.5",
        "1",
        "1",
        "1",
        "3",
        "1",
        "1",
        "--clip-norm",
        "0.5",
        "--ema-decay",
        "0.9",
    ),
]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def job(count: int, *argv: object, agent: list[str] | None = None) -> list[str]:
    """`python argv...` in `count` processes; 1: without torchrun. agent: the interpreter of torchrun itself."""
    torchrun = [*(agent or python()), *TORCHRUN, str(count), "--no-python"] if count > 1 else []
    return [*torchrun, *python(), *map(str, argv)]


def launch(count: int, command: str, *arguments: object, agent: list[str] | None = None) -> subprocess.Popen:
    argv = job(count, "-m", f"deeplab_fast.{command}", *arguments, agent=agent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(count: int, command: str, *arguments: object, fails: bool = False) -> tuple[str, str]:
    """stdout and stderr."""
    process = launch(count, command, *arguments)
    out, err = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails, err
    return out, err


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    content = checkpoint.load(folder / name)
    return content["training"]["model"] | {f"average.{k}": v for k, v in content["model"].items()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(one: Path, other: Path) -> None:
    """The same weights up to rounding."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a.keys() == b.keys()
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Three steps in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(1, "train", *TINY, *HARD, "--steps", "3", "--val-every", "2", "--output", folder)
    return folder


@pytest.mark.parametrize("count", [2, 3])
def test_training_is_that_of_one_process(tmp_path, alone, count):
    """Five images in uneven shares, two passes, hard pixels, class weights, clipping, averaged weights."""
    out, err = run(count, "train", *TINY, *HARD, "--steps", "3", "--val-every", "2", "--output", tmp_path / "run")
    assert_close(alone, tmp_path / "run")
    assert {p.name for p in alone.iterdir()} == {p.name for p in (tmp_path / "run").iterdir()}
    said = out.splitlines()
    assert f"{count} processes share each batch of 5" in said
    assert not [line for line, times in Counter(said).items() if times > 1]
    noise = [line for line in err.splitlines() if "Warning" in line or "NCCL" in line or "gloo" in line.lower()]
    assert not noise


def test_another_number_goes_on_where_one_stopped(tmp_path, alone):
    """One, two and three processes, a step each."""
    folder = tmp_path / "run"
    new = (*TINY, *HARD, "--steps", 3, "--val-every", 2, "--output", folder)
    for count in (1, 2, 3):
        train_until(tmp_path, count, folder, new if count == 1 else ("--resume", folder), step=count)
    assert_close(alone, folder)


def train_until(tmp_path: Path, count: int, folder: Path, flags: tuple, step: int) -> None:
    """Train with `count` processes and stop when `step` is done."""
    script = tmp_path / f"until_{step}.py"
    script.write_text(
        "from deeplab_fast import train as command\n"
        "from deeplab_fast.cli import run_command\n"
        "from deeplab_fast.distributed import start\n"
        "from deeplab_fast.errors import Stopped\n"
        "optimise = command.optimise\n"
        "def until(training, batches):\n"
        f"    if training.step == {step}:\n"
        "        raise Stopped\n"
        "    return optimise(training, batches)\n"
        "command.optimise = until\n"
        "run_command(command.main, start)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = job(count, script, *flags)
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300)
    assert (folder / "last.pt").exists(), done.stderr
    assert checkpoint.load(folder / "last.pt")["step"] == step, done.stderr


NORMS = [flag for flag in TINY if flag not in ("--norm", "frozen_batch")]


def test_synchronised_norms_are_those_of_one_process(tmp_path):
    """The recipe of one process, under torchrun, and the run of one gone on with by two."""
    flags = (*NORMS, "--batch-size", "6", "--crop-size", "64", "64", "--scene-size", "64", "64", "--lr", "0.01")
    flags += ("--dropout", "0", "--steps", "1", "--scene-val-count", "1")
    for count in (1, 2):
        run(count, "train", *flags, "--output", tmp_path / f"{count}")
    run(1, "train", *flags, "--lr", "0", "--output", tmp_path / "before")
    before, one, two = (weights(tmp_path / name) for name in ("before", "1", "2"))
    for key, value in one.items():
        moved, apart = (value - before[key]).double().norm(), (two[key] - value).double().norm()
        assert apart <= 1e-3 * moved + 1e-5 * value.double().norm(), key
    assert parse_train(["--resume", str(tmp_path / "1")])[0].config.model.norm == "batch"
    assert parse_train(["--resume", str(tmp_path / "1")], Processes(0, 2))[0].config.model.norm == "sync_batch"
    own = ["--resume", str(tmp_path / "1"), "--norm", "batch"]
    assert parse_train(own, Processes(0, 2))[0].config.model.norm == "batch"


FAKE_TIMM = """
from torch import nn
class Encoder(nn.Module):
    feature_info = type("Info", (), {"reduction": lambda self: [4, 32], "channels": lambda self: [8, 8]})()
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 8, 8)
        self.unused = nn.Conv2d(8, 8, 1)  # a feature that no head reads
    def forward(self, x):
        low = self.first(x)
        self.unused(low)
        return [low, self.last(low)]
def create_model(name, **options):
    return Encoder()
"""


def test_an_encoder_with_features_that_nobody_reads(tmp_path, monkeypatch):
    """As timm's HRNet: some parameters get no gradient."""
    (tmp_path / "timm.py").write_text(FAKE_TIMM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    flags = (*NORMS, "--backbone", "timm:fake", "--output-stride", "32", "--weights", "None", "--accumulate", "2")
    _, err = run(2, "train", *flags, "--steps", "3", "--output", tmp_path / "run")
    assert "Warning" not in err
    assert len(lines(tmp_path / "run")) == 4  # and the validation


def test_own_statistics_are_validated_as_they_are_saved(tmp_path):
    """--norm batch: all score with the running statistics of the main process, which are in the file."""
    flags = (*NORMS, "--norm", "batch", "--ema-decay", "0.5", "--lr", "0.02", "--recompute", "--batch-size", "8")
    folder = tmp_path / "run"
    out, _ = run(2, "train", *flags, "--steps", "2", "--output", folder)
    assert "batch norm is over each process's own 4 images" in out
    run(1, "evaluate", folder / "best.pt", "--device", "cpu", "--precision", "fp32", "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["miou"] == next(line["miou"] for line in lines(folder) if "miou" in line)


@pytest.mark.parametrize(("count", "images"), [(2, 5), (3, 2)])
def test_scores_and_masks_are_those_of_one_process(tmp_path, alone, count, images):
    """Uneven shares, and more processes than images."""
    folder = tmp_path / "data"
    make_images(folder, images, classes=10)
    flags = ("--data", "folder", "--root", folder, "--device", "cpu", "--workers", "0")
    results = {}
    for number in (1, count):
        masks, scores = tmp_path / f"masks{number}", tmp_path / f"{number}.json"
        out, _ = run(number, "evaluate", alone / "best.pt", *flags, "--output", masks, "--json", scores)
        assert out.count("mean IoU") == 1
        pictures = {p.name: np.asarray(Image.open(p)) for p in sorted(masks.rglob("*.png"))}
        assert len(pictures) == images
        results[number] = json.loads(scores.read_text()), pictures
    assert results[1][0] == results[count][0]
    for name, mask in results[1][1].items():
        np.testing.assert_array_equal(results[count][1][name], mask)


def make_images(root: Path, count: int, classes: int) -> None:
    """Training and validation images of different sizes."""
    names = checkpoint.classes_to_dict(open_dataset(DataConfig(name="scenes"), "train").classes)["names"][:classes]
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng(number)
            size = (40 + 8 * number, 64)
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(root / split / f"images/{number}.png")
            mask = rng.integers(0, classes, size, np.uint8)
            Image.fromarray(mask).save(root / split / f"masks/{number}.png")
    (root / "dataset.toml").write_text(f"names = {json.dumps(names)}\n")


FOLDER = [*TINY, "--data", "folder", "--weights", "None", "--scale-min", "1", "--scale-max", "1", "--ema-decay", "0"]


def test_a_broken_file_in_one_process_ends_all_with_its_sentence(tmp_path):
    make_images(tmp_path / "data", 5, classes=3)
    (tmp_path / "data/train/images/3.png").write_bytes(b"nothing")
    flags = ("--root", tmp_path / "data", "--no-check", "--steps", "9", "--output", tmp_path / "run")
    began = time.monotonic()
    _, err = run(2, "train", *FOLDER, *flags, fails=True)
    assert err.count("3.png cannot be read") == err.count("error: ") == 1, err
    assert "deeplab_fast/train.py" not in err  # no traceback of ours
    assert time.monotonic() - began < 120


def test_all_mistakes_in_the_data_are_listed_once(tmp_path):
    make_images(tmp_path / "data", 5, classes=3)
    for number in (1, 2):
        (tmp_path / f"data/train/images/{number}.png").write_bytes(b"nothing")
    _, err = run(2, "train", *FOLDER, "--root", tmp_path / "data", "--output", tmp_path / "run", fails=True)
    assert re.search(r"has 2 problems:\n.*1\.png.*\n.*2\.png", err), err
    assert err.count("error: ") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "1"), "--batch-size 1 is shared by 2 processes: expected an image for each at least"),
        (("--optimizer", "best"), "invalid choice"),
        (("--lr", "1e30", "--clip-norm", "0", "--save-every", "1"), "the loss became"),
    ],
    ids=["batch", "flag", "nan"],
)
def test_a_mistake_that_all_notice_is_told_once(tmp_path, flags, message):
    _, err = run(2, "train", *TINY, *flags, "--steps", "40", "--output", tmp_path / "run", fails=True)
    assert err.count(message) == 1, err


def test_an_output_that_the_main_process_cannot_write(tmp_path):
    (tmp_path / "taken").write_text("")
    _, err = run(2, "train", *TINY, "--steps", "1", "--output", tmp_path / "taken", fails=True)
    assert err.count("taken is a file; expected a folder") == err.count("error: ") == 1, err


def test_a_mistake_after_the_others_last_message_is_told_once(tmp_path):
    """The main process writes alone at the end, such as --json on a full disk."""
    script = tmp_path / "late.py"
    script.write_text(
        "import time\n"
        "from deeplab_fast.cli import run_command\n"
        "from deeplab_fast.distributed import start\n"
        "from deeplab_fast.errors import UserError\n"
        "def main(processes):\n"
        "    processes.any(False)\n"
        "    if processes.is_main:\n"
        "        time.sleep(1)  # the other is leaving\n"
        "        raise UserError('the disk is full')\n"
        "    return 0\n"
        "run_command(main, start)\n"
    )
    done = subprocess.run(job(2, script), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("error: the disk is full") == 1, done.stderr
    assert "deeplab_fast/cli.py" not in done.stderr  # no traceback of ours


def test_the_interpreter_of_one_of_several_is_not_taken_down(tmp_path):
    """Where gloo's threads outlive their group that aborts now and then. What is registered for the exit still runs."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import atexit, os\n"
        "from deeplab_fast.cli import run_command\n"
        "from deeplab_fast.distributed import start\n"
        "def say(text, write=os.write):\n"
        "    write(1, text + b'\\n')\n"
        "class Finalised:\n"
        "    def __del__(self, say=say):\n"
        "        say(b'finalised')\n"
        "finalised = Finalised()\n"
        "atexit.register(say, b'exits')\n"
        "run_command(lambda processes: int(os.environ.get('WORLD_SIZE', 3)), start)\n"
    )
    alone = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (alone.returncode, alone.stdout.split("\n")) == (3, ["exits", "finalised", ""]), alone.stderr
    argv = [sys.executable, *TORCHRUN, "2", str(script)]  # as users start it
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["exits", "exits"], done.stderr
    assert re.search(r"exitcode\s*: 2 ", done.stderr), done.stderr


@pytest.fixture
def running(tmp_path):
    """A job of two that would go on for long, at its third step or later."""
    flags = (*TINY, "--steps", "100000", "--output", tmp_path / "run")
    process = launch(2, "train", *flags, agent=[sys.executable])
    try:
        for _ in range(3600):
            path = tmp_path / "run" / "metrics.jsonl"
            if process.poll() is not None or path.exists() and len(path.read_text().splitlines()) >= 3:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        if process.poll() is None:
            for pid in (*workers(process), process.pid):
                os.kill(pid, signal.SIGKILL)


def workers(process: subprocess.Popen) -> list[int]:
    """What torchrun has started, each in a session of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "deeplab_fast.train" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_once_and_says_how_to_go_on(tmp_path, running, number):
    running.send_signal(number)
    out, err = running.communicate(timeout=120)
    folder = tmp_path / "run"
    assert out.count(f"go on with: python -m deeplab_fast.train --resume {folder}") == 1, out + err
    saved = checkpoint.load(folder / "last.pt")
    assert f"stopped after step {saved['step']};" in out
    # Every step that was logged is in the file: both ended after the same one.
    assert saved["step"] == max(line["step"] for line in lines(folder))


def test_a_killed_worker_ends_the_job(running):
    _, victim = workers(running)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    _, err = running.communicate(timeout=120)
    assert running.returncode != 0
    assert time.monotonic() - began < 60
    assert err.count("error: another process of this job was killed, or its machine is gone") == 1, err
    assert "deeplab_fast/train.py" not in err  # no traceback of ours
    assert re.search(rf"Signal 9|exitcode\s*: -9.*{victim}", err), err


def test_batch_norm_is_over_the_whole_batch_unless_asked_otherwise():
    """One process's recipe, and --norm where the user gives it."""
    several = Processes(0, 2)
    assert parse_train(NORMS)[0].config.model.norm == "batch"
    assert parse_train(NORMS, several)[0].config.model.norm == "sync_batch"
    assert parse_train([*NORMS, "--norm", "batch"], several)[0].config.model.norm == "batch"
    assert parse_train(TINY, several)[0].config.model.norm == "frozen_batch"


@pytest.mark.parametrize(("batch", "count"), [(8, 2), (5, 3), (3, 3)])
def test_shares_make_up_the_batches(batch, count):
    config = Config(
        data=DataConfig(scene_size=(32, 32), scene_count=7, workers=0),
        optim=OptimConfig(batch_size=batch, steps=3),
    )
    config = replace(config, augment=replace(config.augment, crop_size=(32, 32), jitter=0.2))
    dataset, cpu = open_dataset(config.data, "train"), torch.device("cpu")
    whole = list(train_batches(dataset, config, 1, cpu))
    parts = [list(train_batches(dataset, config, 1, cpu, Processes(rank, count))) for rank in range(count)]
    for step, batch in enumerate(whole):
        for name in ("images", "masks", "colour", "index"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
    sizes = [len(part[0].index) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.001, 0.25, 0.5, 1.0])
def test_order_statistic_is_topks(share):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.rand(1003, generator=generator) * 8,
            torch.tensor([0.0, -0.0, -1e-7, 1e-40, torch.inf, 3e38]),
            torch.full((50,), 0.5),
        ]
    )
    count = round(share * len(values))
    expected = values.topk(count).values.min() if count else torch.tensor(torch.inf)
    assert torch.equal(largest_of_all(values, share, ALONE), expected)


def test_alone_nothing_is_connected(monkeypatch):
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv("WORLD_SIZE", size)
        assert start() is ALONE
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert ALONE.sum_(x) is x and ALONE.gather([1]) == [1] and ALONE.broadcast("a") == "a" and not ALONE.any(False)


def test_half_an_environment_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 and RANK is not set: start several processes with torchrun"):
        start()


def test_devices_of_several_processes(monkeypatch):
    with pytest.raises(UserError, match="--device cuda:1: of several processes each takes a GPU of its own"):
        Processes(0, 2).device("cuda:1")
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert Processes(5, 8, 1, 2).device("auto") == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(UserError, match="3 processes on a machine with 2 GPUs: expected --nproc_per_node 2 at most"):
        Processes(0, 3, 0, 3).device("cuda")
    assert Processes(0, 3, 0, 3).device("cpu") == torch.device("cpu")


def test_processes_share_a_machines_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for processes, expected in (("1", 8), ("4", 4), ("16", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert loader_workers(None) == expected


def test_one_ctrl_c_may_arrive_twice(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stop = StopRequest(Processes(0, 2))
    try:
        for seconds in (0.0, 1.0):
            clock[0] = seconds
            stop._note(signal.SIGINT, None)
        assert stop.signal == signal.SIGINT
        clock[0] = 60.0
        with pytest.raises(KeyboardInterrupt):
            stop._note(signal.SIGINT, None)
    finally:
        stop.restore()

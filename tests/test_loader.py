"""Batches: the same ones for any number of workers and after resuming; errors in one sentence."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deeplab_fast.config import AugmentConfig, Config, DataConfig, OptimConfig, RunConfig
from deeplab_fast.data.base import Dataset
from deeplab_fast.data.labels import CAMVID
from deeplab_fast.data.loader import Batch, eval_samples, loader_workers, train_batches
from deeplab_fast.errors import UserError

CPU = torch.device("cpu")


class Numbered(Dataset):
    """Sample i is filled with i; `broken` ones raise, and `masks` False leaves masks out."""

    name, split, classes = "numbered", "train", CAMVID

    def __init__(self, count: int, broken: int | None = None, masks: bool = True) -> None:
        self.count, self.broken, self.masks = count, broken, masks

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        if index == self.broken:
            raise UserError(f"the image {index}.jpg cannot be read: it is truncated")
        image = np.random.default_rng(index).integers(0, 256, (20 + index, 24, 3), np.uint8)
        return image, np.full(image.shape[:2], index % 11, np.uint8) if self.masks else None


def config(workers: int = 0, **optim) -> Config:
    return Config(
        data=DataConfig(workers=workers),
        augment=AugmentConfig(crop_size=(16, 16), jitter=0.2, blur=0.5, rare_crop=0.3),
        optim=OptimConfig(**{"batch_size": 4, "steps": 6} | optim),
        run=RunConfig(seed=3),
    )


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for field in dataclasses.fields(Batch):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_batches_have_their_shapes():
    batches = list(train_batches(Numbered(7), config(), 0, CPU))
    assert len(batches) == 6
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((4, 16, 16, 3), torch.uint8)
        assert (batch.masks.shape, batch.masks.dtype) == ((4, 16, 16), torch.uint8)
        assert (batch.colour.shape, batch.colour.dtype) == ((4, 4), torch.float32)
        assert (batch.index.shape, batch.index.dtype) == ((4,), torch.int64)
        for mask, index in zip(batch.masks, batch.index.tolist(), strict=True):
            assert set(mask.unique().tolist()) <= {index % 11, 255}


def test_workers_and_resuming_change_nothing():
    alone = list(train_batches(Numbered(7), config(0), 0, CPU))
    assert_equal(alone, list(train_batches(Numbered(7), config(2), 0, CPU)))
    for step in (1, 4):
        assert_equal(alone[step:], list(train_batches(Numbered(7), config(2), step, CPU)))
    assert list(train_batches(Numbered(7), config(0), 6, CPU)) == []


def test_accumulation_takes_that_many_batches_a_step():
    whole = list(train_batches(Numbered(7), config(accumulate=3), 0, CPU))
    assert len(whole) == 18
    assert_equal(whole[6:], list(train_batches(Numbered(7), config(accumulate=3), 2, CPU)))


@pytest.mark.parametrize("count", [3, 7, 8])
def test_every_epoch_is_a_permutation_of_its_own(count):
    batches = train_batches(Numbered(count), config(steps=14), 0, CPU)
    stream = torch.cat([batch.index for batch in batches]).tolist()
    epochs = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_sample_is_cropped_anew_in_every_epoch_and_for_every_seed():
    def crops(seed: int) -> list[bytes]:
        chosen = dataclasses.replace(config(batch_size=1, steps=6), run=RunConfig(seed=seed))
        return [b.images.numpy().tobytes() for b in train_batches(Numbered(1), chosen, 0, CPU)]

    assert len(set(crops(0))) == 6
    assert crops(0) == crops(0)
    assert not set(crops(0)) & set(crops(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_one_sentence(workers):
    with pytest.raises(UserError) as caught:
        list(train_batches(Numbered(7, broken=2), config(workers), 0, CPU))
    assert str(caught.value) == "the image 2.jpg cannot be read: it is truncated"
    with pytest.raises(UserError) as caught:
        list(eval_samples(Numbered(7, broken=2), workers))
    assert str(caught.value) == "the image 2.jpg cannot be read: it is truncated"


def test_training_needs_masks_and_samples():
    with pytest.raises(UserError, match="the split train of the data set numbered has no masks to train on"):
        list(train_batches(Numbered(7, masks=False), config(), 0, CPU))
    with pytest.raises(UserError, match="the split train of the data set numbered is empty"):
        train_batches(Numbered(0), config(), 0, CPU)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("masks", [True, False])
def test_eval_samples_come_whole_and_in_order(workers, masks):
    dataset = Numbered(5, masks=masks)
    samples = list(eval_samples(dataset, workers))
    assert [index for index, _, _ in samples] == [0, 1, 2, 3, 4]
    for index, image, mask in samples:
        expected_image, expected_mask = dataset.load(index)
        np.testing.assert_array_equal(image.numpy(), expected_image)
        if masks:
            np.testing.assert_array_equal(mask.numpy(), expected_mask)
        else:
            assert mask is None


def test_number_of_workers(monkeypatch):
    assert [loader_workers(n) for n in (0, 3)] == [0, 3]
    for cores, expected in ((1, 0), (2, 2), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert loader_workers(None) == expected


SLOW = """
    import os, signal, time
    import numpy as np
    from deeplab_fast.data.base import Dataset
    from deeplab_fast.data.loader import eval_samples

    class Slow(Dataset):
        name, split = "slow", "val"
        def __init__(self, seconds):
            self.seconds = seconds
        def __len__(self):
            return 1000
        def load(self, index):
            time.sleep(self.seconds if index else 0)
            return np.zeros((2, 2, 3), np.uint8), None
"""


def start(folder: Path, main: str) -> subprocess.Popen:
    """A process, in a group of its own, that runs `main` after SLOW."""
    script = folder / "run.py"
    script.write_text(textwrap.dedent(SLOW) + textwrap.dedent(main))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],  # torch warns where there are fewer cores than workers
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_signals_to_the_group(tmp_path, number):
    """Terminals and schedulers send them; a main process that finishes its step needs its workers."""
    process = start(
        tmp_path,
        f"""
        if __name__ == "__main__":
            asked = []
            left = 20
            for index, _, _ in eval_samples(Slow(0.02), 2):
                if index == 1:  # both workers have started, and have not inherited this
                    signal.signal({int(number)}, lambda *_: asked.append(True))
                    print("ready", flush=True)
                left -= len(asked) >= 2
                if not left:
                    break
            print("stopped", flush=True)
        """,
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        os.killpg(process.pid, number)
        time.sleep(0.1)  # the same signal twice at once would arrive as one
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("stopped\n", "", 0)


def test_a_stuck_worker_can_be_terminated():
    others = set(multiprocessing.active_children())
    samples = eval_samples(Stuck(), 1)
    assert next(samples)[0] == 0
    (worker,) = set(multiprocessing.active_children()) - others
    worker.terminate()
    worker.join(timeout=10)
    try:
        assert worker.exitcode == 0
    finally:
        worker.kill()


def test_a_stuck_worker_ends_with_the_main_process(tmp_path):
    process = start(
        tmp_path,
        """
        if __name__ == "__main__":
            samples = eval_samples(Slow(60), 1)
            next(samples)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    out, _ = process.communicate(timeout=20)  # returns when the worker, too, has closed its end of the pipe
    assert out == "" and process.returncode == -signal.SIGKILL


class Stuck(Numbered):
    """As if the second file were on a file system that does not answer."""

    def __init__(self) -> None:
        super().__init__(4)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        if index:
            time.sleep(60)
        return super().load(index)


def test_rare_classes_are_met_more_often():
    def share(rare_crop: float) -> float:
        chosen = config(batch_size=8, steps=10)
        chosen = dataclasses.replace(chosen, augment=dataclasses.replace(chosen.augment, rare_crop=rare_crop))
        counts = Counter()
        for batch in train_batches(Spotted(), chosen, 0, CPU):
            counts.update((batch.masks == 2).flatten(1).any(1).tolist())
        return counts[True] / counts.total()

    assert share(0.0) < 0.15 < 0.3 < share(1.0)


class Spotted(Numbered):
    """A field of class 0 with one pixel in twenty thousand of class 2."""

    def __init__(self) -> None:
        super().__init__(4)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        mask = np.zeros((140, 140), np.uint8)
        mask[70, 20 + index] = 2
        return np.zeros((140, 140, 3), np.uint8), mask

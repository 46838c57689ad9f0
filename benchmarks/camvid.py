"""Seconds a training step on CamVid: this project's preset against a plain loop around segmentation_models_pytorch.

python -m benchmarks.camvid ROOT WEIGHTS [STEPS]   WEIGHTS: torchvision's ImageNet MobileNetV2

Both read batches of 8 through this project's loader and train in bf16. The plain loop is DeepLabV3Plus with the same
encoder weights, channels-last, SGD, cross entropy at full resolution, 256 x 256 crops; ours runs at these crops and at
the preset's own. They take turns of 10 steps, so that whatever else the machine does slows all of them. Steps whose
losses are not finite, or have not fallen by the last turn, have no time: the run fails. Writes
results/camvid_steps.json.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.ratios import CPU, RESULTS, describe
from deeplab_fast.cli import parse_train
from deeplab_fast.config import Config
from deeplab_fast.data.augment import prepare
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.loader import Batch, train_batches
from deeplab_fast.device import set_allocator
from deeplab_fast.state import Training
from deeplab_fast.train import optimise

TURN = 10  # steps
PLAIN_CROP = (256, 256)


def preset(root: str, weights: str, crop: tuple[int, int] | None) -> Config:
    command, _ = parse_train(["--data", "camvid", "--root", root, "--weights", weights, "--precision", "bf16"])
    config = command.config
    return config if crop is None else replace(config, augment=replace(config.augment, crop_size=crop))


def batches_of(config: Config) -> Iterator[Batch]:
    return train_batches(open_dataset(config.data, "train"), config, 0, CPU)


def ours(config: Config) -> Callable[[], float]:
    training = Training(config, open_dataset(config.data, "train"), open_dataset(config.data, "val"))
    training.start(None)
    batches = batches_of(config)
    return lambda: optimise(training, batches).item()


def plain(config: Config) -> Callable[[], float]:
    import segmentation_models_pytorch as smp

    model = smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=11)
    model.encoder.load_state_dict(torch.load(config.run.weights, weights_only=True), strict=False)
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    batches = batches_of(config)

    def step() -> float:
        batch = next(batches)
        x = prepare(batch.images, batch.colour, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), batch.masks.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(root: str, weights: str, steps: str = "40") -> None:
    set_allocator()
    crops = preset(root, weights, PLAIN_CROP), preset(root, weights, None)
    loops = {
        "segmentation_models_pytorch, plain loop, 256 x 256": plain(crops[0]),
        "this project, 256 x 256": ours(crops[0]),
        "this project, {} x {}".format(*crops[1].augment.crop_size): ours(crops[1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(1 + int(steps) // TURN):
        for name, step in loops.items():
            start = time.perf_counter()
            losses[name].append(statistics.fmean(step() for _ in range(TURN)))
            seconds[name].append((time.perf_counter() - start) / TURN)
    check(losses)
    medians = {name: round(statistics.median(turns[1:]), 4) for name, turns in seconds.items()}  # the first warms up
    about = describe(CPU) | {"steps": int(steps), "seconds_a_step": medians, "loss_of_each_turn": losses}
    (RESULTS / "camvid_steps.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(medians, indent=1))


def check(losses: dict[str, list[float]]) -> None:
    """A loop that does not learn is not one to be timed."""
    for name, turns in losses.items():
        if not all(map(math.isfinite, turns)) or turns[-1] >= turns[0]:
            raise SystemExit(f"{name}: mean losses of the turns are {turns}; expected them to fall")


if __name__ == "__main__":
    main(*sys.argv[1:])

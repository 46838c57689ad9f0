"""Whether training on the kernels is the training that it was: loss curves beside those of plain PyTorch.

python -m benchmarks.loss_curves [STEPS]   trains the scenes preset on plain PyTorch with three seeds and on the kernels
with the first of them, 200 steps each, and writes results/loss_curves.json and .png.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.ratios import CPU, RESULTS, describe
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.loader import train_batches
from deeplab_fast.device import set_allocator
from deeplab_fast.ops import dispatch
from deeplab_fast.presets import PRESETS
from deeplab_fast.state import Training
from deeplab_fast.train import optimise

SEEDS = (0, 1, 2)
WINDOW = 10  # steps that the curves are averaged over


def losses(seed: int, steps: int, *, plain: bool) -> list[float]:
    config = PRESETS["scenes"]()
    config = replace(config, optim=replace(config.optim, steps=steps))
    config = replace(config, run=replace(config.run, seed=seed, device="cpu"))
    with dispatch.requesting("reference") if plain else contextlib.nullcontext():
        train_set = open_dataset(config.data, "train")
        training = Training(config, train_set, open_dataset(config.data, "val"))
        training.start(None)
        batches = train_batches(train_set, config, 0, training.device)
        return [optimise(training, batches).item() for _ in range(steps)]


def smooth(values: list[float]) -> np.ndarray:
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")


def compare(plain: list[list[float]], ours: list[float]) -> dict[str, float]:
    """How the kernels' curve lies to those of plain PyTorch, of which the first has the same seed."""
    curves = np.stack([smooth(values) for values in plain])
    low, high, own = curves.min(0), curves.max(0), smooth(ours)
    return {
        "share_of_steps_inside": round(float(((own >= low) & (own <= high)).mean()), 3),
        "mean_distance_to_same_seed": round(float(np.abs(own - curves[0]).mean()), 4),
        "mean_spread_of_seeds": round(float((high - low).mean()), 4),
        "largest_distance_outside": round(float(np.maximum(np.maximum(low - own, own - high), 0).max()), 4),
    }


def draw(about: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    at = np.arange(WINDOW, len(about["ours"]) + 1)
    curves = np.stack([smooth(values) for values in about["plain"]])
    axes.fill_between(at, curves.min(0), curves.max(0), color="#bbbbbb", label="spread of the three")
    for seed, curve in zip(SEEDS, curves, strict=True):
        axes.plot(at, curve, color="#555555", linewidth=0.8, label=f"plain PyTorch, seed {seed}")
    axes.plot(at, smooth(about["ours"]), color="#cc3311", linewidth=1.4, label=f"kernels, seed {SEEDS[0]}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {WINDOW} steps")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "loss_curves.png", dpi=130)


def main(steps: str = "200") -> None:
    set_allocator()
    about = describe(CPU)
    about["plain"] = [losses(seed, int(steps), plain=True) for seed in SEEDS]
    about["ours"] = losses(SEEDS[0], int(steps), plain=False)
    about["compared"] = compare(about["plain"], about["ours"])
    (RESULTS / "loss_curves.json").write_text(json.dumps(about) + "\n")
    draw(about)
    print(json.dumps(about["compared"], indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

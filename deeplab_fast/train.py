"""python -m deeplab_fast.train: images in, a trained DeepLab out.

Without a flag it trains on the built-in street scenes. It reads from top to bottom in the order the data moves.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .cli import Stopped, StopRequest, TrainCommand, parse_train, run_command
from .config import Config
from .data.augment import prepare
from .data.datasets import Dataset, check_dataset, open_dataset
from .data.loader import Batch, train_batches
from .device import autocast, describe, resolve_device, resolve_precision, set_allocator
from .errors import UserError
from .inference import evaluate_dataset
from .loss import cross_entropy_sum, mean_loss, target_weight
from .model import load_backbone_weights, load_matching
from .model.weights import read_state_dict
from .record import RunRecord, new_run_folder
from .schedule import WeightAverage, build_optimizer, lr_factor


class Training:
    """Model, optimiser and all else that a resumed run needs to go on exactly where it stopped."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config, self.classes = config, dataset.classes
        self.device = resolve_device(config.run.device)
        self.dtype = resolve_precision(config.run.precision, self.device)
        torch.manual_seed(config.run.seed)
        self.model = checkpoint.build(config, self.classes)
        self.step = 0
        self.validated_step = 0
        self.best_miou = -1.0

    def start(self, resumed: dict[str, Any] | None) -> None:
        """Place everything on the device; take the initial weights, or the state of the run that goes on."""
        config, optim = self.config, self.config.optim
        if resumed is None and config.run.weights:
            load_initial_weights(self.model, config)
        layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)
        self.average = WeightAverage(self.model, optim.ema_decay) if optim.ema_decay else None
        self.optimizer = build_optimizer(self.model, optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.class_weights = _class_weights(config, len(self.classes.names), self.device)
        if resumed is not None:
            state = resumed["training"]
            self.model.load_state_dict(state["model"])
            if self.average:
                self.average.model.load_state_dict(resumed["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = resumed["step"]
            self.validated_step, self.best_miou = state["validated_step"], state["best_miou"]
        self.forward = torch.compile(self.model) if config.run.compile else self.model

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where there are any."""
        return self.average.model if self.average else self.model

    def content(self, metrics: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a checkpoint for use holds."""
        return {
            "step": self.step,
            "model": self.evaluated_model.state_dict(),
            "config": self.config.to_dict(),
            "classes": checkpoint.classes_to_dict(self.classes),
            "metrics": metrics,
        }

    def save_last(self, folder: Path) -> None:
        """Write last.pt: the model for use, and what a resumed run needs."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "validated_step": self.validated_step,
            "best_miou": self.best_miou,
        }
        checkpoint.save(folder / "last.pt", {**self.content(), "training": state})


def load_initial_weights(model: nn.Module, config: Config) -> None:
    """A whole DeepLab gives all but a classifier of other classes; anything else gives the backbone."""
    source = config.run.weights
    if Path(source).is_file():
        state = read_state_dict(source)
        if any(key.startswith("aspp.") for key in state):
            left_out = load_matching(model, state)
            print(f"weights from {source}" + (f", all but {', '.join(left_out)}" if left_out else ""))
            return
    load_backbone_weights(model, config.model.backbone if source == "imagenet" else source)
    print(f"backbone weights from {source}")


def _class_weights(config: Config, num_classes: int, device: torch.device) -> Tensor | None:
    weights = config.optim.class_weights
    if weights is None:
        return None
    if len(weights) != num_classes:
        raise UserError(f"--class-weights has {len(weights)} numbers; the data set has {num_classes} classes")
    return torch.tensor(weights, dtype=torch.float32, device=device)


def optimise(training: Training, batches: Iterator[Batch]) -> Tensor:
    """One optimiser step over `accumulate` forward passes. Returns the loss, on the device."""
    config, model, device = training.config, training.forward, training.device
    passes = [next(batches) for _ in range(config.optim.accumulate)]
    masks = [batch.masks.to(device, non_blocking=True) for batch in passes]
    weights = [target_weight(mask, len(training.classes.names), training.class_weights)[0] for mask in masks]
    weight = torch.stack(weights).sum()

    rate = config.optim.lr * lr_factor(training.step, config.optim)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]

    # Dropout's draws are a function of the step, so a resumed run repeats them. Seeded after the batches are drawn,
    # because a loader takes a number from the same generator when it starts.
    torch.manual_seed(config.run.seed * 1_000_003 + training.step)
    training.model.train()
    total = torch.zeros((), device=device)
    for batch, mask in zip(passes, masks, strict=True):
        images = batch.images.to(device, non_blocking=True)
        x = prepare(images, batch.colour, dtype=training.dtype, channels_last=config.run.channels_last)
        with autocast(device, training.dtype):
            logits = model(x)
        loss = cross_entropy_sum(
            logits,
            mask,
            class_weights=training.class_weights,
            label_smoothing=config.optim.label_smoothing,
            align_corners=config.model.align_corners,
        )
        loss = mean_loss(loss, weight)
        training.scaler.scale(loss).backward()
        total += loss.detach()

    if config.optim.clip_norm:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), config.optim.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    if training.average:
        training.average.update(training.step)
    training.step += 1
    return total


def check_losses(losses: list[tuple[int, Tensor]], training: Training, folder: Path) -> float:
    """The mean of the losses since the last check; raises UserError at the first that is not finite."""
    values = torch.stack([loss for _, loss in losses]).tolist()
    for (step, _), value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            rate = training.config.optim.lr * lr_factor(step - 1, training.config.optim)
            last = folder / "last.pt"
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written before it"
            raise UserError(
                f"the loss became {value} at step {step} with learning rate {rate:.3g}; {good}; "
                "a lower --lr, a longer --warmup-steps or --clip-norm usually helps"
            )
    return sum(values) / len(values)


def validate(training: Training, dataset: Dataset, record: RunRecord, stop: StopRequest, bar: tqdm) -> None:
    """Score the held-out images, write the pictures and keep the best model."""
    run = training.config.run
    count = min(run.sample_count, len(dataset))
    shown = {round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)}

    def each() -> None:
        stop.check()
        seen.update()

    seen = tqdm(total=len(dataset), desc="validation", unit="image", dynamic_ncols=True, disable=None, leave=False)
    with seen:
        metrics, samples = evaluate_dataset(
            training.evaluated_model.eval(),
            dataset,
            device=training.device,
            dtype=training.dtype,
            channels_last=run.channels_last,
            workers=training.config.data.workers,
            keep=shown,
            each=each,
        )
    record.validation(training.step, metrics, samples)
    training.validated_step = training.step
    if metrics["miou"] > training.best_miou:
        training.best_miou = metrics["miou"]
        checkpoint.save(record.folder / "best.pt", training.content(metrics))
    score = f"validation mIoU {metrics['miou']:.4f} (best {training.best_miou:.4f})"
    bar.write(f"step {training.step}: {score}", sys.stdout)


def loop(training: Training, train_set: Dataset, val_set: Dataset, record: RunRecord, stop: StopRequest) -> None:
    """All optimiser steps that are left, with validation, log and checkpoints between them."""
    config, run, steps = training.config, training.config.run, training.config.optim.steps
    batches = train_batches(train_set, config, training.step, training.device)
    losses: list[tuple[int, Tensor]] = []
    clock, images = time.perf_counter(), config.optim.batch_size * config.optim.accumulate
    bar = tqdm(total=steps, initial=training.step, unit="step", dynamic_ncols=True, disable=None, smoothing=0.05)

    def due(every: int) -> bool:
        return training.step % every == 0 or training.step == steps

    with bar:
        if training.step and due(run.val_every) and training.validated_step < training.step:
            validate(training, val_set, record, stop, bar)
        while training.step < steps:
            losses.append((training.step + 1, optimise(training, batches)))
            bar.update()
            # A CPU has the loss already; on a GPU reading it would make every step wait.
            if training.device.type == "cpu" and not math.isfinite(losses[-1][1].item()) or due(run.log_every):
                speed = images * len(losses) / (time.perf_counter() - clock)
                loss, rate = check_losses(losses, training, record.folder), training.optimizer.param_groups[0]["lr"]
                record.step({"step": training.step, "loss": loss, "lr": rate, "images_per_second": round(speed, 2)})
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.2g}", img_s=f"{speed:.1f}")
                if bar.disable and due(run.log_every * 10):
                    figures = f"loss {loss:.4f}, lr {rate:.3g}, {speed:.1f} images/s"
                    print(f"step {training.step}/{steps}: {figures}", flush=True)
                losses, clock = [], time.perf_counter()
            if due(run.val_every):
                validate(training, val_set, record, stop, bar)
                clock = time.perf_counter()
            if due(run.save_every):
                if losses:
                    check_losses(losses, training, record.folder)
                training.save_last(record.folder)
            stop.check()


def train(command: TrainCommand, resumed: dict[str, Any] | None) -> Path:
    """Run `command` to its end and return the folder that it wrote."""
    config = command.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    set_allocator()
    train_set, val_set = open_dataset(config.data, "train"), open_dataset(config.data, "val")
    training = Training(config, train_set)
    training.start(resumed)
    if config.data.check:
        for dataset in (train_set, val_set):
            check_dataset(dataset, config.data.workers)
    folder = Path(config.run.output) if resumed else new_run_folder(config.run.output, explicit=command.output_given)
    record = RunRecord(folder, config, training.classes, training.step)
    print(
        f"{config.model.name} {config.model.backbone} on {config.data.name}: {len(train_set)} training and "
        f"{len(val_set)} validation images, {len(training.classes)} classes; writing {folder}\n"
        f"{describe(training.device, training.dtype)}",
        flush=True,
    )
    stop = StopRequest()
    try:
        loop(training, train_set, val_set, record, stop)
    except Stopped:
        training.save_last(folder)
        print(f"stopped after step {training.step}; go on with: python -m deeplab_fast.train --resume {folder}")
        raise SystemExit(128 + stop.signal) from None
    finally:
        stop.restore()
        record.close()
    print(
        f"best validation mIoU {training.best_miou:.4f}; look at {folder / 'samples.png'}\n"
        f"score it: python -m deeplab_fast.evaluate {folder / 'best.pt'}\n"
        f"use it: python -m deeplab_fast.predict {folder / 'best.pt'} IMAGE... --output DIR"
    )
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command, resumed = parse_train(argv)
    train(command, resumed)
    return 0


if __name__ == "__main__":
    run_command(main)

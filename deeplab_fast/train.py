"""python -m deeplab_fast.train: images in, a trained DeepLab out.

Without a flag it trains on the built-in street scenes. It reads from top to bottom in the order the data moves.
"""

from __future__ import annotations

import contextlib
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
from .cli import StopRequest, TrainCommand, parse_train, run_command
from .config import Config
from .data.augment import prepare
from .data.datasets import Dataset, check_dataset, open_dataset, require_truth
from .data.loader import Batch, train_batches
from .device import autocast, describe, set_allocator
from .distributed import ALONE, Processes, start
from .errors import Stopped, UserError
from .inference import evaluate_dataset
from .loss import mean_loss, rescale, target_weight, training_loss
from .record import NoRecord, RunRecord, new_run_folder
from .schedule import lr_factor
from .state import Training


def optimise(training: Training, batches: Iterator[Batch]) -> Tensor:
    """One optimiser step over `accumulate` forward passes. Returns the loss, on the device.

    Of several processes each has its rows of every pass. All divide by the weight of all, so that uneven shares and
    ignored pixels weigh what they weigh in one process.
    """
    config, model, device, processes = training.config, training.forward, training.device, training.processes
    passes = [next(batches) for _ in range(config.optim.accumulate)]
    masks = [batch.masks.to(device, non_blocking=True) for batch in passes]
    counted = [target_weight(mask, len(training.classes), training.class_weights) for mask in masks]
    weight = torch.stack([weight for weight, _ in counted]).sum()
    wrong = torch.stack([wrong for _, wrong in counted]).sum()
    if processes.size > 1:  # in one message; fp64 holds both exactly
        weight, wrong = processes.sum_(torch.stack([weight.double(), wrong.double()])).unbind()
        weight, wrong = weight.float(), wrong.long()
    training.out_of_range += wrong

    rate = config.optim.lr * lr_factor(training.step, config.optim)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]

    # Dropout's draws are a function of the step, so a resumed run repeats them, and differ between the processes (a CPU
    # reads the lower 32 bits). Seeded after the batches are drawn, because a loader takes a number from the same
    # generator when it starts.
    torch.manual_seed(config.run.seed * 1_000_003 + training.step + processes.rank * 0x9E3779B1)
    training.model.train()
    total, kept = torch.zeros((), device=device), torch.zeros((), device=device)
    for number, (batch, mask) in enumerate(zip(passes, masks, strict=True), 1):
        images = batch.images.to(device, non_blocking=True)
        x = prepare(images, batch.colour, dtype=training.dtype, channels_last=config.run.channels_last)
        waits = processes.size > 1 and number < len(passes)  # gradients travel in the last pass
        with model.no_sync() if waits else contextlib.nullcontext():
            with autocast(device, training.dtype):
                outputs = model(x)
            loss, hard = training_loss(
                outputs,
                mask,
                config.optim,
                class_weights=training.class_weights,
                align_corners=config.model.align_corners,
                step=training.step,
                processes=processes,
            )
            loss = mean_loss(loss, weight)
            # The mean of the processes' gradients is wanted as their sum.
            training.scaler.scale(loss * processes.size if processes.size > 1 else loss).backward()
        total += loss.detach()
        if hard is not None:
            kept += hard

    if processes.size > 1:
        total, kept = processes.sum_(torch.stack([total, kept]).double()).float().unbind()
    if config.optim.mining != "none":
        gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
        total = rescale(gradients, total, weight, kept)
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
            raise training.diverged(f"the loss became {value} at", step, folder)
    if wrong := training.out_of_range.item():
        raise UserError(f"{wrong} pixels had labels that are neither a class nor 255, up to step {training.step}")
    return sum(values) / len(values)


def validate(training: Training, dataset: Dataset, record: RunRecord | NoRecord, stop: StopRequest, bar: tqdm) -> None:
    """Score the held-out images, write the pictures and keep the best model."""
    run, processes = training.config.run, training.processes
    training.agree()
    count = min(run.sample_count, len(dataset))
    shown = {round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)}

    def progress() -> None:
        stop.check()
        seen.update()

    options = {"desc": "validation", "unit": "image", "dynamic_ncols": True, "leave": False}
    seen = tqdm(total=len(processes.every(len(dataset))), disable=None if processes.is_main else True, **options)
    with seen:
        metrics, samples = evaluate_dataset(
            training.evaluated_model.eval(),
            dataset,
            device=training.device,
            dtype=training.dtype,
            channels_last=run.channels_last,
            workers=training.config.data.workers,
            keep=shown,
            progress=progress,
            processes=processes,
        )
    record.validation(training.step, metrics, samples)
    training.validated_step = training.step
    if metrics["miou"] > training.best_miou:
        training.best_miou = metrics["miou"]
        if processes.is_main:
            checkpoint.save(record.folder / "best.pt", training.content(metrics))
    score = f"validation mIoU {metrics['miou']:.4f} (best {training.best_miou:.4f})"
    bar.write(f"step {training.step}: {score}", sys.stdout)


def loop(
    training: Training, train_set: Dataset, val_set: Dataset, record: RunRecord | NoRecord, stop: StopRequest
) -> None:
    """All optimiser steps that are left, with validation, log and checkpoints between them."""
    config, run, steps = training.config, training.config.run, training.config.optim.steps
    batches = train_batches(train_set, config, training.step, training.device, training.processes)
    losses: list[tuple[int, Tensor]] = []
    clock, images = time.perf_counter(), config.optim.batch_size * config.optim.accumulate
    quiet = None if training.processes.is_main else True
    bar = tqdm(total=steps, initial=training.step, unit="step", dynamic_ncols=True, disable=quiet, smoothing=0.05)

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
            if due(run.val_every) or due(run.save_every):
                training.save_last(record.folder)
            if due(run.val_every):
                validate(training, val_set, record, stop, bar)
                training.save_last(record.folder)
                clock = time.perf_counter()
            stop.check_all()


def train(command: TrainCommand, resumed: dict[str, Any] | None, processes: Processes = ALONE) -> Path:
    """Run `command` to its end and return the folder that it wrote."""
    config = command.config
    processes.batch_share(config.optim.batch_size)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    set_allocator()
    train_set, val_set = open_dataset(config.data, "train"), open_dataset(config.data, "val")
    for dataset in (train_set, val_set):
        require_truth(dataset)
    training = Training(config, train_set, val_set, processes)
    training.start(resumed)
    if config.data.check:
        for dataset in (train_set, val_set):
            check_dataset(dataset, config.data.workers, processes)
    folder = Path(config.run.output)
    if resumed is None:
        if processes.is_main:
            folder = new_run_folder(config.run.output, explicit=command.output_given)
        folder = processes.broadcast(folder)
    record = NoRecord(folder)
    if processes.is_main:
        record = RunRecord(folder, config, training.classes, training.step, training.validated_step)
    if resumed is None:
        training.save_last(folder)  # so that a kill before the first save can be gone on from, too
    print(
        f"{config.model.name} {config.model.backbone} on {config.data.name}: {len(train_set)} training and "
        f"{len(val_set)} validation images, {len(training.classes)} classes; writing {folder}\n"
        f"{describe(training.device, training.dtype)}",
        flush=True,
    )
    if processes.size > 1:
        print(_how_shared(config, processes), flush=True)
    stop = StopRequest(processes)
    try:
        loop(training, train_set, val_set, record, stop)
    except Stopped:
        training.save_last(folder)
        print(f"stopped after step {training.step}; go on with: python -m deeplab_fast.train --resume {folder}")
        raise SystemExit(128 + processes.post(stop.signal)()) from None
    finally:
        stop.restore()
        record.close()
    print(
        f"best validation mIoU {training.best_miou:.4f}; look at {folder / 'samples.png'}\n"
        f"score it: python -m deeplab_fast.evaluate {folder / 'best.pt'}\n"
        f"use it: python -m deeplab_fast.predict {folder / 'best.pt'} IMAGE... --output DIR"
    )
    return folder


def _how_shared(config: Config, processes: Processes) -> str:
    """What several processes do with a batch and its norms."""
    line = f"{processes.size} processes share each batch of {config.optim.batch_size}"
    if config.model.norm == "sync_batch":
        return f"{line}; batch norm is over all of it (--norm batch: over each process's own images)"
    if config.model.norm == "batch":
        return f"{line}; batch norm is over each process's own {config.optim.batch_size // processes.size} images"
    return line


def main(argv: list[str] | None = None, processes: Processes = ALONE) -> int:
    """The command; returns its exit status."""
    command, resumed = parse_train(argv, processes)
    train(command, resumed, processes)
    return 0


if __name__ == "__main__":
    run_command(main, start)

"""What a training run consists of between two steps: model, optimiser, counters; how it starts and how it is saved."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import Config
from .data.class_counts import class_weights, count_classes
from .data.datasets import Dataset
from .device import resolve_precision
from .distributed import ALONE, Processes
from .errors import UserError
from .model import load_backbone_weights, load_matching
from .model.importers import identify, load_weights
from .model.timm_encoder import TimmEncoder
from .model.weights import is_local
from .schedule import WeightAverage, build_optimizer, lr_factor


class Training:
    """Model, optimiser and all else that a resumed run needs to go on exactly where it stopped."""

    def __init__(self, config: Config, train_set: Dataset, val_set: Dataset, processes: Processes = ALONE) -> None:
        self.config, self.classes, self.train_set, self.processes = config, train_set.classes, train_set, processes
        # Another list of images would change every batch of a run that goes on.
        self.data = {"train": [train_set.split, len(train_set)], "val": [val_set.split, len(val_set)]}
        self.device = processes.device(config.run.device)
        self.dtype = resolve_precision(config.run.precision, self.device)
        torch.manual_seed(config.run.seed)
        self.model = checkpoint.build(config, self.classes)
        self.step = 0
        self.validated_step = 0
        self.best_miou = -1.0
        self.out_of_range = torch.zeros((), dtype=torch.int64, device=self.device)  # labels met so far

    def start(self, resumed: dict[str, Any] | None) -> None:
        """Place everything on the device; take the initial weights, or the state of the run that goes on."""
        config, optim = self.config, self.config.optim
        if resumed is None and config.run.weights:
            self.processes.one_downloads(lambda: load_initial_weights(self.model, config))
        layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)
        if config.run.recompute and not hasattr(self.model.backbone, "recompute"):
            raise UserError(f"--recompute: the backbone {config.model.backbone} has no blocks for it")
        self.model.backbone.recompute = config.run.recompute
        self.average = WeightAverage(self.model, optim.ema_decay) if optim.ema_decay else None
        self.optimizer = build_optimizer(self.model, optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        measured = None if resumed is None else resumed["training"].get("class_weights")
        self.class_weights = _class_weights(config, self.train_set, measured, self.device, self.processes)
        if resumed is not None:
            self._restore(resumed)
        if config.run.compile and self.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise UserError("--compile: torch.compile needs a C++ compiler on a CPU, and none was found")
        forward = torch.compile(self.model) if config.run.compile else self.model
        # Encoders of timm may make features that no head reads, such as HRNet's.
        unused = isinstance(self.model.backbone, TimmEncoder)
        self.forward = self.processes.wrap(forward, self.device, unused=unused)

    def _restore(self, resumed: dict[str, Any]) -> None:
        state = resumed["training"]
        if checkpoint.classes_from_dict(resumed["classes"]) != self.classes:
            raise UserError(f"the classes of {self.config.data.name} are no longer those that the run began with")
        for part, (split, count) in self.data.items():
            if state["data"][part] != [split, count]:
                began = "{} with {} images".format(*state["data"][part])
                raise UserError(f"the run began with the {part} split {began}, and now finds {split} with {count}")
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(resumed["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.validated_step, self.best_miou = resumed["step"], state["validated_step"], state["best_miou"]

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

    @torch.no_grad()
    def agree(self) -> None:
        """Give every process the main one's running statistics, where each has had those of its own images."""
        if self.processes.size == 1:
            return
        models = [self.model, *([self.average.model] if self.average else [])]
        buffers = [b for model in models for b in model.buffers() if b.is_floating_point()]
        if buffers:
            message = self.processes.broadcast_(torch.cat([b.float().flatten() for b in buffers]))
            for buffer, new in zip(buffers, message.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(new.view_as(buffer))

    def save_last(self, folder: Path) -> None:
        """Write last.pt: the model for use, and what a resumed run needs. Weights that are not finite are not saved.

        Called by all processes; the main one writes.
        """
        self.agree()
        floating = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not torch.stack(torch._foreach_norm(floating, math.inf)).isfinite().all():
            raise self.diverged("the weights are not finite after", self.step, folder)
        if not self.processes.is_main:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": str(self.dtype).removeprefix("torch."),
            "data": self.data,
            "processes": self.processes.size,
            # A run goes on with the weights that it measured, whatever has become of the masks.
            "class_weights": None if self.class_weights is None else self.class_weights.tolist(),
            "validated_step": self.validated_step,
            "best_miou": self.best_miou,
        }
        checkpoint.save(folder / "last.pt", {**self.content(), "training": state})

    def diverged(self, what: str, step: int, folder: Path) -> UserError:
        """The error that ends a run whose loss or weights are not finite."""
        rate = self.config.optim.lr * lr_factor(step - 1, self.config.optim)
        return UserError(
            f"{what} step {step} with learning rate {rate:.3g}; the last good checkpoint is {folder / 'last.pt'}; "
            "a lower --lr, a longer --warmup-steps or --clip-norm usually helps"
        )


def load_initial_weights(model: nn.Module, config: Config) -> None:
    """A whole DeepLab gives all but a classifier of other classes; anything else gives the backbone."""
    source = config.run.weights
    if is_local(source):
        layout, state = identify(source)
        if layout is not None and layout.whole:
            left_out = load_weights(model, source, new_classifier=True).missing
            print(f"weights from {source}, {layout.name}" + (f", all but {', '.join(left_out)}" if left_out else ""))
            return
        if any(key.startswith("aspp.") for key in state):
            left_out = load_matching(model, state)
            print(f"weights from {source}" + (f", all but {', '.join(left_out)}" if left_out else ""))
            return
    load_backbone_weights(model, config.model.backbone if source == "imagenet" else source)
    print(f"backbone weights from {source}")


def _class_weights(
    config: Config, train_set: Dataset, measured: list[float] | None, device: torch.device, processes: Processes
) -> Tensor | None:
    """fp32 (K,). measured: what an earlier part of this run found."""
    weights, names = config.optim.class_weights, train_set.classes.names
    if weights is None:
        return None
    if isinstance(weights, str):
        kind, weights = weights, measured
        if weights is None:
            if processes.is_main:
                weights = class_weights(count_classes(train_set, config.data.workers), kind)
            weights = processes.broadcast(weights)
            print(f"class weights ({kind}): " + ", ".join(f"{n} {w:.3g}" for n, w in zip(names, weights, strict=True)))
    if len(weights) != len(names):
        raise UserError(f"--class-weights has {len(weights)} numbers; the data set has {len(names)} classes")
    return torch.tensor(weights, dtype=torch.float32, device=device)

"""Data sets to batches: worker processes, a stream of indices that can be entered at any step, pinned memory.

Every random draw is keyed by (seed, epoch, index), so a batch depends neither on the number of workers nor on
what was drawn before it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ..config import AugmentConfig, Config
from ..distributed import ALONE, Processes, local_size
from ..errors import UserError
from .augment import crop_sample, draw_colour
from .base import Dataset

Key = tuple[int, int]  # epoch, index


@dataclass
class Batch:
    """What one forward pass trains on. `colour` is read on the CPU by `augment.prepare`; the rest goes to the
    device."""

    images: Tensor  # uint8 (N, H, W, 3) RGB
    masks: Tensor  # uint8 (N, H, W)
    colour: Tensor  # float32 (N, 4): `augment.draw_colour`
    index: Tensor  # int64 (N,): of each sample in the data set

    def pin_memory(self) -> Batch:
        """Called by the loader's pinning thread."""
        return Batch(*(tensor.pin_memory() for tensor in (self.images, self.masks, self.colour, self.index)))


def loader_workers(requested: int | None) -> int:
    """Number of processes: as requested, else one a core, 8 at most, and none where there is one core.

    Where several processes train on a machine, they share its cores.
    """
    if requested is not None:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= local_size()
    return min(8, cores) if cores > 1 else 0


def train_batches(
    dataset: Dataset, config: Config, start_step: int, device: torch.device, processes: Processes = ALONE
) -> Iterator[Batch]:
    """The batches of the optimiser steps `start_step` ... `config.optim.steps` - 1, `accumulate` a step.

    The samples are those of epoch 0 in a shuffled order, then of epoch 1 and so on, cut into batches with no
    regard to the epochs' ends: every batch is full, and a data set may be smaller than one. Of several processes
    each has its rows of every batch. Batches are pinned where `device` is a GPU. Raises UserError where a file cannot
    be used.
    """
    optim, seed = config.optim, config.run.seed
    if not len(dataset):
        raise UserError(f"the split {dataset.split} of the data set {dataset.name} is empty")
    batches = range(start_step * optim.accumulate, optim.steps * optim.accumulate)
    keys = _KeyBatches(len(dataset), seed, optim.batch_size, batches, processes.batch_share(optim.batch_size))
    samples = _TrainSamples(dataset, config.augment, seed)
    return _results(samples, keys, config.data.workers, pin=device.type == "cuda")


def eval_samples(
    dataset: Dataset, workers: int | None = None, indices: Sequence[int] | None = None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Each sample in order: its index, image uint8 (H, W, 3), and mask uint8 (H, W) or None where the split
    has none. indices: of the samples; None: all."""
    return _results(_EvalSamples(dataset), range(len(dataset)) if indices is None else indices, workers, pin=False)


class _KeyBatches(Sampler[list[Key]]):
    """The keys of the rows `rows` of the batches numbered `batches`, each (epoch, index)."""

    def __init__(self, count: int, seed: int, batch_size: int, batches: range, rows: range) -> None:
        self.count, self.seed, self.batch_size, self.batches, self.rows = count, seed, batch_size, batches, rows

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, np.int64)
        for batch in self.batches:
            keys = []
            for row in self.rows:
                position = batch * self.batch_size + row
                if position // self.count != epoch:
                    epoch = position // self.count
                    # No sample has the index `count`, so this key is the permutation's own.
                    order = np.random.default_rng([self.seed, epoch, self.count]).permutation(self.count)
                keys.append((epoch, int(order[position % self.count])))
            yield keys


class _TrainSamples(TorchDataset):
    """A list of keys to a Batch, or to the UserError that a file caused."""

    def __init__(self, dataset: Dataset, config: AugmentConfig, seed: int) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed

    def __getitem__(self, keys: Sequence[Key]) -> Batch | UserError:
        height, width = self.config.crop_size
        images = np.empty((len(keys), height, width, 3), np.uint8)
        masks = np.empty((len(keys), height, width), np.uint8)
        colour = np.empty((len(keys), 4), np.float32)
        for row, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng([self.seed, epoch, index])
            try:
                image, mask = self.dataset.load(index)
            except UserError as error:
                return error
            if mask is None:
                name, split = self.dataset.name, self.dataset.split
                return UserError(f"the split {split} of the data set {name} has no masks to train on")
            images[row], masks[row] = crop_sample(image, mask, rng, self.config)
            colour[row] = draw_colour(rng, self.config)
        index = np.array([index for _, index in keys], np.int64)
        return Batch(*map(torch.from_numpy, (images, masks, colour, index)))


class _EvalSamples(TorchDataset):
    """An index to (index, image, mask), or to the UserError that a file caused."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor | None] | UserError:
        try:
            image, mask = self.dataset.load(index)
        except UserError as error:
            return error
        return index, torch.from_numpy(image), None if mask is None else torch.from_numpy(mask)


def _results(samples: TorchDataset, sampler: Sampler | Sequence, workers: int | None, pin: bool) -> Iterator:
    """What `samples` holds for each entry of `sampler`, in order. A UserError among it is raised here.

    An exception raised in a worker would arrive with the worker's traceback as its text, so errors travel as
    results.
    """
    loader = DataLoader(
        samples,
        sampler=sampler,
        batch_size=None,
        num_workers=loader_workers(workers),
        pin_memory=pin,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
    )
    for result in loader:
        if isinstance(result, UserError):
            raise result
        yield result


def _as_it_is(sample: object) -> object:
    return sample


def _start_worker(_: int) -> None:
    """Leave it to the main process to answer Ctrl-C and SIGTERM, which often reach every process of a group.

    A worker that ends before the main process asks it to would be an error there. One that never ends would
    keep the main process from ending: `Process.terminate` sends SIGTERM, too, and the interpreter then waits.
    Only the sender tells the two apart.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # elsewhere torch's own handler stays, which ends the worker
        signal.signal(signal.SIGTERM, lambda *_: None)  # for threads of libraries, which may not block it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process when `parent` sends SIGTERM, or is gone.

    In a thread, as the main one may hang in a read from a file system that does not answer.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)

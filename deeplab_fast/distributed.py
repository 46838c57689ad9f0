"""Several processes, started by torchrun: one a GPU, or some on CPUs. Each computes its share of every batch.

Sums over tensors run on their device (NCCL between GPUs, gloo between CPUs); all else travels over gloo, so that no
process waits for its GPU in order to talk.
"""

from __future__ import annotations

import atexit
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .device import resolve_device
from .errors import UserError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: one of them may write, read a slow disk or download. A process that has
ended is noticed at once, whatever this is."""

T = TypeVar("T")


class Processes:
    """The processes of a job as one of them sees it; of a single one, where every call gives back what it is given.

    rank, size: this process and how many there are; local_rank, local_size: the same on this machine. All processes
    make the same calls in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, store: Any = None):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._store = store

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`resolve_device`; of several processes on a machine each takes the GPU of its local rank."""
        if self.size > 1 and name.startswith("cuda:"):
            raise UserError(f"--device {name}: of several processes each takes a GPU of its own; expected cuda or auto")
        device = resolve_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        if self.local_size > count:
            raise UserError(
                f"{self.local_size} processes on a machine with {count} GPUs: expected --nproc_per_node {count} at "
                "most, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def batch_share(self, batch_size: int) -> range:
        """The rows of every batch that are this process's; shares differ by one row at most."""
        if batch_size < self.size:
            raise UserError(
                f"--batch-size {batch_size} is shared by {self.size} processes: expected an image for each at least"
            )
        return range(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def every(self, count: int) -> range:
        """The items of `count` that are this process's: neighbours, which are often alike, go to different ones."""
        return range(self.rank, count, self.size)

    def sum_(self, x: Tensor) -> Tensor:
        """x, summed over the processes in place; on a GPU the host does not wait."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def post(self, value: int) -> Callable[[], int]:
        """Starts to exchange `value`; what is returned waits for the largest of all processes'."""
        if self.size == 1:
            return lambda: value
        message = torch.tensor(value)
        work = torch.distributed.all_reduce(message, torch.distributed.ReduceOp.MAX, async_op=True)

        def largest() -> int:
            work.wait()
            return int(message)

        return largest

    def any(self, flag: bool) -> bool:
        """Whether it is True in some process."""
        return bool(self.post(int(flag))())

    def broadcast(self, value: T) -> T:
        """What it is in the main process; anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_(self, x: Tensor) -> Tensor:
        """x, with the main process's values in place."""
        if self.size > 1:
            torch.distributed.broadcast(x, src=0)
        return x

    def gather(self, values: list[T]) -> list[T]:
        """In the main process what all have, one process after the other; elsewhere nothing."""
        if self.size == 1:
            return values
        boxes = [None] * self.size if self.is_main else None
        torch.distributed.gather_object(values, boxes, dst=0)
        return [value for box in boxes or () for value in box]

    def one_downloads(self, read: Callable[[], T]) -> T:
        """read(), first by one process of each machine, so that the others find the file."""
        if self.size == 1:
            return read()
        value = read() if self.local_rank == 0 else None
        self.any(False)
        return value if self.local_rank == 0 else read()

    def wrap(self, model: nn.Module, device: torch.device, *, unused: bool = False) -> nn.Module:
        """The model whose backward pass leaves the mean of all processes' gradients in its parameters, from the main
        process's weights on. Buffers stay each process's own. unused: some parameters may take no part in the loss,
        which costs a walk over the graph in every step."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # A depthwise weight's gradient has strides of its own for a dimension of 1; the memory is the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False, "gradient_as_bucket_view": True}
        options["find_unused_parameters"] = unused
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)

    def first_to_fail(self) -> bool:
        """True in one process only, in which the job's error is to be told."""
        if self._store is None:
            return True
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # whoever kept the store is gone
            return True

    def close(self) -> None:
        """The end of a job that all processes reach."""
        if self.size > 1:
            self.any(False)  # nobody leaves while another still has something to say
            torch.distributed.destroy_process_group()

    def leave(self, status: int) -> NoReturn:
        """Ends this process after `close`, without taking the interpreter down.

        DistributedDataParallel keeps gloo's threads alive, and one that lets go of a tensor while the interpreter is
        being finalised aborts the process (pytorch/pytorch#190489): once in a few dozen jobs on busy cores.
        """
        atexit._run_exitfuncs()
        self.abandon(status)

    def abandon(self, status: int) -> NoReturn:
        """Ends this process at once: the others notice, and nothing here waits for them."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


ALONE = Processes()
"""A job of one process."""


def local_size() -> int:
    """The number of this job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start() -> Processes:
    """The processes that torchrun's environment tells of, connected; `ALONE`, and nothing done, where it is one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {size} and {missing[0]} is not set: start several processes with torchrun")
    distributed = torch.distributed
    if not distributed.is_available():
        raise UserError(f"WORLD_SIZE is {size}, but this torch was built without torch.distributed")
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    store, rank, size = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    store = distributed.PrefixStore("deeplab_fast", store)
    return Processes(rank, size, int(os.environ["LOCAL_RANK"]), local_size(), store)


def lost_contact(error: BaseException) -> bool:
    """Whether `error` is what gloo or NCCL say when another process has ended."""
    known = ("closed by peer", "reset by peer", "Broken pipe", "ncclRemoteError", "Socket Timeout", "Timed out")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in known)

"""Activation checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): blocks that run again
in the backward pass, so that only their inputs are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """block(x); with `recompute`, what is inside is not kept for the gradient but computed again."""
    if not (recompute and torch.is_grad_enabled()):
        return block(x)
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(block))
    )


def run_stage(stage: nn.Sequential, x: Tensor, recompute: bool) -> Tensor:
    """stage(x), block by block with `recompute`."""
    if not recompute:
        return stage(x)
    for block in stage:
        x = run_block(block, x, recompute)
    return x


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The first pass has moved the running statistics; here batch norms move others, which nobody reads.

    Not by track_running_stats: torch's batch norm would keep fewer tensors for its gradient than it did.
    """
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    kept = [norm._buffers for norm in norms]
    for norm in norms:
        norm._buffers = {name: torch.empty_like(buffer) for name, buffer in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers = buffers

"""An order statistic of values that several processes hold, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import Processes

_DIGITS = ((21, 11), (10, 11), (0, 10))  # lowest bit and width of each, from the most significant on


@torch.no_grad()
def largest_of_all(values: Tensor, share: float, processes: Processes) -> Tensor:
    """fp32 (): the smallest of the largest `share` of all processes' values; infinite where that is none of them.

    values: fp32 of any shape, of any number in each process; a NaN counts as infinite. Exact, by three histograms of
    2,048 bins over the digits of the values' bit patterns, summed over the processes: three messages of at most 16 KiB,
    and no host synchronisation.
    """
    bits = values.flatten().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32).long()
    keys = _flipped(bits) + 2**31  # in the order of the values
    chosen, left, total = keys.new_zeros(()), None, None  # the digits found so far
    for low, width in _DIGITS:
        digit = (keys >> low) & (2**width - 1)
        candidate = (keys >> (low + width)) == chosen
        counts = keys.new_zeros(2**width).scatter_add_(0, digit, candidate.long())
        reached = processes.sum_(counts).flip(0).cumsum(0).flip(0)  # values of this digit or a larger one
        if left is None:
            total = reached[0]
            left = (total.double() * share).round().long()
        found = ((reached >= left).sum() - 1).clamp(min=0)
        # Not [found]: torch would read it on the host.
        left = left - (reached - counts).gather(0, found[None])[0]
        chosen = chosen << width | found
    value = _flipped(chosen - 2**31).int().view(torch.float32)
    return torch.where((total.double() * share).round() > 0, value, torch.inf)


def _flipped(bits: Tensor) -> Tensor:
    """A float's bit pattern to a number of the same order, and back: those of negative floats fall as they rise."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

"""A last line that says how many backend cases were skipped, so that green is not taken for covered."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from deeplab_fast.testing import SKIPPED_BACKEND


def pytest_configure() -> None:
    torch.backends.cudnn.allow_tf32 = False  # on a GPU a reference in fp32 would else convolve in less


def backend_summary(reasons: list[str]) -> str:
    """How many of the skipped tests were backend cases, by reason; empty where none was."""
    counts = Counter(r.partition(SKIPPED_BACKEND)[2].strip() for r in reasons if SKIPPED_BACKEND in r)
    listed = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return f"{counts.total()} backend cases skipped ({listed})" if counts else ""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if line := backend_summary([report.longrepr[2] for report in skipped]):
        terminalreporter.write_line(line)

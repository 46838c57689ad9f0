"""torchvision beside a CPU build of torch, and a last line that says how many backend cases were skipped.

So green is not taken for covered.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture(scope="session")
def torchvision_imports() -> None:
    """Beside a CPU build of torch, torchvision's wheel imports only once its operators are declared."""
    data = os.environ.get("DEEPLAB_FAST_TEST_DATA")
    path = Path(data or "") / "peers" / "torchvision_beside_cpu_torch.py"
    if data and path.is_file() and torch.version.cuda is None and path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        # The declarations live as long as the module.
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])

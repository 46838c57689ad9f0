"""torchvision beside a CPU build of torch, and a last line that says how many backend cases were skipped.

So green is not taken for covered.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplab_fast.ops import native
from deeplab_fast.testing import SKIPPED_BACKEND
from tests.interpreted import INTERPRET


def pytest_configure() -> None:
    torch.backends.cudnn.allow_tf32 = False  # on a GPU a reference in fp32 would else convolve in less


def pytest_collection_finish() -> None:
    if INTERPRET:  # which makes objects by the million and few cycles: a sixth of its time was looking for them
        gc.freeze()
        gc.set_threshold(100_000)


def backend_summary(skipped: list[tuple[str, str]]) -> str:
    """Of skipped tests, (file, reason): how many were backend cases, by reason, and which ops that were; or empty."""
    cases = [
        (path, reason.partition(SKIPPED_BACKEND)[2].strip()) for path, reason in skipped if SKIPPED_BACKEND in reason
    ]
    if not cases:
        return ""
    lines = [f"{len(cases)} backend cases skipped"]
    for reason, count in sorted(Counter(reason for _, reason in cases).items()):
        ops = sorted({Path(path).stem.removeprefix("test_") for path, why in cases if why == reason})
        lines.append(f"  {count} {reason}: {', '.join(ops)}")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if text := backend_summary([(report.nodeid.partition("::")[0], report.longrepr[2]) for report in skipped]):
        terminalreporter.write_line(text)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels of each instruction set that this processor has, in turn."""
    module = native.load()
    if module is None:
        pytest.skip(native.NOT_BUILT)
    if request.param not in module.instruction_sets():
        pytest.skip(f"this processor or this build has no {request.param}")
    before = module.instruction_set()
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(before)


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

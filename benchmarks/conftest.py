"""What every benchmark shares: warm memory, the machine's own roof, and a check before any time.

`timed` verifies a variant, times it with pytest-benchmark and remembers it. With --save-results `ratios.py`
runs every group again with its variants interleaved, and writes results/<device>.json.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.ratios import ROUNDS, WARM_UP, Variant, save, seconds
from benchmarks.shapes import TINY

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
ROOF_BYTES = 1 << (16 if TINY else 28)


GROUPS: dict[str, dict[str, Variant]] = defaultdict(dict)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--save-results", action="store_true", help="write results/<device>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.roof = None
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        # Fresh pages of large results cost more than the ops: keep freed memory, for every variant alike.
        libc = ctypes.CDLL(None)
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD):
            if libc.mallopt(option, 1 << 30) != 1:
                raise pytest.UsageError(f"mallopt({option}, 1 << 30) was refused")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(name)


def median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    for _ in range(WARM_UP):
        run()
    return statistics.median(seconds(run, device) for _ in range(3 * ROUNDS))


@pytest.fixture(scope="session")
def roof(device: torch.device, pytestconfig: pytest.Config) -> dict[str, float]:
    """This device in this run: copy_gb_s counts bytes read and written, matmul_tflop_s is bf16."""
    source = torch.zeros(ROOF_BYTES, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    n = 64 if TINY else 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    pytestconfig.roof = {
        "copy_gb_s": 2 * ROOF_BYTES / median_seconds(lambda: copy.copy_(source), device) / 1e9,
        "matmul_tflop_s": 2 * n**3 / median_seconds(lambda: a @ a, device) / 1e12,
    }
    return pytestconfig.roof


@pytest.fixture
def timed(benchmark: Any, device: torch.device, roof: dict[str, float]) -> Callable[..., None]:
    """`timed(group, variant, run, check, bytes_moved)`.

    run: computes the result; check: raises where that result is wrong, so that no time is printed for it
    bytes_moved: what has to be read and written at least; GB/s and the share of the copy bandwidth follow
    """

    def measure(
        group: str,
        variant: str,
        run: Callable[[], Any],
        check: Callable[[Any], None],
        bytes_moved: int,
    ) -> None:
        check(run())
        synchronised = run
        if device.type == "cuda":

            def synchronised() -> None:
                run()
                torch.cuda.synchronize(device)

        benchmark.group = group
        benchmark.pedantic(synchronised, rounds=3 * ROUNDS, warmup_rounds=WARM_UP)
        if benchmark.stats is not None:  # None under --benchmark-disable
            rate = bytes_moved / benchmark.stats.stats.median / 1e9
            benchmark.extra_info["gb_s"] = round(rate, 2)
            benchmark.extra_info["share_of_copy"] = round(rate / roof["copy_gb_s"], 3)
        GROUPS[group][variant] = Variant(run, bytes_moved)

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.roof is None:
        return
    terminalreporter.write_line(
        f"copy bandwidth {config.roof['copy_gb_s']:.1f} GB/s (read + write), "
        f"bf16 matrix product {config.roof['matmul_tflop_s']:.2f} TFLOP/s, in this run"
    )
    if config.getoption("--save-results"):
        path = save(GROUPS, config.roof, torch.device(config.getoption("--device")))
        terminalreporter.write_line(f"wrote {path.relative_to(config.rootpath)}")

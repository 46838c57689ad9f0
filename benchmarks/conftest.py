"""What every benchmark shares: warm memory, the machine's own roof, and a check before any time.

`timed` verifies a variant, times it with pytest-benchmark, then cold (its results in fresh pages), and remembers it.
With --save-results `ratios.py` runs every group again with its variants interleaved, and writes results/<device>.json.
"""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo

from benchmarks.ratios import ROUNDS, WARM_UP, Variant, cold_seconds, copying, peak_bytes, save, seconds
from benchmarks.shapes import TINY, use_gpu_sizes
from deeplab_fast.device import set_allocator

ROOF_BYTES = 1 << (17 if TINY else 29)  # read and written by the copy: more than any cache holds

GROUPS: dict[str, dict[str, Variant]] = defaultdict(dict)
ROWS: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)  # what the second table shows


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--save-results", action="store_true", help="write results/<device>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.roof = None
    if config.getoption("--device") == "cuda":
        use_gpu_sizes()
    # A compiled function that meets its ninth shape would else be eager from there on, under the name "compile".
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Fresh pages of large results cost more than the ops, for every variant alike.
    config.keeps_freed_memory = set_allocator()


def pytest_report_header(config: pytest.Config) -> str:
    if config.keeps_freed_memory:
        return "allocator: keeps freed memory"
    return "allocator: refused to keep freed memory, so that times of large results hold those of fresh pages"


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
def copy_gb_s(device: torch.device) -> Callable[[int], float]:
    """`copy_gb_s(bytes_moved)`: the rate in this run of a copy that reads and writes so many bytes in all."""

    @functools.cache
    def rate(bytes_moved: int) -> float:
        copy = copying(bytes_moved, device)
        return copy.bytes_moved / median_seconds(copy.run, device) / 1e9

    return rate


@pytest.fixture(scope="session")
def roof(device: torch.device, copy_gb_s: Callable[[int], float], pytestconfig: pytest.Config) -> dict[str, float]:
    """This device's memory and arithmetic in this run: copy_gb_s is read and written, matmul_tflop_s is bf16."""
    n = 64 if TINY else 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    pytestconfig.roof = {
        "copy_gb_s": copy_gb_s(ROOF_BYTES),
        "matmul_tflop_s": 2 * n**3 / median_seconds(lambda: a @ a, device) / 1e12,
    }
    return pytestconfig.roof


def in_present_mode(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as it would run here: --save-results calls it again when the benchmark's no_grad() is long over."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def same() -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
            return run()

    return same


@pytest.fixture
def timed(
    benchmark: Any, device: torch.device, roof: dict[str, float], copy_gb_s: Callable[[int], float]
) -> Callable[..., None]:
    """`timed(group, variant, run, check, bytes_moved)`.

    run: computes the result; check: raises where that result is wrong, so that no time is printed for it
    bytes_moved: what has to be read and written at least; GB/s and the share of a copy of as many follow
    """

    def measure(
        group: str,
        variant: str,
        run: Callable[[], Any],
        check: Callable[[Any], None],
        bytes_moved: int,
    ) -> None:
        run = in_present_mode(run)
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
            benchmark.extra_info["share_of_copy"] = round(rate / copy_gb_s(bytes_moved), 3)
            ROWS[group][variant] = {
                "ms": benchmark.stats.stats.median * 1e3,
                **benchmark.extra_info,
                "cold_ms": cold_seconds(run) * 1e3 if device.type == "cpu" else None,
                "peak_mb": peak / 1e6 if (peak := peak_bytes(run, device)) is not None else None,
            }
        GROUPS[group][variant] = Variant(run, bytes_moved)

    return measure


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Per group and variant: warm, how many times ours, rate, share of a copy, cold, and a call's peak memory."""
    lines = [f"{'':<14}{'warm ms':>10}{'x ours':>9}{'GB/s':>9}{'of copy':>9}{'cold ms':>10}{'peak MB':>10}"]
    for group, variants in rows.items():
        lines.append(group)
        ours = variants.get("native", {}).get("ms")
        for name, row in variants.items():
            ratio = "" if ours is None else f"{row['ms'] / ours:.2f}"
            cold, peak = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("cold_ms", "peak_mb"))
            share = f"{row['share_of_copy']:.0%}"
            lines.append(f"  {name:<12}{row['ms']:>10.3f}{ratio:>9}{row['gb_s']:>9.1f}{share:>9}{cold:>10}{peak:>10}")
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.roof is None:
        return
    for line in table(ROWS) if ROWS else ():
        terminalreporter.write_line(line)
    terminalreporter.write_line(
        f"copy bandwidth of the memory {config.roof['copy_gb_s']:.1f} GB/s (read + write), "
        f"bf16 matrix product {config.roof['matmul_tflop_s']:.2f} TFLOP/s, in this run"
    )
    if config.getoption("--save-results"):
        device = torch.device(config.getoption("--device"))
        path = save(GROUPS, config.roof, device, config.keeps_freed_memory)
        terminalreporter.write_line(f"wrote {path.relative_to(config.rootpath)}")

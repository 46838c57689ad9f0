"""What every benchmark shares: warm memory, the machine's own roof, and a check before any time.

`timed` verifies a variant, times it with pytest-benchmark, then cold, and remembers it. With --save-results `ratios.py`
runs each group again once its last variant is through, all of them interleaved, and writes results/<device>.json. On a
GPU what torch.compile made runs in two modes, the second under the name "compile_max".
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo

from benchmarks.ratios import (
    ROUNDS,
    WARM_UP,
    Variant,
    ceilings,
    cold_seconds,
    copying,
    in_present_mode,
    median_seconds,
    ours,
    peak_bytes,
    save,
)
from benchmarks.shapes import TINY, use_gpu_sizes
from deeplab_fast.device import set_allocator

# Read and written by the copy: more than any cache holds.
ROOF_BYTES = {"cpu": 1 << (17 if TINY else 29), "cuda": 1 << (17 if TINY else 33)}
ROOF_SIDE = {"cpu": 64 if TINY else 1024, "cuda": 64 if TINY else 8192}

GROUPS: dict[str, dict[str, Variant]] = defaultdict(dict)  # those that are yet to be interleaved
ROWS: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)  # what the second table shows
FAILED: dict[str, str] = {}  # group to the reason why it was not interleaved


class BothModes:
    """What torch.compile returns on a GPU: the function compiled in both modes, each when it is first called.

    No CUDA graph of torch's own: `capture.py` makes one of every variant.
    """

    mode = "default"

    def __init__(self, compiler: Callable[..., Any], function: Callable[..., Any], **options: Any) -> None:
        modes = {"default": None, "max": "max-autotune-no-cudagraphs"}
        self.compiled = {name: compiler(function, mode=mode, **options) for name, mode in modes.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled[BothModes.mode](*args, **kwargs)


def in_max_mode(run: Callable[[], Any]) -> Callable[[], Any]:
    def tuned() -> Any:
        BothModes.mode = "max"
        try:
            return run()
        finally:
            BothModes.mode = "default"

    return tuned


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--save-results", action="store_true", help="write results/<device>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.roof = config.saved = None
    if config.getoption("--device") == "cuda":
        use_gpu_sizes()
        torch.compile = functools.partial(BothModes, torch.compile)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for the expected results above all
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


@pytest.fixture(scope="session")
def copy_gb_s(device: torch.device) -> Callable[[int], float]:
    """`copy_gb_s(bytes_moved)`: the rate in this run of a copy that reads and writes so many bytes in all."""

    @functools.cache
    def rate(bytes_moved: int) -> float:
        copy = copying(bytes_moved, device)
        return copy.bytes_moved / median_seconds(copy.run, device) / 1e9

    return rate


@pytest.fixture(scope="session")
def roof(device: torch.device, pytestconfig: pytest.Config) -> dict[str, float]:
    """This device's memory and arithmetic in this run: copy_gb_s is read and written, matmul_tflop_s is bf16."""
    pytestconfig.roof = ceilings(device, ROOF_BYTES[device.type], ROOF_SIDE[device.type])
    return pytestconfig.roof


def finish(config: pytest.Config) -> None:
    """Interleaves and saves the groups that are complete; one that fails is remembered, and the others go on."""
    if not config.getoption("--save-results"):
        GROUPS.clear()
    device = torch.device(config.getoption("--device"))
    for group in list(GROUPS):
        variants = GROUPS.pop(group)
        try:
            config.saved = save(
                {group: variants}, config.roof, device, config.keeps_freed_memory, fresh=starts_anew(config, device)
            )
        except (AssertionError, RuntimeError) as error:
            FAILED[group] = f"{type(error).__name__}: {error}".partition("\n")[0]


def starts_anew(config: pytest.Config, device: torch.device) -> bool:
    """A CPU's file is of one run; a GPU's is made of many, each of some of the benchmarks."""
    return device.type == "cpu" and config.saved is None


@pytest.fixture
def timed(
    benchmark: Any,
    device: torch.device,
    roof: dict[str, float],
    copy_gb_s: Callable[[int], float],
    pytestconfig: pytest.Config,
) -> Callable[..., None]:
    """`timed(group, variant, run, check, bytes_moved)`; a group's variants come one after the other.

    run: computes the result; check: raises where that result is wrong, so that no time is printed for it
    bytes_moved: what has to be read and written at least; GB/s and the share of a copy of as many follow
    flops: of matrix products that may bind instead; their share of the matrix rate follows, on a GPU
    """

    def measure(
        group: str,
        variant: str,
        run: Callable[[], Any],
        check: Callable[[Any], None],
        bytes_moved: int,
        flops: int = 0,
    ) -> None:
        if group not in GROUPS:  # the one before is complete
            finish(pytestconfig)
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
                "cold_ms": cold_seconds(run, device) * 1e3,
                "peak_mb": peak / 1e6 if (peak := peak_bytes(run, device)) is not None else None,
            }
        GROUPS[group][variant] = Variant(run, bytes_moved, check, flops)
        if device.type == "cuda" and variant.endswith("compile") and bytes_moved:  # 0: a network, tuned for minutes
            tuned = in_max_mode(run)
            check(tuned())
            GROUPS[group][f"{variant}_max"] = Variant(tuned, bytes_moved, check, flops)

    return measure


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Per group and variant: warm, how many times ours, rate, share of a copy, cold, and a call's peak memory."""
    lines = [f"{'':<14}{'warm ms':>10}{'x ours':>9}{'GB/s':>9}{'of copy':>9}{'cold ms':>10}{'peak MB':>10}"]
    for group, variants in rows.items():
        lines.append(group)
        mine = variants.get(ours(variants), {}).get("ms")
        for name, row in variants.items():
            ratio = "" if mine is None else f"{row['ms'] / mine:.2f}"
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
    for group, reason in FAILED.items():
        terminalreporter.write_line(f"FAILED to interleave {group}: {reason}")
    if config.saved:
        terminalreporter.write_line(f"wrote {config.saved.name}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    finish(session.config)
    if FAILED and session.exitstatus == 0:
        session.exitstatus = 1

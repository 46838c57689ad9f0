"""Ratios of interleaved variants, and the JSON that holds them with the device and the versions.

python -m benchmarks.ratios SINCE PART=OUTCOME... adds what became of the parts of run_on_gpu.sh, begun at
SINCE (seconds of the epoch), to the JSON of the first GPU. Where none was written since, it has no results.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.shapes import TINY
from deeplab_fast import __version__
from deeplab_fast.device import set_allocator
from deeplab_fast.info import cpu_name, version_of
from deeplab_fast.ops import native

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results"
ROUNDS = 1 if TINY else 5
WARM_UP = 1 if TINY else 12
ROUND_SECONDS = 0.0 if TINY else 0.05  # of one variant in one round, at least


class Variant(NamedTuple):
    run: Callable[[], Any]
    bytes_moved: int


def copying(bytes_moved: int, device: torch.device) -> Variant:
    """What the share of the copy bandwidth is a share of: a copy that reads and writes as many bytes in all.

    The same working set lies in the same cache. Reading alone, as an op may that writes little, can exceed it.
    """
    source = torch.zeros(max(1, bytes_moved // 2), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return Variant(lambda: copy.copy_(source), 2 * source.numel())


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Wall-clock time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def cold_seconds(run: Callable[[], Any]) -> float:
    """Median of single calls whose results lie in fresh pages, as in a process that leaves glibc's allocator alone."""
    set_allocator(keep=False)
    try:
        return statistics.median(seconds(run, CPU) for _ in range(ROUNDS))
    finally:
        set_allocator()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """What one call needs beyond what lies in memory already, its result included; None where the system hides it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    run()  # reads in what it needs of torch
    set_allocator(keep=False)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None
    finally:
        set_allocator()


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def interleave(variants: Mapping[str, Variant], ours: str, device: torch.device) -> dict[str, Any]:
    """Five rounds after a dozen warm-ups, all variants in each: medians, and medians of the ratios.

    variants: one of them named "copy"
    ratio: the variant's time over that of `ours` in the same round; above 1, ours is faster
    share_of_copy: the variant's rate over the copy's
    cold_ms: where results lie in fresh pages, on a CPU; peak_mb: see `peak_bytes`
    """
    calls = {}
    for name, variant in variants.items():
        for _ in range(WARM_UP):
            variant.run()
        calls[name] = max(1, int(ROUND_SECONDS / seconds(variant.run, device)))
    rounds = [{n: seconds(v.run, device, calls[n]) for n, v in variants.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in variants}
    rates = {name: variant.bytes_moved / medians[name] for name, variant in variants.items()}
    rows = {}
    for name in variants:
        rows[name] = {
            "median_ms": round(medians[name] * 1e3, 4),
            "ratio": round(statistics.median(times[name] / times[ours] for times in rounds), 2),
            "gb_s": round(rates[name] / 1e9, 2),
            "share_of_copy": round(rates[name] / rates["copy"], 3),
        }
        if device.type == "cpu":
            rows[name]["cold_ms"] = round(cold_seconds(variants[name].run) * 1e3, 4)
        if (peak := peak_bytes(variants[name].run, device)) is not None:
            rows[name]["peak_mb"] = round(peak / 1e6, 2)
    return rows


def commit() -> str | None:
    """Short hash, with -dirty where anything but results has changed since; None outside a repository."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)

    head = git("rev-parse", "--short", "HEAD")
    if head.returncode != 0:
        return None
    changes = git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS.name}")
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() or changes.returncode != 0 else "")


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader has to know to judge the numbers; nothing of whose machine it is."""
    versions = {"deeplab_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version_of(name) for name in ("triton", "numpy")},
        "native": native.status(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def results_path(device_name: str) -> Path:
    """results/<device>.json; results of tiny shapes lie beside it and are not to be committed."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return RESULTS / f"{slug}{'_tiny' if TINY else ''}.json"


def save(
    groups: Mapping[str, Mapping[str, Variant]],
    roof: Mapping[str, float],
    device: torch.device,
    keeps_freed_memory: bool,
) -> Path:
    """Runs every group interleaved against its variant `native` and writes the JSON. Returns its path.

    A copy that moves as many bytes runs in the same rounds as the variant `copy`.
    """
    results = {}
    for group, variants in groups.items():
        if "native" in variants:
            copy = copying(variants["native"].bytes_moved, device)
            results[group] = interleave({**variants, "copy": copy}, "native", device)
    about = describe(device) | {"keeps_freed_memory": keeps_freed_memory}
    about |= {"roof": {name: round(rate, 3) for name, rate in roof.items()}, "results": results}
    path = results_path(about["device"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    return path


def main(since: str, *parts: str) -> None:
    about = describe(torch.device("cuda", 0))
    path = results_path(about["device"])
    if path.exists() and path.stat().st_mtime >= int(since):
        about = json.loads(path.read_text())
    about["parts"] = dict(part.split("=", 1) for part in parts)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])

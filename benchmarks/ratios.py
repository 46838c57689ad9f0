"""Ratios of interleaved variants, and the JSON that holds them with the device and the versions.

On a GPU each call is also captured in a CUDA graph and replayed, as the variant "<name>+graph"; times are taken between
events around many calls, and `cold_ms` between events around one whose data the L2 cache holds nothing of.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import capture
from benchmarks.shapes import TINY
from deeplab_fast import __version__
from deeplab_fast.device import set_allocator
from deeplab_fast.info import cpu_name, version_of
from deeplab_fast.ops import native

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent
RESULTS = Path(os.environ.get("DEEPLAB_FAST_RESULTS") or FOLDER / "results")
MERGED = ("roof", "results", "parts", "cudnn", "failed")  # what a later run adds to, entry by entry
OURS = ("native", "triton")  # the first of these in a group is what the others are compared with
ROUNDS = 1 if TINY else 5
WARM_UP = 1 if TINY else 12
# Of one variant in one round, at least. A GPU's clock is steadier, and its benchmarks have more variants.
ROUND_SECONDS = {"cpu": 0.0 if TINY else 0.05, "cuda": 0.0 if TINY else 0.02}
FLUSH_BYTES = 1 << (20 if TINY else 30)  # several times any L2, and long enough to queue the next call behind


class Variant(NamedTuple):
    run: Callable[[], Any]
    bytes_moved: int
    check: Callable[[Any], None] | None = None  # raises where the result is wrong
    flops: int = 0  # of matrix products, where these and not the bytes may bind


def ours(variants: Mapping[str, Any]) -> str | None:
    return next((name for name in OURS if name in variants), None)


def in_present_mode(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as it would run here: it is called again when the benchmark's no_grad() is long over."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def same() -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
            return run()

    return same


def copying(bytes_moved: int, device: torch.device) -> Variant:
    """What the share of the copy bandwidth is a share of: a copy that reads and writes as many bytes in all.

    The same working set lies in the same cache. Reading alone, as an op may that writes little, can exceed it.
    """
    source = torch.zeros(max(1, bytes_moved // 2), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        source.random_()  # zeros cost less power, and may be faster for it
    copy = torch.empty_like(source)
    return Variant(lambda: copy.copy_(source), 2 * source.numel())


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begun) / calls


def cold_seconds(run: Callable[[], Any], device: torch.device = CPU) -> float:
    """Median of single calls.

    On a CPU their results lie in fresh pages, as in a process that leaves glibc's allocator alone. On a GPU the L2 is
    overwritten before each, and the call is queued while that lasts, so that its launch costs nothing.
    """
    if device.type == "cuda":
        return _uncached_seconds(run, _flush(device))
    set_allocator(keep=False)
    try:
        return statistics.median(seconds(run, device) for _ in range(ROUNDS))
    finally:
        set_allocator()


@functools.cache
def _flush(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def _uncached_seconds(run: Callable[[], Any], flush: torch.Tensor) -> float:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(3 * ROUNDS)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(flush.device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def ceilings(device: torch.device, copy_bytes: int, n: int) -> dict[str, float]:
    """What binds: a large copy, read and written, and a bf16 product of two n x n matrices, of random numbers."""
    copy = copying(copy_bytes, device)
    copy_gb_s = copy.bytes_moved / median_seconds(copy.run, device) / 1e9
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return {"copy_gb_s": copy_gb_s, "matmul_tflop_s": 2 * n**3 / median_seconds(lambda: a @ b, device) / 1e12}


def median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    for _ in range(WARM_UP):
        run()
    return statistics.median(seconds(run, device) for _ in range(3 * ROUNDS))


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


def interleave(
    variants: Mapping[str, Variant], mine: str, device: torch.device, roof: Mapping[str, float]
) -> dict[str, Any]:
    """Five rounds after a dozen warm-ups, all variants in each: medians, and medians of the ratios.

    variants: one of them named "copy"
    ratio: the variant's time over that of `mine` in the same round; above 1, mine is faster
    share_of_copy: the variant's rate over the copy's
    cold_ms: see `cold_seconds`; peak_mb: see `peak_bytes`
    and on a GPU, see `_of_roof`
    """
    calls = {}
    for name, variant in variants.items():
        for _ in range(WARM_UP):
            variant.run()
        calls[name] = max(1, int(ROUND_SECONDS[device.type] / seconds(variant.run, device)))
    rounds = [{n: seconds(v.run, device, calls[n]) for n, v in variants.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in variants}
    rates = {name: variant.bytes_moved / medians[name] for name, variant in variants.items()}
    rows = {}
    for name, variant in variants.items():
        rows[name] = {
            "median_ms": round(medians[name] * 1e3, 4),
            "ratio": round(statistics.median(times[name] / times[mine] for times in rounds), 2),
            "gb_s": round(rates[name] / 1e9, 2),
            "share_of_copy": round(rates[name] / rates["copy"], 3),
        }
        cold = cold_seconds(variant.run, device)
        rows[name]["cold_ms"] = round(cold * 1e3, 4)
        if device.type == "cuda":
            rows[name] |= _of_roof(variant, medians[name], cold, roof, device)
        if not name.endswith("+graph") and (peak := peak_bytes(variant.run, device)) is not None:
            rows[name]["peak_mb"] = round(peak / 1e6, 2)
    return rows


def _of_roof(
    variant: Variant, warm: float, cold: float, roof: Mapping[str, float], device: torch.device
) -> dict[str, Any]:
    """Shares of the large copy's rate and of the matrix product's, in the cold call where the L2 holds all of it."""
    cached = variant.bytes_moved < torch.cuda.get_device_properties(device).L2_cache_size
    rate = 1 / (cold if cached else warm)
    shares: dict[str, Any] = {"fits_l2": True} if cached else {}
    if variant.bytes_moved:
        shares["share_of_roof"] = round(variant.bytes_moved * rate / 1e9 / roof["copy_gb_s"], 3)
    if variant.flops:
        shares["share_of_matmul"] = round(variant.flops * rate / 1e12 / roof["matmul_tflop_s"], 3)
    return shares


def commit() -> str | None:
    """Short hash, with -dirty where anything but results has changed since; outside a repository what
    DEEPLAB_FAST_COMMIT says, for a copy of the tree without its history, else None."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True)

    if shutil.which("git") is None or (head := git("rev-parse", "--short", "HEAD")).returncode != 0:
        return os.environ.get("DEEPLAB_FAST_COMMIT") or None
    changes = git("status", "--porcelain", "--", ":/", ":(exclude)results")
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() or changes.returncode != 0 else "")


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader has to know to judge the numbers; nothing of whose machine it is."""
    versions = {"deeplab_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        **(_describe_gpu(device) if device.type == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version_of(name) for name in ("triton", "numpy")},
        "native": native.status(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    chip = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return {
        "chip": f"sm_{chip.major}{chip.minor}, {chip.multi_processor_count} multiprocessors",
        "memory_gb": round(chip.total_memory / 1e9, 1),
        "l2_mb": round(chip.L2_cache_size / 1e6, 1),
        "driver": answer.partition("\n")[0].strip() or "unknown",
        "cuda": torch.version.cuda,
        "cudnn_version": torch.backends.cudnn.version(),
    }


def results_path(device_name: str) -> Path:
    """results/<device>.json; results of tiny shapes lie beside it and are not to be committed."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return RESULTS / f"{slug}{'_tiny' if TINY else ''}.json"


def merge(about: Mapping[str, Any], *, fresh: bool = False) -> Path:
    """Puts `about` into the JSON of its device: MERGED entry by entry, the rest in place of what was there.

    fresh: nothing is kept, and neither is it where the file was measured with other versions. Returns the path.
    """
    path = results_path(about["device"])
    old = json.loads(path.read_text()) if path.exists() and not fresh else {}
    if old.get("versions") != about["versions"]:
        old = {}
    together = {key: old.get(key, {}) | about.get(key, {}) for key in MERGED if key in old or key in about}
    text = json.dumps({**old, **about, **together}, indent=1)
    text = re.sub(r"\{[^{}]*\}", lambda inner: re.sub(r"\s*\n\s*", " ", inner[0]), text)  # a row a line
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")  # a part may be stopped while it writes
    half.write_text(text + "\n")
    half.replace(path)
    return path


def save(
    groups: Mapping[str, Mapping[str, Variant]],
    roof: Mapping[str, float],
    device: torch.device,
    keeps_freed_memory: bool,
    *,
    fresh: bool = False,
) -> Path:
    """Runs every group interleaved against ours, which is `native` where it has that, and merges into the JSON.

    A copy that moves as many bytes runs in the same rounds as the variant `copy`. Returns the JSON's path.
    """
    results = {}
    for group, variants in groups.items():
        if mine := ours(variants):
            graphs, refused = capture.graphs(variants, device) if device.type == "cuda" else ({}, {})
            copy = copying(variants[mine].bytes_moved, device)
            results[group] = interleave({**variants, **graphs, "copy": copy}, mine, device, roof) | refused
    about = describe(device) | {"keeps_freed_memory": keeps_freed_memory}
    about |= {"roof": {name: round(rate, 3) for name, rate in roof.items()}, "results": results}
    return merge(about, fresh=fresh)

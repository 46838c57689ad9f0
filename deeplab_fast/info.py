"""python -m deeplab_fast.info: versions, devices, and which backend runs which op, and why not."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from . import __version__
from .ops import dispatch, native
from .testing import backend_why_not, device_why_not


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_lines() -> list[str]:
    """Everything whose version matters in a report of a fault."""
    cuda = torch.version.cuda or torch.version.hip or "none"
    lines = [f"deeplab_fast {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"torch {torch.__version__} (CUDA: {cuda})"]
    return lines + [f"{package} {version_of(package)}" for package in ("triton", "numpy")]


def device_lines() -> list[str]:
    """The processor, and each GPU that torch sees or why there is none."""
    sets = module.instruction_sets() if (module := native.load()) else []
    built = f"; kernels for {', '.join(sets)}, {module.instruction_set()} in use" if module else ""
    lines = [f"cpu: {cpu_name()}, {torch.get_num_threads()} threads{built}"]
    if reason := device_why_not("cuda"):
        return [*lines, f"cuda: none, {reason}"]
    for index in range(torch.cuda.device_count()):
        chip = torch.cuda.get_device_properties(index)
        memory = f"{chip.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}: {chip.name}, sm_{chip.major}{chip.minor}, {memory}")
    return lines


def backend_rows() -> list[tuple[str, str, str, str]]:
    """(op, device, backend, answer): "auto" runs unasked, "yes" runs when named, else why not."""
    rows = []
    for name, op in dispatch.OPS.items():
        for kind in ("cpu", "cuda"):
            device = torch.device(kind)
            chosen = None
            if device_why_not(kind) is None:
                chosen = dispatch.choose(name, list(op.example(device)))
            for backend in op.backends:
                reason = backend_why_not(name, backend, kind)
                answer = f"no: {reason}" if reason else "auto" if backend == chosen else "yes"
                rows.append((name, kind, backend, answer))
    return rows


def main() -> None:
    rows = [("op", "device", "backend", "runs"), *backend_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    print("\n".join([*version_lines(), native.status(), "", *device_lines(), "", *table]))


if __name__ == "__main__":
    main()

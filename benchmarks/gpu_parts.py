"""The parts of run_on_gpu.sh: each a command with a limit, whose outcome goes into the JSON of the first GPU."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ratios
from benchmarks.shapes import GPU_SIZES
from deeplab_fast.testing import device_why_not

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 460  # seconds: one part and the machine's start fit into ten minutes
GRACE = 10  # seconds between asking a part to stop and killing it
LIMIT_VARIABLE = "DEEPLAB_FAST_PART_SECONDS"  # in place of every part's own

# Part, and how the ops begin whose tests it runs; the last takes the rest.
TESTS = {
    "convolutions": ("depthwise", "separable"),
    "norm": ("batch_norm",),
    "upsample": ("upsample",),
    "others": ("",),
}
HALVES = {"": "not (fp32 or float32)", "-fp32": "fp32 or float32"}  # of an op's benchmark; bf16 is what matters
ONE_HALF = ("augment_image", "confusion_matrix", "kth_largest")  # of one type alone
SANITIZERS = ("memcheck", "racecheck")


class Part(NamedTuple):
    about: str
    command: tuple[str, ...]
    seconds: int = LIMIT
    environment: tuple[tuple[str, str], ...] = ()
    program: str | None = None  # where it is not installed, the part is left out


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def with_pytest(*arguments: str) -> tuple[str, ...]:
    return python("pytest", "-q", "-p", "no:cacheprovider", *arguments)


def benchmark(file: str, chosen: str) -> tuple[str, ...]:
    options = ("--benchmark-only", "--benchmark-columns=median,iqr,rounds", "--device", "cuda", "--save-results")
    return with_pytest(f"benchmarks/{file}", "-k", chosen, *options)


def ops() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in ops_benchmarks())


def ops_benchmarks() -> list[Path]:
    return sorted(set((ROOT / "benchmarks").glob("bench_*.py")) - {ROOT / "benchmarks/bench_model.py"})


def all_parts() -> dict[str, Part]:
    return dict([*_ground(), *_tests(), *_benchmarks()])


def _ground() -> Iterator[tuple[str, Part]]:
    build = (("DEEPLAB_FAST_NATIVE", "1"), ("DEEPLAB_FAST_CUDA", "1"))
    yield "build", Part("the extension, in place", (sys.executable, "setup.py", "build_ext", "--inplace"), LIMIT, build)
    yield "info", Part("which backend runs where", python("deeplab_fast.info"), 120)
    yield "ceilings", Part("a large copy and a large product", python("benchmarks.gpu_facts", "ceilings"), 120)
    yield "cudnn", Part("the kernels of dilated depthwise", python("benchmarks.gpu_facts", "cudnn"), 120)


def _tests() -> Iterator[tuple[str, Part]]:
    left = sorted(path.name for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    for name, beginnings in TESTS.items():
        files = [file for file in left if file.removeprefix("test_").startswith(beginnings)]
        left = [file for file in left if file not in files]
        command = with_pytest(*(f"tests/ops/{file}" for file in files), "-k", "cuda")
        yield f"tests-{name}", Part(f"{', '.join(file[5:-3] for file in files)} on the device", command)
    compiled = with_pytest("tests/ops", "-k", "ahead_of_time")
    yield "tests-ahead-of-time", Part("every kernel compiled for every chip", compiled)
    # torch's allocator hands out parts of large blocks, in which no access is out of bounds.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("DEEPLAB_FAST_BENCH_TINY", "1"))
    files = [f"benchmarks/{path.name}" for path in ops_benchmarks()]
    tiny = with_pytest(*files, "--benchmark-disable", "--device", "cuda", "-k", "native or triton")
    for tool in SANITIZERS:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *tiny)
        about = f"our kernels at tiny shapes under {tool}"
        yield f"sanitizer-{tool}", Part(about, command, LIMIT, environment, "compute-sanitizer")


def _benchmarks() -> Iterator[tuple[str, Part]]:
    for op in ops():
        yield f"bench-{op}", Part(f"{op} in bf16 or integers", benchmark(f"bench_{op}.py", HALVES[""]))
    for backbone in dict.fromkeys(backbone for backbone, _ in GPU_SIZES["TRAINING"].values()):
        chosen = f"{backbone} and bf16"
        command = benchmark("bench_model.py::bench_training_step", chosen)
        yield f"training-{backbone}", Part("a training step in bf16", command)
    yield "labelling", Part("images to labels in bf16", benchmark("bench_model.py::bench_labelling", "bf16"))
    for op in ops():
        if op not in ONE_HALF:
            yield f"bench-{op}-fp32", Part(f"{op} in fp32", benchmark(f"bench_{op}.py", HALVES["-fp32"]))
    yield "training-fp32", Part("training steps in fp32", benchmark("bench_model.py::bench_training_step", "fp32"))
    yield "labelling-fp32", Part("images to labels in fp32", benchmark("bench_model.py::bench_labelling", "fp32"))


def find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def run(part: Part) -> str:
    """What became of it: "ok", "failed with status N", "stopped after N s", or "not run: why"."""
    command = list(part.command)
    if part.program:
        if (found := find(part.program)) is None:
            return f"not run: {part.program} is not installed"
        command[0] = found
    limit = int(os.environ.get(LIMIT_VARIABLE) or part.seconds)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit} s"
    finally:  # the part is in a session of its own, where Ctrl-C does not reach it
        if process.poll() is None:
            stop(process)
    return "ok" if status == 0 else f"failed with status {status}"


def stop(process: subprocess.Popen) -> None:
    """The part and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def remember(name: str, outcome: str, seconds: float) -> Path:
    about: dict[str, Any] = ratios.describe(torch.device("cuda", 0))
    row = {"outcome": outcome, "seconds": round(seconds), "commit": about["commit"], "date": about["date"]}
    return ratios.merge(about | {"parts": {name: row}})


def main(arguments: list[str] | None = None) -> int:
    parts = all_parts()
    listing = "\n".join(f"  {name:<38}{part.about}; {part.seconds} s at most" for name, part in parts.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks/run_on_gpu.sh",
        description="Builds, tests and measures on the first GPU, part by part, into one JSON.",
        epilog=f"parts:\n{listing}\n{LIMIT_VARIABLE}=N: N seconds for each instead.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all of them where none is named")
    chosen = parser.parse_args(arguments).parts or list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"no part is called {', '.join(unknown)}; --help lists them")
    if reason := device_why_not("cuda"):
        print(reason, file=sys.stderr)
        return 2
    outcomes = {}
    for name in chosen:
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        outcomes[name] = run(parts[name])
        path = remember(name, outcomes[name], time.monotonic() - begun)
        print(f"== {name}: {outcomes[name]}, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"wrote {path.name}", *(f"{name:<38}{outcome}" for name, outcome in outcomes.items()), sep="\n")
    return int(any(outcome.startswith(("failed", "stopped")) for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Finds the constants of an op's Triton kernels on this GPU, and writes them into deeplab_fast/kernels/tuned.json.

python -m benchmarks.tune OP... [--only TEXT] [--seconds N] [--output FILE]

What runs are the op's benchmarks (variant "triton") at their GPU sizes, each result checked as there, so that nothing
here knows a launcher: `common.configuration` is replaced by one that answers with a candidate. A case's constants and
launch options are varied one after the other over `candidates`, keeping what is faster, until a round changes nothing.
A candidate that does not compile, needs more shared memory or registers than there are, or computes something wrong is
left out. The time is that of calls after the L2 was overwritten, as geometric mean over the case's benchmarks.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from triton.errors import TritonError

from benchmarks.ratios import cold_seconds, in_present_mode
from benchmarks.shapes import use_gpu_sizes
from deeplab_fast.kernels import common

# Tried for a launch option, and by name for an op's constant. A constant that is not listed and is a power of two above
# 1 is halved and doubled, twice.
OPTIONS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5), "maxnreg": (64, 96, 128, 168, 255)}
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    op: {"SPAN": (2, 3, 4, 6, 8)} for op in ("depthwise_conv", "depthwise_conv_backward")
}
GAIN = 0.99  # of the time: what saves less than a hundredth is noise
Configuration = dict[str, int]


class Case(NamedTuple):
    """What a launcher asks `common.configuration` for."""

    op: str
    case: str
    dtype: str


class Problem(NamedTuple):
    """One benchmark of the op."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None]


def problems(module: Any, device: torch.device, only: str = "") -> Iterator[Problem]:
    """The benchmarks of variant "triton" in a bench_<op> module, each made ready and not timed."""
    found: list[Problem] = []

    def harvest(
        group: str, variant: str, run: Callable[[], Any], check: Callable[[Any], None], *_: Any, **__: Any
    ) -> None:
        found.append(Problem(group, in_present_mode(run), check))

    for name, function in list(vars(module).items()):
        if not name.startswith("bench_"):
            continue
        for arguments in parameters(function):
            if arguments.get("variant") == "triton" and only in " ".join(map(str, [name, *arguments.values()])):
                try:
                    function(timed=harvest, device=device, **arguments)
                except pytest.skip.Exception as reason:
                    print(f"{name} {arguments}: skipped, {reason}")
                yield from found
                found.clear()


def parameters(function: Any) -> Iterator[dict[str, Any]]:
    """The arguments that pytest would call a parametrized function with."""
    axes = []
    for mark in getattr(function, "pytestmark", ()):
        names = [name.strip() for name in mark.args[0].split(",")] if mark.name == "parametrize" else []
        if names:
            axes.append([dict(zip(names, row if len(names) > 1 else [row], strict=True)) for row in mark.args[1]])
    for rows in itertools.product(*axes):
        yield functools.reduce(dict.__or__, rows, {})


class Table:
    """`common.configuration`'s stand-in: notes what is asked, and answers with what is to be tried."""

    def __init__(self) -> None:
        self.asked: dict[Case, Configuration] = {}  # with what tuned.json answers
        self.trial: dict[Case, Configuration] = {}
        self.original = common.configuration

    def __call__(self, op: str, case: str, x: torch.Tensor) -> Configuration:
        key = Case(op, case, str(x.dtype).removeprefix("torch."))
        self.asked.setdefault(key, self.original(op, case, x))
        return dict(self.trial.get(key, self.asked[key]))


def candidates(op: str, configuration: Mapping[str, int]) -> dict[str, list[int]]:
    """For each constant and option of a configuration the values to try, its own left out."""
    tried = {}
    for name, value in configuration.items():
        listed = CANDIDATES.get(op, {}).get(name) or OPTIONS.get(name)
        if listed is None and value > 1 and value & (value - 1) == 0:
            listed = [value // 4, value // 2, 2 * value, 4 * value]
        tried[name] = [v for v in listed or () if v >= 1 and v != value]
    return tried


def search(
    start: Configuration,
    values: Callable[[Configuration], dict[str, list[int]]],
    cost: Callable[[Configuration], float],
) -> tuple[Configuration, float]:
    """One value after the other, keeping what is faster by 1 - GAIN, until a round changes nothing.

    cost: seconds; infinite for what does not run
    """
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def of(configuration: Configuration) -> float:
        key = tuple(sorted(configuration.items()))
        if key not in known:
            known[key] = cost(configuration)
        return known[key]

    best, least = dict(start), of(start)
    changed = True
    while changed:
        changed = False
        for name, tried in values(best).items():
            for value in tried:
                if (found := of({**best, name: value})) < GAIN * least:
                    best, least, changed = {**best, name: value}, found, True
    return best, least


class OutOfTime(Exception):
    pass


def seconds_of(
    problem: Problem, time_of: Callable[[Callable[[], Any]], float], left_out: Callable[[str], None]
) -> float:
    """Of one call; infinite where it fails or is wrong."""
    try:
        problem.check(problem.run())
        return time_of(problem.run)
    except (TritonError, RuntimeError, ValueError, AssertionError) as error:
        if "illegal memory access" in str(error) or "misaligned" in str(error):
            raise  # no call of this process succeeds after it
        left_out(f"{type(error).__name__}: {error}".partition("\n")[0][:100])
        return math.inf


def tune(
    ready: list[Problem], time_of: Callable[[Callable[[], Any]], float], deadline: float, report: Callable[[str], None]
) -> dict[Case, tuple[Configuration, float, float]]:
    """{case: (the best configuration, its seconds, those of tuned.json's)}; what is found before the deadline."""
    table = Table()
    found = {}
    with mock.patch.object(common, "configuration", table):
        users: dict[Case, list[Problem]] = {}
        starts: dict[Case, Configuration] = {}
        for problem in ready:
            table.asked = {}
            if math.isfinite(seconds_of(problem, lambda run: 0.0, lambda why, p=problem: report(f"{p.name}: {why}"))):
                starts |= table.asked
                for case in table.asked:
                    users.setdefault(case, []).append(problem)
        for case, using in users.items():

            def cost(configuration: Configuration, case: Case = case, using: list[Problem] = using) -> float:
                if time.monotonic() > deadline:
                    raise OutOfTime
                table.trial[case] = configuration
                times = []
                for problem in using:
                    times.append(seconds_of(problem, time_of, lambda why: report(f"  {configuration}: {why}")))
                    if not math.isfinite(times[-1]):
                        return math.inf
                mean = math.exp(sum(map(math.log, times)) / len(times))
                report(f"  {mean * 1e6:10.1f} us  {configuration}")
                return mean

            report(f"{case.op} / {case.case} {case.dtype}: {', '.join(problem.name for problem in using)}")
            try:
                before = cost(starts[case])
                best, after = search(starts[case], functools.partial(candidates, case.op), cost)
            except OutOfTime:
                report("  out of time: this case stays as it was")
                break
            finally:
                table.trial.pop(case, None)
            table.trial[case] = best  # for the cases that run in the same calls
            found[case] = (best, after, before)
    return found


def written(table: Mapping[str, Any], depth: int = 0) -> str:
    """The table as JSON with a line for each configuration, so that a change of one is a change of a line."""
    if not any(isinstance(value, dict) for value in table.values()):
        return json.dumps(table)
    pad = "  " * depth
    lines = (f"{pad}  {json.dumps(key)}: {written(value, depth + 1)}" for key, value in table.items())
    return "{\n" + ",\n".join(lines) + f"\n{pad}}}"


def write(found: Mapping[Case, tuple[Configuration, float, float]], chip: int, path: Path) -> None:
    """Each winner under its chip and dtype, beside what the file or else tuned.json holds; it appears whole or not."""
    table = json.loads((path if path.exists() else common.TUNED).read_text())
    for case, (best, *_) in found.items():
        table[case.op][case.case].setdefault(str(chip), {})[case.dtype] = best
    half = path.with_suffix(".tmp")
    half.write_text(written(table) + "\n")
    os.replace(half, path)


def rows(found: Mapping[Case, tuple[Configuration, float, float]]) -> list[str]:
    lines = [f"{'op / case':<44}{'dtype':<10}{'us':>10}{'before':>10}  configuration"]
    for case, (best, after, before) in found.items():
        name = f"{case.op} / {case.case}"
        lines.append(f"{name:<44}{case.dtype:<10}{after * 1e6:>10.1f}{before * 1e6:>10.1f}  {best}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+", metavar="OP", help="as in benchmarks/bench_<OP>.py")
    parser.add_argument("--only", default="", help="benchmarks whose name or arguments hold this text")
    parser.add_argument("--seconds", type=float, default=420, help="after which it writes what it found (420)")
    parser.add_argument("--output", type=Path, default=common.TUNED, help="instead of tuned.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    device = torch.device("cuda", 0)
    use_gpu_sizes()
    deadline = time.monotonic() + options.seconds
    for op in options.ops:
        ready = list(problems(importlib.import_module(f"benchmarks.bench_{op}"), device, options.only))
        found = tune(ready, functools.partial(cold_seconds, device=device), deadline, print)
        write(found, common.capability(device), options.output)
        print(*rows(found), sep="\n")


if __name__ == "__main__":
    main()

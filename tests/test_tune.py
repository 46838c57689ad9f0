"""benchmarks/tune.py on an op, a timer and a table that are not real."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune  # noqa: E402
from deeplab_fast.kernels import common  # noqa: E402

CPU = torch.device("cpu")
START = {"BLOCK": 64, "num_warps": 4}
CASE = tune.Case("fake", "plain", "float32")


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"fake": {"plain": {"any": {"any": START}}}}))
    monkeypatch.setattr(common, "TUNED", path)
    common._table.cache_clear()
    common._configuration.cache_clear()
    yield path
    common._table.cache_clear()
    common._configuration.cache_clear()


class Op:
    """Asks for its configuration as a launcher does; some configurations fail, and some compute something wrong."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.last = common.configuration("fake", "plain", x)
        if self.last["BLOCK"] > 128:
            raise RuntimeError("out of resource: shared memory")
        return x * (3 if self.last["num_warps"] == 2 else 2)

    def seconds(self, run) -> float:
        """Least at BLOCK 128 and 8 warps, of those that run; 2 warps would be faster still."""
        run()
        distance = abs(math.log2(self.last["BLOCK"] / 128)) + abs(math.log2(self.last["num_warps"] / 8))
        return 1e-6 if self.last["num_warps"] == 2 else 1e-5 * (1 + distance)


def module_of(op: Op) -> SimpleNamespace:
    @pytest.mark.parametrize("variant", ["native", "triton"])
    @pytest.mark.parametrize("n, dtype", [(3, "float32"), (5, "float32"), (7, "none")])
    def bench_fake(timed, device, n, dtype, variant):
        if dtype == "none":
            pytest.skip("no such dtype")
        x = torch.arange(float(n), device=device)
        with torch.no_grad():
            timed(f"fake {n}", variant, lambda: op(x), lambda y: torch.testing.assert_close(y, 2 * x), 8 * n)

    return SimpleNamespace(bench_fake=bench_fake, bench_unrelated=lambda timed, device: None, other=3)


def test_the_benchmarks_are_the_problems():
    ready = list(tune.problems(module_of(Op()), CPU))
    assert [problem.name for problem in ready] == ["fake 3", "fake 5"]
    assert [problem.name for problem in tune.problems(module_of(Op()), CPU, only="5")] == ["fake 5"]


def test_the_fastest_that_runs_and_is_right_is_found_and_written(table, capsys):
    op, lines = Op(), []
    ready = list(tune.problems(module_of(op), CPU))
    found = tune.tune(ready, op.seconds, time.monotonic() + 60, lines.append)
    best, after, before = found[CASE]
    assert best == {"BLOCK": 128, "num_warps": 8}
    assert after == pytest.approx(1e-5) and before == pytest.approx(3e-5)
    assert any("out of resource" in line for line in lines)
    assert any("not close" in line and "'num_warps': 2" in line for line in lines)
    assert common.configuration("fake", "plain", torch.ones(1)) == START  # the table's again

    elsewhere = table.with_name("elsewhere.json")
    tune.write(found, 90, elsewhere)
    assert json.loads(table.read_text()) == {"fake": {"plain": {"any": {"any": START}}}}
    tune.write(found, 90, table)
    assert elsewhere.read_text() == table.read_text() and not list(table.parent.glob("*.tmp"))
    assert json.loads(table.read_text()) == {"fake": {"plain": {"any": {"any": START}, "90": {"float32": best}}}}
    common._table.cache_clear()
    common._configuration.cache_clear()
    assert common.configuration("fake", "plain", torch.ones(1)) == best
    assert "128" in tune.rows(found)[1] and "30.0" in tune.rows(found)[1]


def test_a_case_that_is_not_through_stays_as_it_was(table):
    op = Op()
    ready = list(tune.problems(module_of(op), CPU))
    assert tune.tune(ready, op.seconds, time.monotonic() - 1, lambda line: None) == {}


def test_after_a_fault_of_the_device_nothing_is_tried(table):
    def fault(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ready = [tune.Problem("fault", lambda: fault(torch.ones(1)), lambda y: None)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tune(ready, lambda run: 1.0, time.monotonic() + 60, lambda line: None)


def test_candidates_are_those_listed_or_halves_and_doubles(monkeypatch):
    monkeypatch.setitem(tune.CANDIDATES, "fake", {"ROWS": (1, 3)})
    tried = tune.candidates("fake", {"BLOCK": 2, "ROWS": 3, "EVEN": 1, "ODD": 7, "num_stages": 3})
    assert tried == {"BLOCK": [1, 4, 8], "ROWS": [1], "EVEN": [], "ODD": [], "num_stages": [1, 2, 4, 5]}


def test_noise_is_no_gain():
    best, _ = tune.search({"a": 1}, lambda now: {"a": [1, 2]}, lambda c: 1.0 - 0.005 * (c["a"] == 2))
    assert best == {"a": 1}


def test_the_table_is_as_tune_writes_it():
    text = common.TUNED.read_text()
    assert text == tune.written(json.loads(text)) + "\n"

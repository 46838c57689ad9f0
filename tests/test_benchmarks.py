"""What the benchmarks' numbers are compared with, and what is written beside them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import camvid, ratios, report, scaling
from deeplab_fast import device
from deeplab_fast.ops import native
from deeplab_fast.presets import PRESETS
from deeplab_fast.testing import SKIPPED_BACKEND
from tests.conftest import backend_summary

pytest.importorskip("pytest_benchmark")
CPU = torch.device("cpu")


@pytest.fixture
def conftest() -> ModuleType:
    path = Path(ratios.__file__).parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """benchmarks/results in a repository of its own with one commit."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "code.py").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(ratios, "RESULTS", folder)
    monkeypatch.setattr(ratios, "FOLDER", folder.parent)
    return folder


def test_share_is_of_a_copy_of_the_same_size_in_the_same_rounds(results, monkeypatch):
    sizes = []
    copying = ratios.copying

    def recorded(bytes_moved: int, device: torch.device) -> ratios.Variant:
        copy = copying(bytes_moved, device)
        sizes.append(copy.bytes_moved)
        return copy._replace(run=copy_run)

    def native_run() -> None: ...
    def copy_run() -> None: ...

    monkeypatch.setattr(ratios, "copying", recorded)
    monkeypatch.setattr(ratios, "seconds", lambda run, *_: {native_run: 4e-6, copy_run: 1e-6}[run])
    groups = {"op": {"native": ratios.Variant(native_run, 4000)}}
    path = ratios.save(groups, {"copy_gb_s": 1000.0}, CPU, keeps_freed_memory=False)
    about = json.loads(path.read_text())
    assert sizes == [4000]
    copy = about["results"]["op"]["copy"]
    assert {key: copy[key] for key in ("median_ms", "ratio", "gb_s", "share_of_copy")} == {
        "median_ms": 0.001,
        "ratio": 0.25,
        "gb_s": 4.0,
        "share_of_copy": 1.0,
    }
    assert copy["cold_ms"] == 0.001
    assert about["results"]["op"]["native"]["share_of_copy"] == 0.25
    assert about["keeps_freed_memory"] is False


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's")
def test_peak_is_what_a_call_needs_at_once():
    megabyte = 1 << 20

    def three_in_turn() -> None:
        for _ in range(3):
            torch.ones(16 * megabyte, dtype=torch.uint8)

    peak = ratios.peak_bytes(lambda: torch.ones(32 * megabyte, dtype=torch.uint8), CPU)
    assert 31 * megabyte <= peak < 34 * megabyte
    peak = ratios.peak_bytes(three_in_turn, CPU)
    assert 15 * megabyte <= peak < 44 * megabyte  # three at once are 48


def test_commit_says_whether_the_tree_has_changes(results):
    clean = ratios.commit()
    assert clean and ratios.describe(CPU)["commit"] == clean and "dirty" not in clean
    (results / "device.json").touch()  # written by the benchmarks themselves
    assert ratios.commit() == clean
    (results.parent.parent / "code.py").write_text("changed")
    assert ratios.commit() == ratios.describe(CPU)["commit"] == f"{clean}-dirty"


def test_no_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(ratios, "FOLDER", tmp_path)
    assert ratios.commit() is None
    monkeypatch.setenv("DEEPLAB_FAST_COMMIT", "abc1234")  # a copy of the tree without its history
    assert ratios.commit() == "abc1234"


@pytest.mark.parametrize("agreed, header", [(True, "keeps freed memory"), (False, "refused to keep freed memory")])
def test_an_allocator_that_refuses_is_told_of_and_no_error(conftest, monkeypatch, agreed, header):
    monkeypatch.setattr(conftest, "set_allocator", lambda: agreed)
    config = SimpleNamespace(getoption=lambda name: "cpu")
    conftest.pytest_configure(config)
    assert config.keeps_freed_memory is agreed
    assert header in conftest.pytest_report_header(config)


def test_benchmarks_share_the_commands_allocator_settings(conftest):
    assert conftest.set_allocator is device.set_allocator


def test_readme_shows_the_committed_results():
    about = json.loads(report.DEFAULT.read_text())
    assert report.committed_tables() == report.tables(about)
    assert report.DEFAULT.with_suffix(".png").exists()


def test_readme_states_the_recorded_times_of_whole_networks():
    results = json.loads(report.DEFAULT.read_text())["results"]
    readme = " ".join((report.ROOT / "README.md").read_text().split())
    times_faster = []
    for kind, shape in (("training step", "4x256x256"), ("image to labels", "512x1024")):
        for dtype in ("bf16", "fp32"):
            group = results[f"{kind} mobilenet_v2 {shape} {dtype}"]
            ratio = f"{group['eager']['ratio']:.1f}"
            assert f"{group['native']['median_ms']:.0f} ms in {dtype}" in readme and f"({ratio} x)" in readme
            times_faster += [ratio] * (dtype == "bf16")
    step, image = times_faster
    assert f"a training step is {step} times and an image to its label map {image} times as fast" in readme


def test_report_writes_tables_and_picture(tmp_path, monkeypatch):
    rows = {"median_ms": 1.0, "ratio": 1.0, "gb_s": 4.0, "share_of_copy": 0.5, "cold_ms": 2.0, "peak_mb": 1.5}
    eager = rows | {"median_ms": 3.0, "ratio": 3.1, "cold_ms": 8.0, "peak_mb": 30.0}
    about = {
        **{"device": "A CPU", "threads": 2, "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-01"},
        **{
            "roof": {"copy_gb_s": 40.0, "matmul_tflop_s": 0.5},
            "results": {"op shape fp32": {"native": rows, "eager": eager}},
        },
    }
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    (tmp_path / "a_cpu.json").write_text(json.dumps(about))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main(str(tmp_path / "a_cpu.json"))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| op shape fp32 | 1 ms | 3.1 x | 50% | 1.5 / 30 MB |" in text
    assert "| op shape fp32 | 2 ms | 4 x |" in (tmp_path / "a_cpu.md").read_text()  # cold
    assert (tmp_path / "a_cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("turns", [[2.0, 1.5, 2.0], [2.0, float("nan"), 1.0]])
def test_no_time_for_a_loop_that_does_not_learn(turns):
    camvid.check({"plain": [2.0, 1.8, 1.5]})
    with pytest.raises(SystemExit, match="ours: mean losses"):
        camvid.check({"plain": [2.0, 1.8, 1.5], "ours": turns})


def test_readme_shows_the_recorded_steps_on_camvid():
    record = json.loads((Path(camvid.__file__).parent / "results" / "camvid_steps.json").read_text())
    camvid.check(record["loss_of_each_turn"])
    readme = (Path(camvid.__file__).parent.parent / "README.md").read_text()
    for seconds in record["seconds_a_step"].values():
        assert f"takes {seconds:.2f} s" in readme or f"and {seconds:.2f} s" in readme


@pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")
def test_every_benchmark_fails_on_a_wrong_result():
    """And passes on a right one, which is a stage of .ci/run."""
    root = Path(ratios.__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-p", "tests.spoiled_kernels", "-q", "benchmarks", "-k", "native"]
    environment = {**os.environ, "DEEPLAB_FAST_BENCH_TINY": "1"}
    result = subprocess.run(
        [*command, "--benchmark-disable"], cwd=root, env=environment, capture_output=True, text=True
    )
    summary = result.stdout.splitlines()[-1]
    assert re.search(r"[1-9]\d* failed", summary) and "passed" not in summary, result.stdout[-4000:]


def test_the_summary_names_what_was_not_tested():
    skipped = [
        ("tests/ops/test_b.py", f"Skipped: {SKIPPED_BACKEND} cuda: no device"),
        ("tests/ops/test_a.py", f"Skipped: {SKIPPED_BACKEND} cuda: no device"),
        ("tests/ops/test_a.py", f"Skipped: {SKIPPED_BACKEND} cpu: not built"),
        ("tests/test_c.py", "Skipped: no git"),
    ]
    assert backend_summary(skipped).splitlines() == [
        "3 backend cases skipped",
        "  1 cpu: not built: a",
        "  2 cuda: no device: a, b",
    ]
    assert backend_summary(skipped[3:]) == ""


def test_the_readme_has_the_figures_of_the_threshold_and_the_concatenation():
    record = json.loads((ratios.RESULTS / "amd_epyc_threshold_and_concat.json").read_text())["results"]
    readme = " ".join((ratios.FOLDER.parent / "README.md").read_text().split())

    def span(op: str, variant: str) -> tuple[float, float]:
        found = [row[variant]["ratio"] for shape, row in record.items() if shape.startswith(op) and variant in row]
        assert len(found) == 4
        return min(found), max(found)

    (low, high), (low_k, high_k) = span("kth_largest", "reference"), span("kth_largest", "kthvalue")
    said = f"`torch.topk` {low:.0f} to {high:.0f} times and `kthvalue` {math.floor(low_k)} to {math.ceil(high_k)} times"
    assert said in readme
    low, high = span("separable_conv_concat", "one_by_one")
    assert f"{low:.2f} to {high:.1f} times as fast as branch by branch" in readme


def test_the_cost_of_several_processes_is_what_the_model_says():
    """scaling.md is the text that the figures give, and its limits are right."""
    assert (ratios.FOLDER / "scaling.md").read_text() == scaling.report()
    cluster = scaling.Cluster()
    assert scaling.large_message(1e9, 1, cluster) == 0
    # Two nodes: 7/8 of the bytes twice within, half of an eighth twice between.
    expected = (
        2 * 7 / 8 * 1e9 / cluster.nvlink + 2 / 2 * 1e9 / 8 / cluster.infiniband + cluster.launch + 2 * cluster.hop
    )
    assert scaling.large_message(1e9, 16, cluster) == pytest.approx(expected)
    sent = scaling.messages(scaling.model_of(PRESETS["camvid"]()), synchronised=True)
    assert scaling.step(sent, 1.0, 1, cluster).efficiency == 1
    shares = [scaling.step(sent, 0.05, count, cluster).efficiency for count in scaling.COUNTS]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 1


def test_messages_are_counted_from_the_model():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 2, 1)).train()
    model[2].requires_grad_(False)
    sent = scaling.messages(model, synchronised=True)
    assert sent == scaling.Messages((8 * 27 + 8 + 16) * 4, 1, 3 * 8 * 4, 2 * 8 * 4, 32)
    assert scaling.messages(model, synchronised=False)[1:4] == (0, 0, 0)

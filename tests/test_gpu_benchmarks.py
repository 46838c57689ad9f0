"""run_on_gpu.sh's parts, their JSON and their sizes, as far as they go without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import capture, gpu_facts, gpu_parts, ratios, report, shapes
from deeplab_fast import build_model
from tests.test_benchmarks import conftest  # noqa: F401

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ABOUT = {"device": "A GPU", "versions": {"torch": "2.11.0"}, "commit": "abc1234", "date": "2026-01-01"}


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(ratios, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "a_gpu.json"


@pytest.fixture
def run_parts(results, monkeypatch):
    """Runs these Python programs as parts, on a GPU that is not there."""
    monkeypatch.setattr(gpu_parts, "device_why_not", lambda kind: None)
    monkeypatch.setattr(ratios, "describe", lambda device: dict(ABOUT))

    def run(*chosen: str, **programs: str | gpu_parts.Part) -> int:
        parts = {
            name: code if isinstance(code, gpu_parts.Part) else gpu_parts.Part(name, (sys.executable, "-c", code), 60)
            for name, code in programs.items()
        }
        monkeypatch.setattr(gpu_parts, "all_parts", lambda: parts)
        return gpu_parts.main(list(chosen))

    return run


def outcomes(path: Path) -> dict[str, str]:
    return {name: part["outcome"] for name, part in json.loads(path.read_text())["parts"].items()}


def test_a_part_that_fails_is_named_and_those_after_it_run(run_parts, results, capfd):
    programs = {"first": "print('one')", "second": "raise SystemExit(3)", "third": "print('three')"}
    assert run_parts(**programs) == 1
    assert outcomes(results) == {"first": "ok", "second": "failed with status 3", "third": "ok"}
    printed = capfd.readouterr().out
    assert "three" in printed and re.search(r"^second +failed with status 3$", printed, flags=re.MULTILINE)


def test_a_part_is_repeated_alone_and_the_others_stay(run_parts, results):
    assert run_parts(first="raise SystemExit(1)", second="pass") == 1
    assert run_parts("first", first="pass", second="raise SystemExit(1)") == 0
    assert outcomes(results) == {"first": "ok", "second": "ok"}
    part = json.loads(results.read_text())["parts"]["first"]
    assert part["commit"] == "abc1234" and part["seconds"] >= 0


def test_a_part_that_outlasts_its_limit_is_stopped_with_all_that_it_started(run_parts, results, tmp_path):
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    slow = gpu_parts.Part("", (sys.executable, "-c", code), seconds=1)
    begun = time.monotonic()
    assert run_parts(slow=slow, after="pass") == 1
    assert outcomes(results) == {"slow": "stopped after 1 s", "after": "ok"}
    time.sleep(max(0, 5 - (time.monotonic() - begun)))
    assert not alive.exists()


def test_limits_of_all_parts_by_one_variable(run_parts, results, monkeypatch):
    monkeypatch.setenv(gpu_parts.LIMIT_VARIABLE, "1")
    assert run_parts(slow="import time; time.sleep(30)") == 1
    assert outcomes(results) == {"slow": "stopped after 1 s"}


def test_a_tool_that_is_missing_is_no_failure(run_parts, results):
    part = gpu_parts.Part("", ("no-such-tool", "x"), program="no-such-tool")
    assert run_parts(check=part) == 0
    assert outcomes(results) == {"check": "not run: no-such-tool is not installed"}


def test_an_unknown_part_is_an_error_and_none_runs(run_parts, results, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_parts("first", "frist", first="pass")
    assert "no part is called frist" in capsys.readouterr().err and not results.exists()


def test_the_script_lists_its_parts():
    script = ROOT / "benchmarks" / "run_on_gpu.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for name in gpu_parts.all_parts():
        assert re.search(rf"^  {name} ", result.stdout, flags=re.MULTILINE), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs(capsys):
    assert gpu_parts.main(["info"]) == 2
    assert "torch" in capsys.readouterr().err


def test_every_op_is_tested_and_benchmarked():
    parts = gpu_parts.all_parts()
    files = sorted(f"tests/ops/{path.name}" for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    tests = [parts[f"tests-{name}"].command for name in gpu_parts.TESTS]
    assert sorted(word for command in tests for word in command if word.startswith("tests/ops/")) == files
    assert {f"bench-{op}" for op in gpu_parts.ops()} <= set(parts)
    assert all(part.seconds < 480 for part in parts.values())
    for backbone in {backbone for backbone, _ in shapes.GPU_SIZES["TRAINING"].values()}:
        assert f"training-{backbone}" in parts


def test_the_halves_of_a_benchmark_are_all_of_it():
    """By the ids that pytest gives them; a half that chooses nothing would be a part that fails."""
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--collect-only", "-q", "--device", "cuda"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout[-2000:] + listed.stderr[-2000:]
    for op in gpu_parts.ops():
        ids = re.findall(rf"^benchmarks/bench_{op}\.py::(.+)$", listed.stdout, flags=re.MULTILINE)
        exact = [name for name in ids if "fp32" in name or "float32" in name]
        assert len(ids) > len(exact), op
        assert bool(exact) == (op not in gpu_parts.ONE_HALF), op
    for backbone, _ in shapes.GPU_SIZES["TRAINING"].values():
        assert re.search(rf"bench_training_step\[.*{backbone} .*bf16", listed.stdout)


def test_merging_keeps_what_other_runs_measured(results):
    ratios.merge(ABOUT | {"roof": {"copy_gb_s": 1.0}, "results": {"a": {"native": {"median_ms": 1}}}})
    ratios.merge(ABOUT | {"commit": "def", "results": {"b": {"native": {"median_ms": 2}}}})
    path = ratios.merge(ABOUT | {"commit": "def", "results": {"a": {"triton": {"median_ms": 3}}}})
    about = json.loads(path.read_text())
    assert about["roof"] == {"copy_gb_s": 1.0} and about["commit"] == "def"
    assert about["results"] == {"a": {"triton": {"median_ms": 3}}, "b": {"native": {"median_ms": 2}}}
    assert not list(path.parent.glob("*.tmp"))
    assert '"triton": { "median_ms": 3 }' in path.read_text()  # a row a line


@pytest.mark.parametrize("change", [{"fresh": True}, {"versions": {"torch": "2.12.0"}}])
def test_nothing_is_merged_with_what_other_versions_measured(results, change):
    ratios.merge(ABOUT | {"parts": {"build": {"outcome": "ok"}}})
    fresh = change.pop("fresh", False)
    path = ratios.merge(ABOUT | change | {"parts": {"info": {"outcome": "ok"}}}, fresh=fresh)
    assert list(json.loads(path.read_text())["parts"]) == ["info"]


def test_the_folder_of_results_is_the_environments():
    code = "from benchmarks import ratios; print(ratios.RESULTS)"
    environment = os.environ | {"DEEPLAB_FAST_RESULTS": "/somewhere"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "/somewhere"


def test_triton_is_ours_where_there_is_no_native():
    assert ratios.ours({"eager": 0, "triton": 0}) == "triton"
    assert ratios.ours({"triton": 0, "native": 0}) == "native"
    assert ratios.ours({"eager": 0}) is None


def chip(l2: int, memory: int = 1 << 30):
    return mock.patch.object(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2, total_memory=memory)
    )


def test_what_fits_the_l2_is_judged_by_its_cold_time():
    roof = {"copy_gb_s": 100.0, "matmul_tflop_s": 10.0}
    variant = ratios.Variant(lambda: None, 10**9, flops=10**11)
    with chip(l2=10**8):
        row = ratios._of_roof(variant, warm=0.02, cold=0.04, roof=roof, device=CPU)
    assert row == {"share_of_roof": 0.5, "share_of_matmul": 0.5}
    with chip(l2=10**10):
        row = ratios._of_roof(variant, warm=0.02, cold=0.04, roof=roof, device=CPU)
    assert row == {"fits_l2": True, "share_of_roof": 0.25, "share_of_matmul": 0.25}


class FakeCuda:
    """torch.cuda on the CPU: time is the host's, a graph remembers the call that is made while it is captured."""

    def __init__(self, monkeypatch, *, replays: bool = True, memory: int = 1 << 30) -> None:
        self.replays, self.calls, self.syncs = replays, [], "default"
        chip = SimpleNamespace(
            L2_cache_size=1 << 20, total_memory=memory, major=9, minor=0, multi_processor_count=132, name="A GPU"
        )
        event = lambda **_: SimpleNamespace(  # noqa: E731
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 0.5
        )
        names = {
            "Event": event,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "graph": lambda graph: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "synchronize": lambda device=None: None,
            "set_sync_debug_mode": lambda mode: setattr(self, "syncs", mode),
            "memory_allocated": lambda device: 0,
            "max_memory_allocated": lambda device: 1 << 20,
            "reset_peak_memory_stats": lambda device: None,
            "get_device_properties": lambda device: chip,
            "get_device_name": lambda device: chip.name,
        }
        for name, fake in names.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(ratios, "copying", lambda bytes_moved, device: ratios.Variant(lambda: None, bytes_moved))
        monkeypatch.setattr(ratios, "_flush", lambda device: torch.empty(8, dtype=torch.uint8))
        monkeypatch.setitem(ratios.ROUND_SECONDS, "cuda", 0.001)

    def variant(self, factor: int, *, waits: bool = False) -> ratios.Variant:
        """out = factor x, which is to be 2 x."""
        x, out = torch.arange(4.0), torch.empty(4)

        def run() -> torch.Tensor:
            if waits and self.syncs == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nmore")
            self.last = lambda: out.copy_(factor * x)
            return self.last()

        return ratios.Variant(run, 32, lambda y: torch.testing.assert_close(y, 2 * x))

    def replay(self) -> None:
        if self.replays:
            self.last()


DEVICE = SimpleNamespace(type="cuda")  # tensors stay on the CPU


def test_a_group_on_a_gpu(results, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    variants = {"triton": cuda.variant(2), "eager": cuda.variant(2, waits=True), "eager_nchw": cuda.variant(2)}
    path = ratios.save({"op": variants}, {"copy_gb_s": 4.0, "matmul_tflop_s": 1.0}, DEVICE, True)
    assert path == results
    about = json.loads(path.read_text())
    assert about["device"] == "A GPU" and about["chip"] == "sm_90, 132 multiprocessors" and about["driver"]
    rows = about["results"]["op"]
    assert set(rows) == {"triton", "triton+graph", "eager", "eager+graph", "eager_nchw", "copy"}
    assert rows["eager+graph"] == {"not_captured": "called a synchronizing CUDA operation"}
    calls = max(1, int(0.001 / 0.0005))
    assert rows["triton"]["median_ms"] == 0.5 / calls and rows["triton"]["cold_ms"] == 0.5
    assert rows["triton"]["fits_l2"] and rows["triton"]["share_of_roof"] == round(32 / 0.5e-3 / 4e9, 3)
    assert rows["triton"]["peak_mb"] == 1.05 and "peak_mb" not in rows["triton+graph"]
    assert cuda.syncs == "default"


def test_a_replay_that_computes_nothing_is_found_out(monkeypatch):
    cuda = FakeCuda(monkeypatch, replays=False)
    with pytest.raises(AssertionError):
        capture.captured(cuda.variant(2), DEVICE)


def test_what_needs_much_memory_is_not_captured(monkeypatch):
    cuda = FakeCuda(monkeypatch, memory=1 << 22)
    assert "which the graph would keep" in capture.captured(cuda.variant(2), DEVICE)


def test_variants_that_refuse_a_graph_say_why(monkeypatch):
    monkeypatch.setattr(capture, "why_not", lambda run, device: "it waits" if run == 1 else "it needs 9 GB")
    variants = {"native": ratios.Variant(1, 0), "eager": ratios.Variant(2, 0), "eager_nchw": ratios.Variant(3, 0)}
    made, refused = capture.graphs(variants, CPU)
    assert not made
    assert refused == {"native+graph": {"not_captured": "it waits"}, "eager+graph": {"not_captured": "it needs 9 GB"}}


def test_poison_reaches_every_result():
    results = {"a": [torch.ones(2), torch.ones(2, dtype=torch.uint8)], "b": (torch.ones(1, dtype=torch.int64), 3)}
    capture.poison(results)
    assert results["a"][0].isnan().all() and (results["a"][1] == 85).all() and results["b"][0] == 85


def test_what_torch_compiled_runs_in_both_modes(conftest):  # noqa: F811
    made = []

    def compiler(function, *, mode, dynamic):
        made.append((mode, dynamic))
        return lambda x: (mode, function(x))

    both = conftest.BothModes(compiler, lambda x: x + 1, dynamic=False)
    assert made == [(None, False), ("max-autotune-no-cudagraphs", False)]
    assert both(1) == (None, 2)
    assert conftest.in_max_mode(lambda: both(1))() == ("max-autotune-no-cudagraphs", 2)
    assert both(1) == (None, 2)


def test_a_group_is_saved_when_the_next_begins_and_one_that_fails_is_named(conftest, monkeypatch):  # noqa: F811
    saved = []

    def save(groups, roof, device, keeps, *, fresh):
        if "bad" in groups:
            raise RuntimeError("out of memory\nmore")
        saved.append((list(groups), fresh))
        return Path("device.json")

    monkeypatch.setattr(conftest, "save", save)
    options = {"--save-results": True, "--device": "cpu"}
    config = SimpleNamespace(getoption=options.get, roof={}, saved=None, keeps_freed_memory=True)
    conftest.GROUPS.update({"one": {}, "bad": {}, "two": {}})
    conftest.finish(config)
    assert saved == [(["one"], True), (["two"], False)]
    assert conftest.FAILED == {"bad": "RuntimeError: out of memory"} and not conftest.GROUPS


def kind(value: object) -> object:
    """The shape of a table's row: types all the way down."""
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(kind, value))
    return type(value).__name__


def test_sizes_for_a_gpu_have_the_form_of_the_others_and_replace_them():
    code = (
        "from benchmarks import shapes, bench_depthwise_conv as b\n"
        "before = {name: dict(getattr(shapes, name)) for name in shapes.GPU_SIZES}\n"
        "shapes.use_gpu_sizes()\n"
        "assert b.DEPTHWISE == shapes.GPU_SIZES['DEPTHWISE'] != before['DEPTHWISE']\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for name, sizes in shapes.GPU_SIZES.items():
        forms = {str(kind(row)) for row in getattr(shapes, name).values()} if not shapes.TINY else set()
        for key, row in sizes.items():
            if name != "BATCH_NORMS" and name != "DEPTHWISE_RATES":  # rows of several lengths
                assert str(kind(row)) in forms, (name, key)


def test_sizes_for_a_gpu_are_valid_for_their_benchmarks():
    module = lambda name: importlib.import_module(f"benchmarks.bench_{name}")  # noqa: E731
    sizes = shapes.GPU_SIZES
    meta = lambda shape: torch.empty(shape, device="meta", dtype=torch.bfloat16)  # noqa: E731
    convolutions = [row for kind in ("", "_BACKWARD", "_NORMALISED") for row in sizes[f"DEPTHWISE{kind}"].values()]
    for (n, c, h, w), stride, dilation in convolutions:
        norm = [torch.empty(c, device="meta")] * 4
        x, weight = meta((n, c, h, w)), meta((c, 1, 3, 3))
        y = module("depthwise_conv").eager(x, weight, *norm, stride=stride, dilation=dilation)
        assert y.shape == (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    for shape, dilations in sizes["DEPTHWISE_RATES"].values():
        assert len(shape) == 4 and len(set(dilations)) == len(dilations) > 1
    for (n, c, h, w), m, dilation in sizes["SEPARABLE"].values():
        norms = [torch.empty(k, device="meta") for k in (c, c, m, m)]
        weights = meta((c, 1, 3, 3)), meta((m, c, 1, 1))
        y = module("separable_conv").layers(meta((n, c, h, w)), *weights, *norms, dilation=dilation, pad=False)
        assert y.shape == (n, m, h, w)
    for shape, low in [*sizes["DECODERS"].values(), *sizes["DECODERS_TRAINED"].values()]:
        y = module("upsample_concat").eager(meta(shape), meta((shape[0], *low)))
        assert y.shape == (shape[0], shape[1] + low[0], *low[1:])
    for shape, size in [*sizes["UPSAMPLED_LOGITS"].values(), *sizes["UPSAMPLED_LOGITS_TRAINED"].values()]:
        assert module("upsample_argmax").eager(meta(shape), size).shape == (shape[0], *size)
        labels = torch.empty((shape[0], *size), dtype=torch.uint8, device="meta")
        assert module("upsample_cross_entropy").eager(meta(shape), labels).shape == ()
        assert shape[1] < 255  # what labels of a byte leave room for
    for (n, c, h, w), activation, residual, dtypes in sizes["BATCH_NORMS"].values():
        x, weight = meta((n, c, h, w)), torch.empty(c, device="meta")
        assert (
            module("batch_norm_act").composed(x, weight, weight, x if residual else None, activation).shape == x.shape
        )
        assert set(dtypes) <= {"float32", "bfloat16"}
    for n, h, w in sizes["IMAGES"].values():
        images = torch.empty((n, h, w, 3), dtype=torch.uint8, device="meta")
        assert module("normalize_image").eager(images, None, torch.bfloat16, False).shape == (n, 3, h, w)
    for shape, classes in sizes["LABEL_MAPS"].values():
        assert len(shape) == 3 and 1 < classes < 255
    for backbone, shape in [*sizes["TRAINING"].values(), *sizes["INFERENCE"].values()]:
        with torch.device("meta"):
            build_model(backbone=backbone, num_classes=19)
        assert len(shape) == 3


def test_the_profiler_names_kernels():
    a = torch.randn(64, 64)
    found = gpu_facts.kernels(lambda: a @ a, CPU)
    assert any("mm" in name for name in found) and all(time >= 0 for time in found.values())


def test_ceilings_go_into_the_json(results, monkeypatch, capsys):
    monkeypatch.setattr(ratios, "describe", lambda device: dict(ABOUT))
    monkeypatch.setattr(gpu_facts, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_facts, "SIDE", 32)
    gpu_facts.main("ceilings", CPU)
    assert set(json.loads(results.read_text())["roof"]) == {"copy_gb_s", "matmul_tflop_s"}
    assert "copy_gb_s" in capsys.readouterr().out


ROW = {"median_ms": 0.1, "ratio": 1.0, "gb_s": 4.0, "share_of_copy": 0.5, "cold_ms": 0.2, "peak_mb": 1.5}
ABOUT_A_GPU = ABOUT | {"driver": "580", "threads": 16, "versions": {"torch": "2.11.0", "triton": "3.6.0"}}
ABOUT_A_GPU |= {"roof": {"copy_gb_s": 4300.0, "matmul_tflop_s": 780.0}}


def test_report_of_a_gpu(tmp_path, monkeypatch):
    row = ROW
    rows = {
        "triton": row | {"share_of_roof": 0.8, "fits_l2": True},
        "eager": row | {"ratio": 3.0, "cold_ms": 0.8, "peak_mb": 30.0},
        "eager+graph": {"not_captured": "it waits for the device"},
        "triton+graph": row | {"ratio": 0.9},
        "compile_max": row | {"ratio": 2.0},
    }
    captured = rows | {"eager+graph": row | {"ratio": 1.5}}
    results = {"op shape bf16": rows, "another bf16": captured}
    about = ABOUT_A_GPU | {"results": results}
    path = tmp_path / "a_gpu.json"
    path.write_text(json.dumps(about))
    monkeypatch.setattr(report, "ROOT", tmp_path)  # without a README.md: this device's table does not go there
    report.main(str(path))
    text = path.with_suffix(".md").read_text()
    heads = "ours | eager | max-autotune | ours in a graph | eager in a graph | of the copy rate | peak memory"
    assert f"| op and shape | {heads}, ours / eager |" in text
    assert "| op shape bf16 | 0.1 ms | 3 x | 2 x | 0.9 x |  | 80% cold | 1.5 / 30 MB |" in text
    assert "| another bf16 | 0.1 ms | 3 x | 2 x | 0.9 x | 1.5 x | 80% cold | 1.5 / 30 MB |" in text
    assert "L2 cache was overwritten" in text and "| op shape bf16 | 0.2 ms | 4 x |" in text
    assert path.with_suffix(".png").stat().st_size > 1000


def test_report_of_two_kernels_of_ours():
    """Where CUDA C++ is what the others are compared with, Triton is one of them; where it is alone, it is ours."""
    native = {"native": ROW, "triton": ROW | {"ratio": 1.2, "cold_ms": 0.3}, "eager": ROW | {"ratio": 3.0}}
    native |= {"native+graph": ROW | {"ratio": 0.8}, "triton+graph": ROW | {"ratio": 0.7}}
    triton = {"triton": ROW, "eager": ROW | {"ratio": 3.0}, "triton+graph": ROW | {"ratio": 0.7}}
    text = report.tables(ABOUT_A_GPU | {"results": {"both": native, "one": triton}}, whole=True)
    heads = "ours | eager | ours in Triton | ours in a graph | ours in Triton in a graph | of the copy rate"
    assert f"| op and shape | {heads} | peak memory, ours / eager |" in text
    assert "| both | 0.1 ms | 3 x | 1.2 x | 0.8 x | 0.7 x |" in text
    assert "| one | 0.1 ms | 3 x |  | 0.7 x |  |" in text
    assert "| both | 0.2 ms | 1 x | 1.5 x | 1 x | 1 x |" in text

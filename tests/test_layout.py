"""The shape of the tree: twins by name, imports that point the right way, benchmarks that are collected."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deeplab_fast.ops import dispatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deeplab_fast"
SHARED = {"__init__", "batch_norm_common", "dispatch", "gpu", "native", "precision"}
# Forms of an op in a file of their own, their kernels in that op's.
FORMS = {"depthwise_conv_normalised"}
OPS = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - SHARED - FORMS
# What the kernels of several ops share.
KERNEL_PARTS = {"__init__", "bilinear", "common", "depthwise_chains", "depthwise_gather"}
# Where the kernel of a backend may lie; the reference is in the op's own file.
KERNELS = {
    "native": ("csrc/cpu/{}.cpp", "csrc/cuda/{}.cu"),
    "triton": ("deeplab_fast/kernels/{}.py",),
    "reference": ("deeplab_fast/ops/{}.py",),
}
# The importer's name starts with the first, and no name that it imports starts with the second.
FORBIDDEN = [
    ("deeplab_fast.ops", "deeplab_fast.model"),
    ("deeplab_fast.ops", "deeplab_fast.data"),
    ("deeplab_fast.kernels", "deeplab_fast.ops"),
    ("deeplab_fast.kernels", "deeplab_fast.model"),
    ("deeplab_fast", "deeplab_fast.train"),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, inside functions too: `a.b.c` for `from a.b import c`."""
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def registered_by(op: str) -> set[str]:
    """What an op's file registers: the op, and what its gradient or its training form is made of."""
    longer = {other for other in OPS if other.startswith(f"{op}_")}
    names = {name for name in dispatch.OPS if name == op or name.startswith(f"{op}_")}
    return {name for name in names if not any(name == other or name.startswith(f"{other}_") for other in longer)}


def test_every_op_is_registered():
    assert set(dispatch.OPS) >= OPS
    assert set(dispatch.OPS) == set().union(*map(registered_by, OPS))


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_has_its_test_its_benchmark_and_its_kernels(op):
    assert (ROOT / f"tests/ops/test_{op}.py").exists()
    assert (ROOT / f"benchmarks/bench_{op}.py").exists()
    for backend in dispatch.OPS[op].backends:
        places = [place.format(op) for place in KERNELS[backend]]
        assert any((ROOT / place).exists() for place in places), f"{op}: {backend} has none of {places}"


def test_no_orphans():
    """Whatever is named after an op belongs to one whose table has that backend."""
    for backend, places in KERNELS.items():
        owners = {op for op in OPS if backend in dispatch.OPS[op].backends}
        for place in places if backend != "reference" else ():
            found = {path.stem for path in ROOT.glob(place.format("*"))} - KERNEL_PARTS
            assert found <= owners, f"{place}: no op has {found - owners} as {backend}"
    modules = {path.stem for path in PACKAGE.rglob("*.py")} | {path.parent.stem for path in PACKAGE.rglob("*.py")}
    ops_modules = {path.stem for path in (PACKAGE / "ops").glob("*.py")}
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests/ops").glob("test_*.py")} <= ops_modules
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} <= modules


@pytest.mark.parametrize("importer, forbidden", FORBIDDEN)
def test_imports_point_the_right_way(importer, forbidden):
    for path in PACKAGE.rglob("*.py"):
        if within(module_name(path), importer):
            wrong = [name for name in imported(path) if within(name, forbidden)]
            assert not wrong, f"{module_name(path)} imports {wrong}"


def test_no_op_imports_another():
    for op in OPS | FORMS:
        for name in imported(PACKAGE / "ops" / f"{op}.py"):
            for other in OPS - {op}:
                own = within(name, f"deeplab_fast.ops.{other}") and not name.endswith("_reference")
                assert not own, f"{op} imports {name}"


def test_the_model_names_no_backend():
    backends = set(KERNELS)
    for path in (PACKAGE / "model").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
            value = node.value if isinstance(node, ast.Constant) else None
            assert name != "backend" and value not in backends, f"{path.name}:{node.lineno} names a backend"


def test_import_brings_in_no_kernel():
    code = "import sys, deeplab_fast; print(sorted(m for m in sys.modules if m[:6] in ('triton', 'deepla')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stdout)
    assert "deeplab_fast.ops.confusion_matrix" in loaded
    kernels = [m for m in loaded if m == "deeplab_fast._C" or within(m, "deeplab_fast.kernels") or within(m, "triton")]
    assert not kernels


def test_csrc_knows_no_torch_and_only_the_bindings_know_python():
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        if path.parent.name != "bind" and path.name != "module.cpp":
            assert not [name for name in includes if name.startswith(("pybind11/", "Python.h"))], path


def test_cmake_lists_every_source():
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in (ROOT / "csrc").rglob("*.c*"):
        assert path.relative_to(ROOT).as_posix() in listed, f"{path.name} is compiled nowhere"


def test_the_benchmarks_are_collected():
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--collect-only", "-q"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert f"benchmarks/{path.name}::bench_" in result.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A clone in which .ci/run deletes what it deletes, and stops at its first stage."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    blocks = "".join(f"<!-- setup: {name} -->\n```bash\nexit 3\n```\n" for name in ("train", "test"))
    (tmp_path / "README.md").write_text(blocks)
    return tmp_path


def run_ci(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "CI_FORCE")} | variables
    return subprocess.run(["bash", ".ci/run"], cwd=checkout, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("folder", ["runs", ".venv"])
def test_ci_run_deletes_nothing_of_a_contributor(checkout, folder):
    (checkout / folder).mkdir()
    result = run_ci(checkout)
    assert result.returncode == 1 and f"would delete {checkout / folder}" in result.stderr
    assert (checkout / folder).exists()


@pytest.mark.parametrize("variables", [{"CI": "true"}, {"CI_FORCE": "1"}])
def test_ci_run_starts_from_nothing_where_it_may(checkout, variables):
    (checkout / "runs").mkdir()
    assert run_ci(checkout, **variables).returncode == 3
    assert not (checkout / "runs").exists()


def test_ci_run_starts_in_a_fresh_clone(checkout):
    assert run_ci(checkout).returncode == 3


def test_the_header_of_ci_run_names_its_stages():
    text = (ROOT / ".ci" / "run").read_text()
    header = re.findall(r"^#   (.+?)  ", text.partition("\nset ")[0], flags=re.MULTILINE)
    assert header == re.findall(r'\bstage "([^"]+)"', text)


def test_names_and_sizes():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
    names = {path.stem for folder in (PACKAGE, ROOT / "csrc") for path in folder.rglob("*.*")}
    assert not names & {"utils", "util", "helpers", "helper", "misc"}

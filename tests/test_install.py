"""What setup.py decides, what `_C` says of itself, and (slow) a whole install in a fresh environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from deeplab_fast.ops import native

pytest.importorskip("setuptools", reason="setup.py needs setuptools, and this environment has none")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deeplab_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(tmp_path) -> dict[str, str]:
    """An environment whose PATH holds a compiler and nvcc, both empty programs."""
    for name in ("c++", "nvcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").touch()
    return {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "none")}


def test_native_is_built_where_there_is_a_compiler(setup, tools, tmp_path):
    assert setup.native_why_not(tools, str(tmp_path)) is None
    assert setup.native_why_not({**tools, "DEEPLAB_FAST_NATIVE": "1"}, str(tmp_path)) is None
    assert setup.native_why_not({**tools, "DEEPLAB_FAST_NATIVE": "0"}, str(tmp_path)) == "DEEPLAB_FAST_NATIVE=0"


def test_without_a_compiler_or_headers_it_is_pure_python(setup, tools, tmp_path):
    no_compiler = {"PATH": str(tmp_path / "none")}
    assert setup.native_why_not(no_compiler, str(tmp_path)) == "no C++ compiler was found"
    assert setup.native_why_not({**tools, "CXX": "no-such-compiler"}, str(tmp_path)) == "no C++ compiler was found"
    assert "headers are not installed" in setup.native_why_not(tools, str(tmp_path / "none"))


def test_a_forced_build_has_no_excuse(setup, tools, tmp_path):
    forced = {
        "PATH": str(tmp_path / "none"),
        "DEEPLAB_FAST_NATIVE": "1",
        "DEEPLAB_FAST_CUDA": "1",
        "CUDA_HOME": "/none",
    }
    with pytest.raises(SystemExit, match="DEEPLAB_FAST_NATIVE=1, but no C\\+\\+ compiler was found"):
        setup.native_why_not(forced, str(tmp_path))
    with pytest.raises(SystemExit, match="DEEPLAB_FAST_CUDA=1, but nvcc was not found"):
        setup.cuda_compiler(forced)


def test_cuda_follows_the_toolkit_and_never_a_gpu(setup, tools, tmp_path):
    assert setup.cuda_compiler(tools) == str(tmp_path / "nvcc")
    assert setup.cuda_compiler({**tools, "DEEPLAB_FAST_CUDA": "0"}) is None
    assert setup.cuda_compiler({"PATH": "", "CUDA_HOME": str(tmp_path / "none")}) is None
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "nvcc", tmp_path / "bin" / "nvcc")
    assert setup.cuda_compiler({"PATH": "", "CUDA_HOME": str(tmp_path)}) == str(tmp_path / "bin" / "nvcc")
    assert setup.cuda_compiler({"PATH": "", "CUDACXX": str(tmp_path / "nvcc")}) == str(tmp_path / "nvcc")


def test_a_switch_is_0_or_1(setup):
    with pytest.raises(SystemExit, match="DEEPLAB_FAST_CUDA is 'yes'; expected 0, 1 or nothing"):
        setup.cuda_compiler({"DEEPLAB_FAST_CUDA": "yes"})


def test_the_compiler_is_named_to_cmake(setup, tools, tmp_path):
    assert setup.find_compiler(tools) == str(tmp_path / "c++")
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    chosen = setup.find_compiler({**tools, "CXX": "clang++ --target=x"})
    assert chosen == f"{tmp_path / 'clang++'};--target=x"
    assert f"-DCMAKE_CXX_COMPILER={chosen}" in setup.cmake_arguments(chosen, None)


def test_another_compiler_empties_the_build_folder(setup, tmp_path):
    build, kept = tmp_path / "build" / "here", tmp_path / "build" / "here" / "CMakeCache.txt"
    build.mkdir(parents=True)
    for compilers, stays in (("g++", False), ("g++", True), ("clang++", False), ("clang++", True)):
        kept.touch()
        setup.prepare(build, compilers)
        assert build.is_dir() and kept.exists() == stays


def configure(setup: ModuleType, build: Path, nvcc: str | None = None) -> subprocess.CompletedProcess[str]:
    """CMake's first pass, by the package that the install builds with: a system's own may be too old."""
    pytest.importorskip("cmake")
    compiler = setup.find_compiler(os.environ)
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [sys.executable, "-m", "cmake", "-S", str(ROOT), "-B", str(build), *setup.cmake_arguments(compiler, nvcc)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("value", ["", "1"])
def test_warnings_are_errors_only_where_asked_for(setup, tmp_path, monkeypatch, value):
    monkeypatch.setenv("DEEPLAB_FAST_WERROR", value)
    result = configure(setup, tmp_path)
    assert result.returncode == 0, result.stderr
    commands = (tmp_path / "compile_commands.json").read_text()
    assert "-Wall" in commands and ("-Werror" in commands) == (value == "1")


def test_a_toolkit_that_knows_no_wanted_chip(setup, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_52\n")
    nvcc.chmod(0o755)
    result = configure(setup, tmp_path / "build", str(nvcc))
    assert result.returncode != 0
    assert "can compile for none of sm 80, 86" in " ".join(result.stderr.split())


def test_status_says_what_is_there():
    module = native.load()
    if module is None:
        assert "deeplab_fast._C is not built" in native.status()
        return
    assert module.instruction_set() == module.instruction_sets()[0]
    assert module.instruction_sets()[-1] == "portable"
    assert f"native kernels: {module.instruction_set()}, " in native.status()
    assert ("no CUDA" in native.status()) == (not module.cuda)


def test_why_not_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(cuda=""))
    assert "built without CUDA" in native.why_not(gpu)
    old_driver = SimpleNamespace(
        cuda="13.0", cuda_why_not=lambda: "the driver is too old (cudaErrorInsufficientDriver)"
    )
    monkeypatch.setattr(native, "load", lambda: old_driver)
    assert "cannot be used: the driver is too old" in native.why_not(gpu)
    assert native.why_not(torch.device("cpu")) is None
    assert "no native kernels for the device meta" in native.why_not(torch.device("meta"))


@pytest.mark.parametrize("chip", [(8, 0), (8, 6), (8, 7), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_chips_that_the_build_covers(chip):
    assert native.chip_why_not(chip, "80,86,89,90,100,120") is None


@pytest.mark.parametrize("chip", [(7, 5), (11, 0)])
def test_chips_that_the_build_does_not_cover(chip):
    expected = f"was built for sm 80,86,120, and the device is sm_{chip[0]}{chip[1]}"
    assert expected in native.chip_why_not(chip, "80,86,120")


def test_a_driver_is_asked_and_not_needed():
    module = native.load()
    if module is None or not module.cuda:
        pytest.skip("deeplab_fast._C is not built with CUDA")
    assert module.cuda_why_not() is None or "cudaError" in module.cuda_why_not()


def test_kernel_objects_share_no_inline_function(setup):
    """A weak symbol of an AVX-512 object could be the copy that the linker keeps for every processor."""
    objects = sorted(setup.BUILD.glob("CMakeFiles/kernels_avx*.dir/**/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no build folder, or no nm")
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        assert not [line for line in symbols.splitlines() if line[17:18] in "WVu" and line[17:18]], path


def run(*command: str, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The sources alone, as in a fresh clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("csrc", "deeplab_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def test_pure_python_metadata(copy):
    """DEEPLAB_FAST_NATIVE=0 asks for no extension, and takes an old one away."""
    (copy / "deeplab_fast" / "_C.stale.so").touch()
    out = run(sys.executable, "setup.py", "--version", cwd=copy, DEEPLAB_FAST_NATIVE="0")
    assert "pure Python, because DEEPLAB_FAST_NATIVE=0" in out and "0.1.0" in out
    assert not (copy / "deeplab_fast" / "_C.stale.so").exists()


@pytest.mark.slow
def test_install_twice_in_isolation_without_torch(copy, tmp_path):
    """Builds with pip's isolation in an empty environment; a second install recompiles no kernel."""
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip", "install", "--no-deps", "-e", "."]
    run(*pip, cwd=copy)
    kernels = {path: path.stat().st_mtime_ns for path in copy.glob("build/*/CMakeFiles/kernels_*.dir/**/*.o")}
    assert kernels
    run(*pip, cwd=copy)
    assert kernels == {path: path.stat().st_mtime_ns for path in kernels}
    assert list((copy / "deeplab_fast").glob("_C.*.so"))
    run(*pip, cwd=copy, DEEPLAB_FAST_NATIVE="0")
    assert not list((copy / "deeplab_fast").glob("_C.*.so"))


@pytest.mark.slow
def test_a_build_that_fails_is_not_swallowed(copy, tmp_path):
    source = copy / "csrc" / "cpu" / "confusion_matrix.cpp"
    text = source.read_text()
    source.write_text("#error broken\n" + text)
    try:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path), "."]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    finally:
        source.write_text(text)
    assert result.returncode != 0 and "broken" in result.stdout + result.stderr

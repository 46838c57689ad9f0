"""Builds deeplab_fast._C with CMake and ninja.

What is built is decided here; sources, flags and architectures are CMakeLists.txt's. Switches of the environment:
DEEPLAB_FAST_NATIVE=0: pure Python. =1: a missing compiler is an error.
DEEPLAB_FAST_CUDA=0: no CUDA kernels. =1: a missing nvcc is an error.
DEEPLAB_FAST_WERROR=1: a compiler's warning is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Kept between installs, one for each Python and platform.
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def flag(environ: Mapping[str, str], name: str) -> bool | None:
    """True for 1, False for 0, None where the variable is unset or empty."""
    if (value := environ.get(name, "")) not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}; expected 0, 1 or nothing")
    return value == "1" if value else None


def which(names: Iterable[str | None], environ: Mapping[str, str]) -> str | None:
    """The path of the first of these programs that there is."""
    return next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names if name)), None)


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The C++ compiler that CMake would take, with its arguments, as CMake's list."""
    name, *arguments = environ.get("CXX", "").split() or [None]
    compiler = which([name] if name else ["c++", "g++", "clang++"], environ)
    return ";".join([compiler, *arguments]) if compiler and sys.platform != "win32" else None


def native_why_not(environ: Mapping[str, str], include: str | None = None) -> str | None:
    """None where deeplab_fast._C is to be built; otherwise why it is not. A forced build has no excuse."""
    wanted = flag(environ, "DEEPLAB_FAST_NATIVE")
    if wanted is False:
        return "DEEPLAB_FAST_NATIVE=0"
    header = Path(include or sysconfig.get_path("include")) / "Python.h"
    reason = None if header.exists() else f"Python's headers are not installed ({header})"
    if find_compiler(environ) is None:
        reason = "no C++ compiler was found"
    if wanted and reason:
        raise SystemExit(f"DEEPLAB_FAST_NATIVE=1, but {reason}")
    return reason


def cuda_compiler(environ: Mapping[str, str]) -> str | None:
    """nvcc where the CUDA kernels are to be built: CUDACXX, then PATH, then the toolkit's folder. Asks for no GPU."""
    wanted = flag(environ, "DEEPLAB_FAST_CUDA")
    home = environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = None if wanted is False else which([environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc"], environ)
    if wanted and nvcc is None:
        raise SystemExit("DEEPLAB_FAST_CUDA=1, but nvcc was not found (put it on PATH or set CUDACXX)")
    return nvcc


def cmake_arguments(compiler: str, nvcc: str | None) -> list[str]:
    """Everything that a kept build folder would otherwise remember from an earlier install."""
    import pybind11

    ninja = shutil.which("ninja")
    if ninja is None:
        raise SystemExit("ninja was not found; `pip install ninja`")
    return [
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_CXX_COMPILER={compiler}"),
        f"-DDEEPLAB_FAST_WERROR={'ON' if flag(os.environ, 'DEEPLAB_FAST_WERROR') else 'OFF'}",
        f"-DDEEPLAB_FAST_CUDA={'ON' if nvcc else 'OFF'}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
    ]


def prepare(build: Path, compilers: str) -> None:
    """Makes the build folder, empty where other compilers filled it: CMake cannot change them in place."""
    stamp = build / "compilers.txt"
    if not stamp.exists() or stamp.read_text() != compilers:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        stamp.write_text(compilers)


class CMakeBuild(build_ext):
    """Configures, builds what changed, and puts the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        compilers = find_compiler(os.environ), cuda_compiler(os.environ)
        prepare(BUILD, str(compilers))
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(BUILD), *cmake_arguments(*compilers)], check=True)
        subprocess.run(["cmake", "--build", str(BUILD)], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: writing over a module that a running process has mapped would crash it.
        fresh = shutil.copy2(BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", target.with_suffix(".new"))
        os.replace(fresh, target)


def main() -> None:
    reason = native_why_not(os.environ)
    if reason:
        print(f"deeplab_fast: pure Python, because {reason}", file=sys.stderr)
        for stale in (ROOT / "deeplab_fast").glob("_C.*.so"):
            stale.unlink()
    setup(ext_modules=[] if reason else [Extension("deeplab_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})


if __name__ == "__main__":
    main()

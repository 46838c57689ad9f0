"""Every .cu for every chip that is built for: no warning, no spill, registers that leave room for other blocks, and no
atomic on floats. nvcc asks for no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
CMAKE = (ROOT / "CMakeLists.txt").read_text()
CHIPS = re.search(r"CUDA_ARCHITECTURES_WANTED ([\d ]+)\)", CMAKE)[1].split()
# Registers of a thread, of 65,536 for a multiprocessor: blocks of 256 threads of which 2 are to fit, or 4; one of the
# kernels with three taps (<3>: ILi3E). Depthwise convolutions have blocks of 128 threads of which 3 are to fit, or 5 in
# fp32.
REGISTERS = {
    "augment_image": 64,
    "confusion_matrix": 64,
    "depthwise_conv": 168,
    "kth_largest": 64,
    "upsample_argmax": 128,
    "upsample_confusion_matrix": 128,
}
EXCEPTIONS = {"ILi3E": 168, "convolve_tilesIf": 96}
WARNINGS = ("-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


class Kernel(NamedTuple):
    name: str
    chip: str
    registers: int
    stack: int
    spills: int


def kernels(report: str) -> list[Kernel]:
    """What ptxas says under -v, for each kernel and chip."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, flags=re.DOTALL)
    return [Kernel(name, chip, int(used), int(stack), int(a) + int(b)) for name, chip, stack, a, b, used in found]


def known_chips() -> list[str]:
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [chip for chip in CHIPS if f"compute_{chip}" in listed]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_every_chip_without_spills(source, tmp_path):
    def report(chip: str) -> str:
        command = [NVCC, "-std=c++17", "-O3", "-Xptxas=-v", *WARNINGS, f"-gencode=arch=compute_{chip},code=sm_{chip}"]
        result = subprocess.run(
            [*command, "-c", str(source), "-o", str(tmp_path / f"{chip}.o")], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    chips = known_chips()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = kernels("".join(pool.map(report, chips)))
    assert {kernel.chip for kernel in found} == set(chips)
    for kernel in found:
        assert kernel.stack == kernel.spills == 0, kernel
        exceptions = [most for name, most in EXCEPTIONS.items() if name in kernel.name]
        most = (exceptions or [REGISTERS[source.stem]])[0]
        assert kernel.registers <= most, kernel


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_ptx(source, tmp_path):
    """Vector loads and stores where they are meant, and sums that no order changes."""
    out = tmp_path / "out.ptx"
    subprocess.run([NVCC, "-std=c++17", "-O3", "-arch=compute_80", "-ptx", str(source), "-o", str(out)], check=True)
    ptx = out.read_text()
    assert not re.search(r"\b(atom|red)\.[\w.]*\.(f16|f16x2|bf16|bf16x2|f32|f64)\b", ptx)
    assert not re.search(r"\b(ld|st)\.local\b", ptx)
    if source.stem == "confusion_matrix":
        assert re.search(r"ld\.global\.nc\.v4\.[bu]32", ptx) and re.search(r"ld\.global\.nc\.v2\.[bus]64", ptx)
    elif source.stem == "depthwise_conv":
        assert {"fma.rn.f32", "cp.async.cg.shared.global", "cvt.rn.bf16x2.f32", "max.NaN.bf16x2"} <= set(ptx.split())
        for vectors in ("ld.global.nc", "ld.shared", "st.global"):
            assert re.search(rf"{vectors}\.v4\.[bfu]32", ptx), vectors
        assert re.search(r"mul\.wide\.u32", ptx)  # coordinates by steps, in 64 bits
    elif source.stem == "augment_image":
        assert "fma.rn.f32" in ptx and "ld.global.nc.u8" in ptx and not re.search(r"\.f64\b", ptx)
    elif source.stem == "kth_largest":
        assert re.search(r"ld\.global\.nc\.v4\.[bu]32", ptx) and not re.search(r"\b(add|mul|fma)[\w.]*\.f32", ptx)
    else:
        assert "fma.rn.f32" in ptx and re.search(r"ld\.shared\.[bf]32", ptx)
    if source.stem == "upsample_argmax":
        assert re.search(r"st\.global\.[bu]32", ptx)  # four labels at once


def test_every_source_has_a_bound():
    assert {path.stem for path in SOURCES} == set(REGISTERS)

"""Compiles what a Triton launcher would launch, for a chip that is not there.

`compile_launches(90, lambda: kernel_module.launcher(...))` runs the launcher on CPU tensors; each kernel that it
launches is compiled for sm_90 with the constants, the options and the alignments of that launch, and nothing runs.

DEEPLAB_FAST_COMPILED_LOG=FILE appends a line of JSON for each kernel; `python -m tests.ahead_of_time FILE...` renders
such files as tests/ahead_of_time.md, the record of what was compiled with which Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

CHIPS = (80, 86, 89, 90, 100, 120)
# Shared memory of one block, bytes: CUDA C++ programming guide, technical specifications per compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed, or runs as an interpreter, which compiles nothing",
)


class Compiled(NamedTuple):
    name: str
    ptx: str
    registers: int
    stack: int  # bytes of local memory of a thread: spills, and arrays that are indexed at run time
    shared: int  # bytes of a block


def compile_launches(chip: int, run: Callable[[], Any]) -> list[Compiled]:
    """What `run` launches, compiled for the chip and within its shared memory; fails where it launches nothing."""
    from deeplab_fast.kernels import common

    found: list[Compiled] = []

    def compile_one(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if 0 not in grid:
            found.append(_compile(chip, kernel, arguments, constants))

    with mock.patch.object(common, "launch", compile_one), mock.patch.object(common, "capability", lambda device: chip):
        run()
    assert found, "nothing was launched"
    for kernel in found:
        assert kernel.shared <= SHARED[chip], f"{kernel.name} takes {kernel.shared} bytes of shared memory on sm_{chip}"
    return found


def check_passes(found: list[Compiled], chip: int) -> None:
    """Of batch norm: no spills or atomics; 16 bytes a load, and a store of activations; offsets of 64 bits."""
    for kernel in found:
        assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes on sm_{chip}"
        assert not re.search(r"\b(atom|red)\.", kernel.ptx)
        assert "ld.global.v4" in kernel.ptx or "cp.async.cg" in kernel.ptx, kernel.name
        if kernel.name in ("_forward", "_gradient"):
            assert "st.global.v4" in kernel.ptx and "st.global.b" not in kernel.ptx
        if kernel.name not in ("_merge", "_add"):
            assert "mul.lo.s64" in kernel.ptx


def _compile(chip: int, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deeplab_fast.kernels.common import OPTIONS

    options = {name: constants[name] for name in OPTIONS if name in constants} | {"enable_fp_fusion": True}
    values = {**dict(zip(kernel.arg_names, arguments, strict=False))}
    values |= {name: value for name, value in constants.items() if name not in OPTIONS}
    declared_constant = {kernel.arg_names[i] for i in kernel.constexprs}
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in declared_constant or value is None or isinstance(value, int) and value == 1 and value is not True:
            signature[name], fixed[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return _compiled(
        chip, kernel, tuple(signature.items()), tuple(fixed.items()), repr(attributes), tuple(options.items()),
        lambda: (ASTSource(kernel, signature, fixed, attributes), GPUTarget("cuda", chip, 32), options),
    )  # fmt: skip


_cache: dict[Any, Compiled] = {}


def _compiled(
    chip: int, kernel: Any, signature: Any, fixed: Any, attributes: str, options: Any, source: Any
) -> Compiled:
    import triton

    key = (chip, kernel, signature, repr(fixed), attributes, options)
    if key not in _cache:
        src, target, opts = source()
        built = triton.compile(src, target=target, options=opts)
        registers, stack = _resources(built.asm["cubin"])
        _cache[key] = Compiled(built.metadata.name, built.asm["ptx"], registers, stack, built.metadata.shared)
        _log(chip, dict(signature), _cache[key])
    return _cache[key]


def _log(chip: int, signature: dict[str, str], kernel: Compiled) -> None:
    import triton

    if path := os.environ.get("DEEPLAB_FAST_COMPILED_LOG"):
        line = {"triton": triton.__version__, "chip": chip, **kernel._asdict()}
        del line["ptx"]
        line["dtype"] = next((kind[1:] for kind in signature.values() if kind.startswith("*")), "")
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def render(paths: list[str]) -> str:
    """A table for each Triton, of the most that any launch of a kernel takes."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    text = ["# Triton kernels, compiled ahead of time", ""]
    text += ["Registers of a thread / bytes of stack / KB of shared memory of a block: the most of all launches that"]
    text += ["the tests compile. Written by `python -m tests.ahead_of_time`.", ""]
    for version in sorted({line["triton"] for line in lines}):
        text += [f"## Triton {version}", "", "| kernel | dtype | launches |" + "".join(f" sm_{c} |" for c in CHIPS)]
        text += ["|---|---|---|" + "---|" * len(CHIPS)]
        own = [line for line in lines if line["triton"] == version]
        for name, dtype in sorted({(line["name"], line["dtype"]) for line in own}):
            same = [line for line in own if (line["name"], line["dtype"]) == (name, dtype)]
            cells = []
            for chip in CHIPS:
                here = [line for line in same if line["chip"] == chip]
                most = [max(line[key] for line in here) for key in ("registers", "stack", "shared")] if here else None
                cells.append(f"{most[0]} / {most[1]} / {most[2] / 1024:.0f}" if most else "")
            text.append(f"| `{name}` | {dtype} | {len(same)} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


@functools.cache
def _cuobjdump() -> str:
    import triton

    inside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(inside) if inside.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump is not installed")
    return found


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", text))
    stack = max(int(a) + int(b) for a, b in re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", text))
    return registers, stack


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(render(sys.argv[1:]))

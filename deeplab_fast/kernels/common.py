"""What every Triton kernel's launcher shares: how it is launched, and where its configuration comes from."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes on the bit patterns of bf16: a kernel casts what it would else leave in bf16, such as the
# operands of a dot. On the chip that cast would turn the dot's bf16 instructions into tf32.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

TUNED = Path(__file__).with_name("tuned.json")  # written by benchmarks/tune.py
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 as `dtype`, rounded to nearest, ties to even: the interpreter's own cast to bf16 cuts off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # The low bits go: of a zero's, the interpreter's cast would make the largest denormal number.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants) on the device and the current stream of the first tensor.

    constants: the kernel's constexprs by name, num_warps and num_stages. A grid of no programs launches nothing.
    """
    if 0 in grid:
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


def capability(device: torch.device) -> int:
    """The chip as in sm_90: 90; of the interpreter, 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configuration(op: str, case: str, x: Tensor) -> dict[str, int]:
    """Constants and launch options of one case of an op, for x's dtype and device, from tuned.json.

    The table is {op: {case: {chip: {dtype: {name: value}}}}}. Taken is the chip's own entry, else that of the nearest
    earlier chip in the table, else "any"; in it the dtype's own, else "any". A case that the table lacks raises.
    """
    return dict(_configuration(op, case, str(x.dtype).removeprefix("torch."), capability(x.device)))


@functools.cache
def _configuration(op: str, case: str, dtype: str, chip: int) -> Mapping[str, int]:
    chips = _table()[op][case]
    earlier = sorted((int(name) for name in chips if name != "any" and int(name) <= chip), reverse=True)
    for name in (*map(str, earlier), "any"):
        for kind in (dtype, "any"):
            if found := chips.get(name, {}).get(kind):
                return found
    raise KeyError(f"{TUNED.name} has no {op} / {case} for {dtype} on sm_{chip}")


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TUNED.read_text())


def tl_dtype(x: Tensor) -> tl.dtype:
    return TL_DTYPES[x.dtype]


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)

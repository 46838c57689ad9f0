"""Where a command computes: device, precision, threads and the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

from .errors import UserError
from .ops import native

# glibc's mallopt parameter numbers (malloc.h); values are C ints, so 1 << 30 is the largest power of two.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def resolve_device(name: str) -> torch.device:
    """`auto` takes the current CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this torch sees {count} CUDA devices")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: a CPU runs fp32 or bf16")
        return named[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `dtype`; nothing for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def set_allocator(keep: bool = True) -> bool:
    """Make glibc keep freed memory, and say whether it agreed.

    By default every large tensor is mapped, zeroed by the kernel page by page and unmapped again. Commands call this
    for their own process; importing the package never does. keep=False goes back to glibc's initial thresholds and
    returns what is free: for benchmarks, which show both.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # a C library without mallopt, such as musl
        return False
    if not keep:
        initial = {_M_TRIM_THRESHOLD: 1 << 17, _M_TOP_PAD: 0, _M_MMAP_THRESHOLD: 1 << 17}
        accepted = [mallopt(parameter, value) == 1 for parameter, value in initial.items()]
        ctypes.CDLL(None).malloc_trim(0)
        return all(accepted)
    accepted = [mallopt(_M_TRIM_THRESHOLD, 1 << 30) == 1, mallopt(_M_TOP_PAD, 1 << 26) == 1]
    # Older releases refuse a threshold above half a heap, 32 MiB.
    accepted.append(mallopt(_M_MMAP_THRESHOLD, 1 << 30) == 1 or mallopt(_M_MMAP_THRESHOLD, 1 << 25) == 1)
    return all(accepted)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """For a command's first output: device and precision, and on a second line why there are no native kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    line = f"{name}, {str(dtype).removeprefix('torch.')}"
    reason = native.why_not(device)
    return f"{line}\nthe ops run in plain PyTorch: {reason}" if reason else line

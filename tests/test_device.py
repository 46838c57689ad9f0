"""Device, precision and allocator."""

from __future__ import annotations

import platform

import pytest
import torch

from deeplab_fast.device import autocast, describe, resolve_device, resolve_precision, set_allocator
from deeplab_fast.errors import UserError
from deeplab_fast.ops import native


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x"])
def test_unknown_device_is_one_sentence(name):
    with pytest.raises(UserError, match=f"--device {name}: expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_absent_gpu_is_named():
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"--device cuda:{count + 3}: this torch sees {count} CUDA devices"):
        resolve_device(f"cuda:{count + 3}")


def test_auto_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has_bf16: {"avx512_bf16": has}, raising=False)
        assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("fp32", cpu) == torch.float32
    with pytest.raises(UserError, match="--precision fp16: a CPU runs fp32 or bf16"):
        resolve_precision("fp16", cpu)


def test_autocast_casts_to_the_precision():
    layer = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            assert layer(x).dtype == dtype


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_allocator_accepts_the_settings():
    assert set_allocator()


def test_commands_say_where_there_are_no_native_kernels(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(native, "load", lambda: None)
    first, second = describe(cpu, torch.float32).splitlines()
    assert first == f"CPU, {torch.get_num_threads()} threads, float32"
    assert second.startswith("the ops run in plain PyTorch: deeplab_fast._C is not built")

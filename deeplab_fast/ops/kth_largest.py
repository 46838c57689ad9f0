"""The k-th largest of some values: the loss from which on a pixel is a hard one.

    kth_largest(x, k) = the smallest of the k largest values of x; NaN where x holds one

`topk` copies all values together with their indices and orders the largest k of them; here the values are read three
times and counted by 11 bits each time, and nothing of their size is written.
Source: Alabi et al., "Fast k-Selection Algorithms for Graphics Processing Units", section 3.2 (radix selection).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, native

NO_GRADIENT = "has no gradient: it is a threshold"


def kth_largest_reference(x: Tensor, k: int) -> Tensor:
    """The specification, in plain PyTorch, without waiting for the device.

    By topk, not kthvalue: on a GPU that is one thread block's work, and has no repeatable form.
    """
    return x.flatten().topk(k, sorted=False).values.amin()


def kth_largest(x: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """The smallest of the k largest values, without a host synchronisation.

    x: (...) of any floating-point type and any strides, at least one value. Infinities are values like others; 0 and -0
    are equal. k: 1 to x.numel().
    Returns () of x's dtype: exactly a value of x, NaN where x holds a NaN, whatever k.
    Raises ValueError on dtypes and k, RuntimeError where x asks for a gradient, UserError where a named backend cannot
    run.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating-point type")
    if not 1 <= k <= x.numel():
        raise ValueError(f"k is {k}; expected 1 to {x.numel()}, the number of values of x {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(f"kth_largest {NO_GRADIENT}; call it under torch.no_grad()")
    return dispatch.run("kth_largest", x, k, backend=backend)


def _native_why_not(x: Tensor, *_: object) -> str | None:
    if reason := native.why_not(x.device):
        return reason
    return None if x.dtype == torch.float32 else f"the kernels take float32, and got {x.dtype}"


def _native(x: Tensor, k: int) -> Tensor:
    x = x.contiguous()
    value = x.new_empty(())
    arguments = (x.data_ptr(), x.numel(), k, value.data_ptr())
    if x.is_cuda:
        kernels = native.kernels()
        counts = x.new_zeros(kernels.kth_largest_counts, dtype=torch.int64)
        kernels.kth_largest_cuda(*arguments, counts.data_ptr(), *native.device_and_stream(x))
    else:
        native.kernels().kth_largest_cpu(*arguments, torch.get_num_threads())
    return value


# AMD EPYC (AVX-512), 2 threads, 8 x 512 x 1024 losses, k of a sixteenth to a quarter: topk takes 15 to 21 times as
# long, kthvalue 11 to 14 (benchmarks/results/amd_epyc_threshold_and_concat.md).
# The CUDA kernel runs in an emulator (tests/test_cuda_emulator.py) and has not been timed on a GPU.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "reference": dispatch.Backend(kth_largest_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(x: Tensor, k: int, backend: str) -> Tensor:
    return x.new_empty(())


def _example(device: torch.device) -> tuple[Tensor, int]:
    return torch.zeros(3, device=device), 2


dispatch.register("kth_largest", "(Tensor x, SymInt k, str backend) -> Tensor", BACKENDS, _fake, _example)
dispatch.forbid_gradient("kth_largest", NO_GRADIENT)

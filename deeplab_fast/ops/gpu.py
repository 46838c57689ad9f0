"""The door to the Triton kernels: says whether they run on given tensors. Importing it imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
MOST_IMAGES = 65535  # programs in the second dimension of a CUDA grid


def triton_why_not(*tensors: Tensor | None) -> str | None:
    """None where Triton kernels take these tensors, all of one dtype of FLOAT_DTYPES on one device, else the reason.

    With TRITON_INTERPRET=1 they run on the CPU, in Triton's interpreter: for tests, not for speed.
    """
    given = [x for x in tensors if x is not None]
    if reason := device_why_not(given[0].device):
        return reason
    if len({x.device for x in given}) > 1:
        return f"the tensors are on {', '.join(sorted({str(x.device) for x in given}))}"
    dtypes = {x.dtype for x in given}
    if len(dtypes) > 1 or not dtypes <= set(FLOAT_DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"the Triton kernels take float32, bfloat16 or float16, one for all, and got {names}"
    return None


def images_why_not(x: Tensor) -> str | None:
    """None where x has as many images as a grid's second dimension may count."""
    if x.shape[0] <= MOST_IMAGES:
        return None
    return f"the Triton kernels take at most {MOST_IMAGES} images, and got {x.shape[0]}"


@functools.cache
def device_why_not(device: torch.device) -> str | None:
    """None where Triton kernels run on this device, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs Triton kernels on the CPU"
    if device.type != "cuda":
        return "Triton kernels run on CUDA devices, or on the CPU with TRITON_INTERPRET=1"
    if torch.version.hip:
        return "torch is a ROCm build"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "the device is sm_{}{}, and the Triton kernels need sm_80".format(*capability)
    return None

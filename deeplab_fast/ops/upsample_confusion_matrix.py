"""Confusion matrix of bilinearly upsampled logits and a label map: evaluation without a map of predictions.

    prediction = argmax_k U(logits), U the bilinear resize to the target's size in fp32
    counts[t, p] = #{i : target[i] = t, prediction[i] = p, target[i] != ignore_index}
    out_of_range = #{i : target[i] != ignore_index, and target[i] is not in 0..K-1}

PyTorch writes and reads the full-resolution logits (4 K bytes a pixel), an int64 map, a mask and two compressed maps.
Here the low-resolution logits and the target are read once, and only the counts are written.
Source: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", section 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, native
from .confusion_matrix import confusion_matrix_reference
from .precision import compute_dtype

LARGEST_CLASSES = 32_768  # a bin is a 32-bit number
# The CPU has a table of counts for each thread, 8 MiB at most; on CUDA a label is a byte.
LARGEST_NATIVE_CLASSES = {"cpu": 1024, "cuda": 256}


def upsample_confusion_matrix_reference(
    logits: Tensor, target: Tensor, ignore_index: int | None = 255, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch on any device, without waiting for it."""
    logits = logits.to(compute_dtype(logits.dtype))
    upsampled = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=align_corners)
    return confusion_matrix_reference(upsampled.argmax(1), target, logits.shape[1], ignore_index)


def upsample_confusion_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = 255,
    align_corners: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Counts pixels by (truth, class of the largest upsampled logit), without a host synchronisation.

    logits: (N, K, h, w) of any floating dtype and any strides, K from 1 to 32768
    target: (N, H, W) uint8, int8, int16, int32 or int64 on the same device, any strides
    ignore_index: pixels whose target has this value are left out; None: none is
    Returns counts (K, K) int64, rows are the truth and columns the prediction, and out_of_range () int64: the
    pixels left out because their target is not in 0..K-1. Whoever reads the counts has to look at it. Ties, NaN and
    rounding are those of `upsample_argmax`. There is no gradient: the results are integers.
    Raises ValueError on shapes, dtypes and devices, UserError where a named backend cannot run.
    """
    if logits.dim() != 4 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}; expected floating (N, K, h, w)")
    if target.dtype not in native.LABEL_DTYPES:
        raise ValueError(f"target is {target.dtype}; expected uint8, int8, int16, int32 or int64")
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"target is {tuple(target.shape)}; expected ({logits.shape[0]}, H, W), as many as the logits")
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and target on {target.device}")
    if not 1 <= logits.shape[1] <= LARGEST_CLASSES:
        raise ValueError(f"logits have {logits.shape[1]} classes; expected 1 to {LARGEST_CLASSES}")
    if min(*target.shape[1:], *logits.shape[2:]) < 1:
        raise ValueError(
            f"cannot upsample {tuple(logits.shape[2:])} to {tuple(target.shape[1:])}; expected (h, w) and (H, W) >= 1"
        )
    return dispatch.run("upsample_confusion_matrix", logits, target, ignore_index, align_corners, backend=backend)


def _native_why_not(logits: Tensor, *_: object) -> str | None:
    if reason := native.float_why_not(logits):
        return reason
    if logits.shape[1] > (most := LARGEST_NATIVE_CLASSES[logits.device.type]):
        return f"the {logits.device.type.upper()} kernel takes at most {most} classes, and got {logits.shape[1]}"
    return None


def _native(logits: Tensor, target: Tensor, ignore_index: int | None, align_corners: bool) -> tuple[Tensor, Tensor]:
    # The kernels read rows of pixels as well as rows of classes; only other strides need a copy.
    if logits.stride(1) != 1 and logits.stride(3) != 1:
        logits = native.channels_last(logits)
    target = target.contiguous()
    classes = logits.shape[1]
    counts = target.new_zeros((classes, classes), dtype=torch.int64)
    out_of_range = target.new_zeros((), dtype=torch.int64)
    arguments = (
        *(logits.data_ptr(), native.CUDA_FLOAT_DTYPES.index(logits.dtype), logits.shape, logits.stride()),
        *(target.shape[1:], align_corners, target.data_ptr(), native.LABEL_DTYPES.index(target.dtype), ignore_index),
        *(counts.data_ptr(), out_of_range.data_ptr()),
    )
    if logits.is_cuda:
        native.kernels().upsample_confusion_matrix_cuda(*arguments, *native.device_and_stream(logits))
    else:
        native.kernels().upsample_confusion_matrix_cpu(*arguments, torch.get_num_threads())
    return counts, out_of_range


# AMD EPYC (AVX-512), torch 2.13, 2 threads, 19 x 128 x 256 to 512 x 1024, uint8 target, random / smooth logits: native
# 1.0 / .83 ms in fp32 and .92 / .81 in bf16; eager upsample, argmax and masked bincount 20 to 23 and 29 to 31.
# The CUDA kernel runs in an emulator (tests/test_cuda_emulator.py) and has not been timed on a GPU.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "reference": dispatch.Backend(upsample_confusion_matrix_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(
    logits: Tensor, target: Tensor, ignore_index: int | None, align_corners: bool, backend: str
) -> tuple[Tensor, Tensor]:
    counts = target.new_empty((logits.shape[1], logits.shape[1]), dtype=torch.int64)
    return counts, target.new_empty((), dtype=torch.int64)


def _example(device: torch.device) -> tuple[Tensor, Tensor, int, bool]:
    target = torch.zeros((1, 4, 6), dtype=torch.uint8, device=device)
    return torch.zeros((1, 2, 2, 3), device=device), target, 255, False


_op = dispatch.register(
    "upsample_confusion_matrix",
    "(Tensor logits, Tensor target, int? ignore_index, bool align_corners, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake,
    _example,
)

"""Confusion matrix of two label maps, the count behind every IoU.

    counts[t, p] = #{i : target[i] = t, prediction[i] = p, target[i] != ignore_index}
    out_of_range = #{i : target[i] != ignore_index, and target[i] or prediction[i] is not in 0..K-1}

Masked `torch.bincount` writes and reads a mask, two compressed maps and an int64 index (over 50 bytes a pixel
for int64 maps) and waits for the device twice. Here both maps are read once and no other is written.
Source: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, native

LARGEST_NUM_CLASSES = 32_768  # a bin is a 32-bit number


def confusion_matrix_reference(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = 255
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch on any device, without waiting for it."""
    prediction, target = prediction.reshape(-1).long(), target.reshape(-1).long()
    out = num_classes * num_classes  # the bin of labels out of range; the one after it takes ignored pixels
    in_range = (prediction >= 0) & (prediction < num_classes) & (target >= 0) & (target < num_classes)
    bins = torch.where(in_range, target * num_classes + prediction, out)
    if ignore_index is not None:
        bins = torch.where(target == ignore_index, out + 1, bins)
    counts = bins.new_zeros(out + 2).scatter_add_(0, bins, torch.ones_like(bins))
    return counts[:out].reshape(num_classes, num_classes).clone(), counts[out].clone()


def confusion_matrix(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = 255,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Counts pixels by (truth, prediction), without a host synchronisation.

    prediction, target: (...) of one shape and device, any strides; each uint8, int8, int16, int32 or int64
    num_classes: K, from 1 to 32768
    ignore_index: pixels whose target has this value are left out; None: none is
    Returns counts (K, K) int64, rows are the truth and columns the prediction, and out_of_range () int64: the
    pixels left out because prediction or target is not in 0..K-1. Whoever reads the counts has to look at it.
    Raises ValueError on shapes, dtypes and devices, UserError where a named backend cannot run.
    """
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.dtype not in native.LABEL_DTYPES:
            raise ValueError(f"{name} is {labels.dtype}; expected uint8, int8, int16, int32 or int64")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction is {tuple(prediction.shape)} and target {tuple(target.shape)}; expected one shape"
        )
    if prediction.device != target.device:
        raise ValueError(f"prediction is on {prediction.device} and target on {target.device}")
    if not 1 <= num_classes <= LARGEST_NUM_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; expected 1 to {LARGEST_NUM_CLASSES}")
    return _op(prediction, target, num_classes, ignore_index, backend)


def _native_why_not(prediction: Tensor, *_: object) -> str | None:
    return native.why_not(prediction.device)


def _native(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    prediction, target = prediction.contiguous(), target.contiguous()
    counts = target.new_zeros((num_classes, num_classes), dtype=torch.int64)
    out_of_range = target.new_zeros((), dtype=torch.int64)
    arguments = (
        *(prediction.data_ptr(), native.LABEL_DTYPES.index(prediction.dtype)),
        *(target.data_ptr(), native.LABEL_DTYPES.index(target.dtype)),
        *(target.numel(), num_classes, ignore_index, counts.data_ptr(), out_of_range.data_ptr()),
    )
    if target.is_cuda:
        native.kernels().confusion_matrix_cuda(*arguments, *native.device_and_stream(target))
    else:
        native.kernels().confusion_matrix_cpu(*arguments, torch.get_num_threads())
    return counts, out_of_range


# AMD EPYC (AVX-512), 2 threads, 1024 x 2048 int64, 19 classes, real-looking maps / random labels: native 1.3 / 1.9 ms,
# reference 14 / 14, masked torch.bincount 35 / 33, numpy 12 / 10
# (benchmarks/results/amd_epyc_counting_and_depthwise.json).
# The CUDA kernel runs in an emulator (tests/test_cuda_emulator.py) and has not been timed on a GPU.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "reference": dispatch.Backend(confusion_matrix_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    counts = target.new_empty((num_classes, num_classes), dtype=torch.int64)
    return counts, target.new_empty((), dtype=torch.int64)


def _example(device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    labels = torch.zeros((2, 3), dtype=torch.uint8, device=device)
    return labels, labels, 2, 255


_op = dispatch.register(
    "confusion_matrix",
    "(Tensor prediction, Tensor target, int num_classes, int? ignore_index, str backend) -> (Tensor, Tensor)",
    BACKENDS,
    _fake,
    _example,
)

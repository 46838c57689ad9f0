"""Label map of bilinearly upsampled logits: the last step of a prediction.

    labels[n, y, x] = argmax_k U(logits)[n, k, y, x], U the bilinear resize to `size` in fp32

PyTorch writes and reads the full-resolution logits, 4 K bytes a pixel, and an int64 map: 84 bytes a pixel and more
for 19 classes. Here the low-resolution logits are read once and one byte a pixel is written.
Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", section 3.1, where the decoder's logits
are upsampled by 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, native
from .precision import compute_dtype

LARGEST_CLASSES = 256  # a label is a byte


def upsample_argmax_reference(logits: Tensor, size: list[int], align_corners: bool = False) -> Tensor:
    """The specification, in plain PyTorch on any device."""
    logits = logits.to(compute_dtype(logits.dtype))
    upsampled = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)
    return upsampled.argmax(1).to(torch.uint8)


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool = False, backend: str = "auto"
) -> Tensor:
    """The class of the largest bilinearly upsampled logit at each pixel; the upsampled logits never exist.

    logits: (N, K, h, w) of any floating dtype and any strides, K from 1 to 256
    size: (H, W), at least (1, 1)
    Returns (N, H, W) uint8. Of equal logits the lowest class wins, and NaN is above every number, as in
    torch.argmax. Backends may differ where upsampled logits are equal up to their rounding in fp32. There is no
    gradient: the result is a map of integers.
    Raises ValueError on shapes and dtypes, UserError where a named backend cannot run.
    """
    if logits.dim() != 4 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}; expected floating (N, K, h, w)")
    if not 1 <= logits.shape[1] <= LARGEST_CLASSES:
        raise ValueError(f"logits have {logits.shape[1]} classes; expected 1 to {LARGEST_CLASSES}, a label is a byte")
    if len(size) != 2 or min(*size, *logits.shape[2:]) < 1:
        raise ValueError(f"cannot upsample {tuple(logits.shape[2:])} to {tuple(size)}; expected (h, w) and (H, W) >= 1")
    return dispatch.run("upsample_argmax", logits, list(size), align_corners, backend=backend)


def _native_why_not(logits: Tensor, *_: object) -> str | None:
    return native.float_why_not(logits)


def _native(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    # The kernels read rows of pixels as well as rows of classes; only other strides need a copy.
    if logits.stride(1) != 1 and logits.stride(3) != 1:
        logits = native.channels_last(logits)
    labels = logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)
    arguments = (
        *(logits.data_ptr(), native.CUDA_FLOAT_DTYPES.index(logits.dtype), logits.shape, logits.stride()),
        *(size, align_corners, labels.data_ptr()),
    )
    if logits.is_cuda:
        native.kernels().upsample_argmax_cuda(*arguments, *native.device_and_stream(logits))
    else:
        native.kernels().upsample_argmax_cpu(*arguments, torch.get_num_threads())
    return labels


# AMD EPYC (AVX-512), torch 2.13, 2 threads, 19 x 128 x 256 to 512 x 1024, random / smooth logits: native .79 / .54 ms
# in fp32 and .71 / .53 in bf16, eager channels-last 13 to 18 and 23.
# The CUDA kernel runs in an emulator (tests/test_cuda_emulator.py) and has not been timed on a GPU.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "reference": dispatch.Backend(upsample_argmax_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(logits: Tensor, size: list[int], align_corners: bool, backend: str) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)


def _example(device: torch.device) -> tuple[Tensor, list[int], bool]:
    return torch.zeros((1, 2, 2, 3), device=device), [4, 6], False


_op = dispatch.register(
    "upsample_argmax",
    "(Tensor logits, SymInt[] size, bool align_corners, str backend) -> Tensor",
    BACKENDS,
    _fake,
    _example,
)

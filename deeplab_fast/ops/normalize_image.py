"""uint8 pixels to the network's input: jitter, blur and normalisation.

    y = blur(clamp(b c s x + b c (1 - s) grey(x) + b (1 - c) mean(grey(x)), 0, 255))
    out = y / (255 std) - mean / std

b, c, s are the brightness, contrast and saturation of an image and grey its luma: each of the three steps is affine in
x and leaves grey's weights summing to 1, so that together they are one affine map. The blur is a separable Gaussian
with the border repeated outwards. Eager writes and reads x in fp32 a dozen times, and twice for each tap of the blur;
here the pixels are read once, twice where a mean is asked for, and the result is written once.
Source: the ImageNet statistics of torchvision; ITU-R BT.601 for grey.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, gpu, native
from .precision import compute_dtype

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of pixels in 0 ... 1
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
LARGEST_IMAGE = 2**31 - 2**16  # elements, with room for a block beyond them: deeplab_fast/kernels


def normalize_image_reference(
    images: Tensor, colour: Tensor | None, dtype: torch.dtype, channels_last: bool = True
) -> Tensor:
    """The specification, in plain PyTorch on any device, in fp32."""
    x = images.permute(0, 3, 1, 2).to(compute_dtype(dtype))  # channels-last memory
    if colour is not None:
        x = _blur(_jitter(x, colour[:, :3]), colour[:, 3])
    factor, bias = _normalisation(x.device, x.dtype)
    x = torch.addcmul(bias, x, factor)
    return x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.cache
def _normalisation(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) factor and bias of (x / 255 - mean) / std; kept, as an upload would stall the device."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (1 / (255 * std)).to(device, dtype), (-mean / std).to(device, dtype)


def _jitter(x: Tensor, factors: Tensor) -> Tensor:
    """Brightness b, contrast c, saturation s of `factors` (N, 3), each around 1, applied in this order.

    Brightness scales x, contrast blends with the image's mean grey, saturation with the pixel's own grey.
    """
    if bool((factors == 1).all()):
        return x
    b, c, s = factors.to(x.device, x.dtype, non_blocking=True).view(-1, 3, 1, 1, 1).unbind(1)
    grey = GREY[0] * x[:, 0:1] + GREY[1] * x[:, 1:2] + GREY[2] * x[:, 2:3]
    offset = b * c * (1 - s) * grey + b * (1 - c) * grey.mean((2, 3), keepdim=True)
    return torch.addcmul(offset, b * c * s, x).clamp_(0, 255)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, sigma (N,) pixels on the CPU, 0 for none; the border is repeated outwards.

    Weighted sums of shifted images: autocast and TF32, which would round a convolution, leave these alone.
    """
    chosen = sigma.nonzero().flatten()
    if not len(chosen) or not x.numel():
        return x
    taps = _taps(sigma[chosen].to(x.dtype))
    radius = taps.shape[1] // 2
    taps = taps.to(x.device, non_blocking=True)
    chosen = chosen.to(x.device, non_blocking=True)
    blurred = x[chosen]
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(blurred, padding, mode="replicate")
        blurred = torch.zeros_like(blurred)
        for shift in range(2 * radius + 1):
            shifted = padded.narrow(axis, shift, x.shape[axis])
            blurred.addcmul_(shifted, taps[:, shift].view(-1, 1, 1, 1))
    return x.index_copy(0, chosen, blurred)


def _taps(sigma: Tensor) -> Tensor:
    """sigma (n,) above 0 to (n, 2 radius + 1) taps that sum to 1; the widest of the batch decides on the radius."""
    radius = math.ceil(3 * float(sigma.max()))
    taps = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma[:, None] ** 2))
    return taps / taps.sum(1, keepdim=True)


def normalize_image(
    images: Tensor,
    colour: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    backend: str = "auto",
) -> Tensor:
    """uint8 (N, H, W, 3) RGB to the network's input (N, 3, H, W): jitter, blur, ImageNet's normalisation.

    images: any strides
    colour: float32 (N, 4), factors of brightness, contrast and saturation (1: none) and sigma of the blur in pixels
        (0: none), and on the CPU whatever the device of `images`: its values choose what is computed, and reading them
        back would stall that device. None leaves out jitter and blur, as evaluation does
    dtype: of the result; the arithmetic is fp32, under autocast too
    Returns packed channels-last memory, or contiguous. There is no gradient.
    Raises ValueError on shapes and dtypes, UserError where a named backend cannot run.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, H, W, 3)")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating one")
    if colour is not None:
        if colour.device.type != "cpu":
            raise ValueError(f"colour is on {colour.device}; expected it on the CPU, where it is read")
        if colour.dtype != torch.float32 or colour.shape != (images.shape[0], 4):
            raise ValueError(
                f"colour is {colour.dtype} {tuple(colour.shape)} for {images.shape[0]} images; expected float32 (N, 4)"
            )
    return _op(images, colour, dtype, channels_last, backend)


def _native_why_not(images: Tensor, colour: Tensor | None, dtype: torch.dtype, channels_last: bool) -> str | None:
    if images.device.type != "cpu":
        return f"there is no native kernel of it for the device {images.device}"
    if dtype not in native.FLOAT_DTYPES:
        return f"the CPU kernels write float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return native.why_not(images.device)


def _native(images: Tensor, colour: Tensor | None, dtype: torch.dtype, channels_last: bool) -> Tensor:
    n, height, width, _ = images.shape
    if images.numel() and not images[0, 0].is_contiguous():
        images = images.contiguous()
    out = torch.empty((n, 3, height, width), dtype=dtype, memory_format=torch.channels_last)
    factors = taps = None
    radius = 0
    if colour is not None and n:
        factors = colour[:, :3].contiguous()
        taps, radius = _taps_of_each(colour[:, 3])
    address = lambda x: 0 if x is None else x.data_ptr()  # noqa: E731
    native.kernels().normalize_image_cpu(
        *(images.data_ptr(), images.stride(0), images.stride(1), (n, height, width)),
        *(address(factors), address(taps), radius, GREY, *_constants()),
        *(out.data_ptr(), native.FLOAT_DTYPES.index(dtype), torch.get_num_threads()),
    )
    return out if channels_last else out.contiguous()


def _taps_of_each(sigma: Tensor) -> tuple[Tensor | None, int]:
    """sigma (N,) to (N, 2 radius + 1), zeros where sigma is 0, and the radius; None and 0 where all are."""
    if not bool(sigma.any()):
        return None, 0
    chosen = sigma.nonzero().flatten()
    taps = _taps(sigma[chosen])
    return taps.new_zeros((len(sigma), taps.shape[1])).index_copy_(0, chosen, taps), taps.shape[1] // 2


@functools.cache
def _constants() -> tuple[list[float], list[float]]:
    """factor and bias of the three channels, as numbers."""
    factor, bias = _normalisation(torch.device("cpu"), torch.float32)
    return factor.flatten().tolist(), bias.flatten().tolist()


def _triton_why_not(images: Tensor, colour: Tensor | None, dtype: torch.dtype, channels_last: bool) -> str | None:
    if reason := gpu.device_why_not(images.device):
        return reason
    if dtype not in gpu.FLOAT_DTYPES:
        return f"the Triton kernels write float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if images[:1].numel() > LARGEST_IMAGE:
        return f"an image has {images[:1].numel()} elements, and its offsets are 32-bit"
    return None


def _triton(images: Tensor, colour: Tensor | None, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """In a CUDA graph without a colour alone: its values come from the CPU at each call."""
    from ..kernels import normalize_image as kernels

    images = images.contiguous()
    constants = _constants()
    if colour is None or not images.numel():
        out = kernels.normalize(images, dtype, *constants)
    else:
        parameters, radius = _parameters(colour)
        with_mean = bool(parameters[:, 2].any())
        parameters = parameters.to(images.device, non_blocking=True)
        out = kernels.jitter_blur_normalize(images, parameters, radius, with_mean, GREY, dtype, *constants)
    return out if channels_last else out.contiguous()


def _parameters(colour: Tensor) -> tuple[Tensor, int]:
    """What the Triton kernels read of each image, as one upload; and the radius of the batch."""
    b, c, s, sigma = colour.detach().unbind(1)
    taps, radius = _taps_of_each(sigma)
    if taps is None:
        taps = torch.ones((len(colour), 1))
    blurred = sigma != 0
    taps[:, radius] += (~blurred).float()  # the others keep what they are
    affine = torch.stack((b * c * s, b * c * (1 - s), b * (1 - c), radius * blurred.float()), 1)
    return torch.cat((affine, taps), 1), radius


# AMD EPYC (AVX-512), 2 threads, torch 2.13, 8 x 352 x 352 to fp32, plain / jitter / blur: native .38 / .71 / 2.6 ms,
# reference 2.9 / 6.4 / 18, torch.compile of plain steps 2.6 / 6.5 / 12; to bf16 .23 / .77 / 2.3, 2.2 / 6.9 / 19 and
# 2.6 / 7.5 / 13. No GPU has timed the Triton kernels yet.
BACKENDS = {
    "native": dispatch.Backend(_native, _native_why_not, measured=("cpu",)),
    "triton": dispatch.Backend(_triton, _triton_why_not, measured=()),
    "reference": dispatch.Backend(normalize_image_reference, dispatch.always, measured=("cpu", "cuda")),
}


def _fake(images: Tensor, colour: Tensor | None, dtype: torch.dtype, channels_last: bool, backend: str) -> Tensor:
    n, height, width, _ = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((n, 3, height, width), dtype=dtype, device=images.device, memory_format=layout)


def _example(device: torch.device) -> tuple[Tensor, Tensor, torch.dtype, bool]:
    images = torch.zeros((1, 2, 3, 3), dtype=torch.uint8, device=device)
    return images, torch.ones((1, 4)), torch.float32, True


_op = dispatch.register(
    "normalize_image",
    "(Tensor images, Tensor? colour, ScalarType dtype, bool channels_last, str backend) -> Tensor",
    BACKENDS,
    _fake,
    _example,
)
dispatch.forbid_gradient("normalize_image", "has no gradient")

"""A trained model and images -> label maps: whole images, or overlapping windows where they are large.

Validation during training, `evaluate` and `predict` all come through here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.augment import prepare
from .data.datasets import Dataset
from .data.loader import eval_samples
from .device import autocast
from .distributed import ALONE, Processes
from .errors import Stopped, UserError
from .metrics import SegmentationMetrics
from .model.layers import resize
from .ops import upsample_argmax

LARGEST_WHOLE = 2048 * 2048
"""Pixels of the largest image that is predicted in one piece where no window is asked for."""
DEFAULT_WINDOW = (1024, 1024)
"""Height and width of the windows for larger ones."""
DEFAULT_OVERLAP = 0.25
"""Share of a window that the next one covers again, at least."""


@torch.inference_mode()
def predict_image(
    model: nn.Module,
    image: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    window: tuple[int, int] | None = None,
    overlap: float = DEFAULT_OVERLAP,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """image uint8 (H, W, 3) RGB of any size -> label map uint8 (H, W) on `device`.

    dtype: that of autocast. window: height and width in pixels of overlapping windows; None: the whole image
    at once up to LARGEST_WHOLE pixels, DEFAULT_WINDOW above. A window larger than the image shrinks to it.
    Windows are blended by the mean of their class probabilities, weighted by a tent that falls towards the
    window's edges, where the model sees least context; memory grows with K * window height * image width.
    scales, flip: the label is that of the largest mean probability over these sizes of the image, each as it is and,
    with `flip`, mirrored (DeepLabv3, section 4.1), for which K * H * W floats are kept, and with windows as many of the
    scaled size. Windows have the same size at every scale.
    The model must be in eval mode. Bad numbers, and too little memory, raise UserError.
    """
    if window is not None and min(window) < 1:
        raise UserError(f"the window is {window}: expected a height and a width of 1 or more")
    if not 0 <= overlap < 1:
        raise UserError(f"the overlap is {overlap}: expected a share in [0, 1)")
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise UserError(f"the scales are {tuple(scales)}: expected numbers above 0")
    height, width = image.shape[:2]
    window = _pieces((height, width), window)
    options = {"dtype": dtype, "channels_last": channels_last}
    with _memory_error_named(device, (height, width), window):
        image = image.to(device, non_blocking=True)
        if _many(scales, flip):
            return _mean_probabilities(model, image, window, overlap, scales, flip, options).argmax(0).to(torch.uint8)
        if window is None:
            logits = _logits(model, image, **options)
            return upsample_argmax(logits, (height, width), align_corners=model.align_corners)[0]
        labels = torch.empty(height, width, dtype=torch.uint8, device=device)
        for top, band in _bands(lambda part: _logits(model, part, full=True, **options)[0], image, window, overlap):
            labels[top : top + band.shape[1]] = band.argmax(0)
        return labels


def _many(scales: Sequence[float], flip: bool) -> bool:
    """Whether a pixel is predicted more than once."""
    return flip or tuple(scales) != (1.0,)


def _mean_probabilities(
    model: nn.Module,
    image: Tensor,
    window: tuple[int, int] | None,
    overlap: float,
    scales: Sequence[float],
    flip: bool,
    options: dict[str, Any],
) -> Tensor:
    """uint8 (H, W, 3) -> fp32 (K, H, W), proportional to the mean of the class probabilities.

    fp32 is the narrowest type that is safe: of the labels of 12 smooth maps over 19 classes, a sum in fp16 changes 4 in
    10,000, one in bf16 30, and one in fp32 none of 262,144 against fp64.
    """
    size, total = tuple(image.shape[:2]), None
    for scale in scales:
        scaled = _scaled(image, scale, model.align_corners)
        for mirrored in (False, True)[: 1 + flip]:
            part = scaled.flip(1) if mirrored else scaled
            if window is None:
                logits = _logits(model, part, **options).float()
                scores = resize(logits, size, model.align_corners).softmax(1)[0]
            else:
                bands = _bands(lambda x: _logits(model, x, full=True, **options)[0], part, window, overlap)
                scores = torch.cat([band / band.sum(0) for _, band in bands], dim=1)
                scores = resize(scores[None], size, model.align_corners)[0]
            scores = scores.flip(-1) if mirrored else scores
            total = scores if total is None else total.add_(scores)
    return total


def _scaled(image: Tensor, scale: float, align_corners: bool) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (h, w, 3): bilinear, antialiased when shrinking, as training images are.

    With aligned corners a side of 16 k + 1 pixels counts as 16 k intervals, so that the scaled one, too, has its last
    pixel on the grid of a stride (513 x 0.5 is 257; tensorflow/models, research/deeplab/model.py).
    """
    if scale == 1:
        return image
    on_grid = [int(align_corners and length % 16 == 1) for length in image.shape[:2]]
    size = [max(1, round((length - one) * scale) + one) for length, one in zip(image.shape, on_grid, strict=False)]
    x = F.interpolate(image.permute(2, 0, 1)[None].float(), size, mode="bilinear", antialias=True)
    return x.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0)


def _pieces(size: tuple[int, int], window: tuple[int, int] | None) -> tuple[int, int] | None:
    """The window that an image of this size is predicted in; None: in one piece."""
    if window is None and size[0] * size[1] > LARGEST_WHOLE:
        window = DEFAULT_WINDOW
    return None if window is None or (window[0] >= size[0] and window[1] >= size[1]) else window


def _logits(
    model: nn.Module,
    image: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    full: bool = False,
) -> Tensor:
    """uint8 (H, W, 3) on the device -> logits (1, K, h, w), or fp32 at full size."""
    x = prepare(image[None], None, dtype=dtype, channels_last=channels_last)
    with autocast(image.device, dtype):
        return model.predict_logits(x) if full else model(x)


@contextlib.contextmanager
def _memory_error_named(device: torch.device, size: tuple[int, int], window: tuple[int, int] | None) -> Iterator[None]:
    """Turns what torch raises where memory is short into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Of torch's errors on a CPU the allocator's text is all that tells.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        pieces = "in one piece" if window is None else f"in windows of {window[1]} x {window[0]}"
        raise UserError(
            f"{device} has too little memory to predict an image of {size[1]} x {size[0]} pixels {pieces}: "
            "expected smaller images or, where evaluate or predict runs, a smaller --window"
        ) from error


def evaluate_dataset(
    model: nn.Module,
    dataset: Dataset,
    *,
    device: torch.device,
    workers: int | None = None,
    keep: Collection[int] = (),
    each: Callable[[int, Tensor], object] | None = None,
    progress: Callable[[], object] = lambda: None,
    window: tuple[int, int] | None = None,
    overlap: float = DEFAULT_OVERLAP,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    processes: Processes = ALONE,
    **options: Any,
) -> tuple[dict[str, Any], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The scores of a data set (see `metrics.scores`), and image, truth, prediction of the indices in `keep`.

    each: called with the index and the prediction, uint8 (H, W) on the device, of every image in order. progress:
    called after every image; it may raise Stopped. window, overlap, scales, flip, options: those of `predict_image`.
    Where nobody asks for the label map of a whole image at one scale, none is made. A sample without truth raises
    UserError. Of several processes each does every size-th image; all return the scores of all images, the main one
    what is kept, and where one stops all raise Stopped.
    """
    metrics = SegmentationMetrics(len(dataset.classes), device)
    kept = []
    how = {"window": window, "overlap": overlap, "scales": scales, "flip": flip, **options}
    stopped = False
    try:
        for index, image, mask in eval_samples(dataset, workers, processes.every(len(dataset))):
            prediction = _score(model, dataset, metrics, image, mask, device, index in keep or each is not None, how)
            if index in keep:
                kept.append((index, image.numpy(), mask.numpy(), prediction.cpu().numpy()))
            if each is not None:
                each(index, prediction)
            progress()
    except Stopped:
        stopped = True
    if processes.any(stopped):
        raise Stopped
    metrics.sum_over(processes)
    return metrics.compute(), [row[1:] for row in sorted(processes.gather(kept), key=lambda row: row[0])]


def _score(
    model: nn.Module,
    dataset: Dataset,
    metrics: SegmentationMetrics,
    image: Tensor,
    mask: Tensor | None,
    device: torch.device,
    wanted: bool,
    how: dict[str, Any],
) -> Tensor | None:
    """Adds one image to the metrics; returns its label map, or None where nobody wants it and none was made."""
    if mask is None:
        raise UserError(f"the split {dataset.split} of the data set {dataset.name} has no truth to score against")
    truth, size = mask.to(device, non_blocking=True), tuple(mask.shape)
    if not wanted and not _many(how["scales"], how["flip"]) and _pieces(size, how["window"]) is None:
        options = {key: how[key] for key in ("dtype", "channels_last") if key in how}
        with _memory_error_named(device, size, None), torch.inference_mode():
            logits = _logits(model, image.to(device, non_blocking=True), **options)
            metrics.update_from_logits(logits, truth[None], align_corners=model.align_corners)
        return None
    prediction = predict_image(model, image, device=device, **how)
    metrics.update(prediction, truth)
    return prediction


def _bands(
    logits: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], overlap: float
) -> Iterator[tuple[int, Tensor]]:
    """The first row, and fp32 (K, rows, W) class probabilities from windows, of one band of the image after the other.

    Only what a row of windows covers is kept: what lies above the next row is final. A band is valid until the next.
    The sum of weights is not divided by, since it is the same for all classes of a pixel.
    """
    height, width = image.shape[:2]
    high, wide = min(window[0], height), min(window[1], width)
    tops, lefts = _starts(height, high, overlap), _starts(width, wide, overlap)
    weight = _tent(high, image.device)[:, None] * _tent(wide, image.device)  # (high, wide)
    band = None  # fp32 (K, high, W)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in lefts:
            scores = logits(image[top : top + high, left : left + wide]).float().softmax(0)
            if band is None:
                band = scores.new_zeros(len(scores), high, width)
            band[:, :, left : left + wide] += scores.mul_(weight)
        final = following - top
        yield top, band[:, :final]
        rest = band[:, final:].clone()
        band[:, : high - final] = rest
        band[:, high - final :] = 0


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly spread, neighbours share at least `overlap` of a window."""
    if size <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    gaps = -(-(size - window) // step)
    return [i * (size - window) // gaps for i in range(gaps + 1)]


def _tent(size: int, device: torch.device) -> Tensor:
    """fp32 (size,): 1 in the middle, falling linearly to just above 0 at both ends."""
    distance = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    return torch.minimum(distance, size - distance) / (size / 2)

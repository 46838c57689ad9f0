"""Segmentation scores from one confusion matrix that stays on the device until it is asked for.

With n[i, j] the number of pixels of true class i that were predicted as j (Long, Shelhamer, Darrell,
"Fully Convolutional Networks for Semantic Segmentation", section 5):

    pixel accuracy          sum_i n[i, i] / sum_ij n[i, j]
    accuracy of class i     n[i, i] / sum_j n[i, j]
    IoU of class i          n[i, i] / (sum_j n[i, j] + sum_j n[j, i] - n[i, i])
    frequency-weighted IoU  sum_i IoU_i * sum_j n[i, j] / sum_ij n[i, j]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import Processes
from .errors import UserError
from .ops import confusion_matrix, upsample_confusion_matrix


class SegmentationMetrics:
    """Adds up the confusion matrix of many label maps; nothing waits for the device before `compute`.

    `counts` int64 (K, K), rows are the truth; `out_of_range` int64 (), pixels with a value that is neither a
    class nor 255. Both are plain tensors that processes can sum.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.out_of_range = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count `prediction` against the truth `mask`, integers of one shape; a truth of 255 is left out."""
        self.add(*confusion_matrix(prediction, mask, self.num_classes))

    def update_from_logits(self, logits: Tensor, mask: Tensor, *, align_corners: bool = False) -> None:
        """The same for the argmax of logits (N, K, h, w) upsampled to the size of mask (N, H, W)."""
        self.add(*upsample_confusion_matrix(logits, mask, align_corners=align_corners))

    def add(self, counts: Tensor, out_of_range: Tensor) -> None:
        """What an op has counted, or another process."""
        if counts.shape != self.counts.shape:
            raise ValueError(f"counts are {tuple(counts.shape)}; expected {tuple(self.counts.shape)}")
        self.counts += counts
        self.out_of_range += out_of_range

    def sum_over(self, processes: Processes) -> None:
        """Give every process the counts of all, by one message."""
        message = processes.sum_(torch.cat([self.counts.flatten(), self.out_of_range[None]]))
        self.counts, self.out_of_range = message[:-1].view_as(self.counts), message[-1]

    def compute(self) -> dict[str, Any]:
        """The scores as plain Python numbers; see `scores`."""
        if out_of_range := int(self.out_of_range):
            raise UserError(
                f"{out_of_range} pixels have a value that is neither a class (0 to {self.num_classes - 1}) "
                "nor 255 (ignore)"
            )
        return scores(self.counts)


def scores(counts: Tensor) -> dict[str, Any]:
    """Every score of a confusion matrix, counts int64 (K, K) with rows as truth, in [0, 1].

    `class_iou` is None for a class that is absent from truth and prediction, and such a class is left out of
    `miou`; a class that is predicted but never true counts 0. `class_accuracy` is None where the class is
    absent from the truth, and left out of `mean_accuracy`. A matrix of zeros raises UserError.
    """
    counts = counts.cpu()
    total = int(counts.sum())
    if total == 0:
        raise UserError("there is nothing to score: every pixel of the truth is 255 (ignore), or there was no image")
    hits = counts.diagonal()
    true = counts.sum(1)
    union = true + counts.sum(0) - hits
    class_iou = _ratios(hits, union)
    class_accuracy = _ratios(hits, true)
    return {
        "pixel_accuracy": int(hits.sum()) / total,
        "mean_accuracy": _mean(class_accuracy),
        "miou": _mean(class_iou),
        "fw_iou": sum(iou * n for iou, n in zip(class_iou, true.tolist(), strict=True) if iou is not None) / total,
        "class_iou": class_iou,
        "class_accuracy": class_accuracy,
        "confusion": counts.tolist(),
    }


def format_table(result: dict[str, Any], names: Sequence[str]) -> str:
    """The overall figures, then one line for each class; `absent` stands for None."""
    width = max(len(name) for name in (*names, "frequency-weighted IoU"))
    overall = {
        "pixel accuracy": "pixel_accuracy",
        "mean accuracy": "mean_accuracy",
        "frequency-weighted IoU": "fw_iou",
        "mean IoU": "miou",
    }
    lines = [f"{label:<{width}}  {result[key]:8.4f}" for label, key in overall.items()]
    lines += ["", f"{'class':<{width}}  {'IoU':>8}  {'accuracy':>8}  {'pixels':>13}"]
    for name, iou, accuracy, row in zip(
        names, result["class_iou"], result["class_accuracy"], result["confusion"], strict=True
    ):
        lines.append(f"{name:<{width}}  {_cell(iou)}  {_cell(accuracy)}  {sum(row):>13,}")
    return "\n".join(lines)


def _ratios(numerator: Tensor, denominator: Tensor) -> list[float | None]:
    pairs = zip(numerator.tolist(), denominator.tolist(), strict=True)
    return [n / d if d else None for n, d in pairs]


def _mean(values: list[float | None]) -> float:
    present = [v for v in values if v is not None]
    return sum(present) / len(present)


def _cell(value: float | None) -> str:
    return f"{'absent':>8}" if value is None else f"{value:8.4f}"

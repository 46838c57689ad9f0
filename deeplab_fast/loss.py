"""Low-resolution logits and a label map -> the training loss at label resolution.

Sums and weights are returned apart, so that gradient accumulation divides by the weight of all its passes together
and equals one large batch, instead of averaging averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .data.labels import IGNORE
from .ops import upsample_cross_entropy


def target_weight(mask: Tensor, num_classes: int, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the summed loss of `mask` is divided by, and how many of its labels are neither a class nor ignored.

    mask: (N, H, W) uint8 or int64; class_weights: (K,) float32 or None.
    Returns fp32 and int64 scalars on the mask's device, without a host synchronisation.
    """
    valid = (mask >= 0) & (mask < num_classes) & (mask != IGNORE)
    out_of_range = (~valid & (mask != IGNORE)).sum()
    if class_weights is None:
        return valid.sum().float(), out_of_range
    return class_weights[mask.long().clamp(0, num_classes - 1)].mul(valid).sum(), out_of_range


def cross_entropy_sum(
    logits: Tensor,
    mask: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """Cross entropy of bilinearly upsampled logits, summed over the pixels that carry a label.

    logits: (N, K, h, w), any float dtype; mask: (N, H, W), 255 and labels >= K are left out. Computed in fp32.
    With class weights w and smoothing e a pixel of class y adds (1 - e) w_y nll_y + e / K sum_c w_c nll_c, as
    torch.nn.functional.cross_entropy does. A mask without a label gives 0 with gradient 0.
    """
    loss, _, _ = upsample_cross_entropy(
        logits,
        mask,
        weight=class_weights,
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction="sum",
        align_corners=align_corners,
    )
    return loss


def mean_loss(loss_sum: Tensor, weight: Tensor) -> Tensor:
    """`loss_sum / weight`, and 0 with gradient 0 where nothing carries a label or all that does has weight 0."""
    return torch.where(weight > 0, loss_sum / torch.where(weight > 0, weight, 1.0), 0.0)

"""Low-resolution logits and a label map -> the training loss at label resolution.

Sums and weights are returned apart, so that gradient accumulation divides by the weight of all its passes together
and equals one large batch, instead of averaging averages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import OptimConfig
from .data.labels import IGNORE
from .distributed import ALONE, Processes
from .ops import kth_largest, upsample_cross_entropy
from .order import largest_of_all

# Below it (1 - p) ** gamma with gamma under 1 has a slope that fp32 cannot hold.
_SMALLEST_MISS = 1e-6


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


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    mask: Tensor,
    config: OptimConfig,
    *,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
    step: int = 0,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor | None]:
    """The loss that `config` describes of one forward pass: its sum over pixels, and what that is divided by.

    outputs: what the model returns in training, logits (N, K, h, w), or these and the auxiliary head's, whose cross
    entropy over the same pixels is added `config.auxiliary_weight` times. mask: (N, H, W), 255 is ignored.
    Returns fp32 scalars. The second is None, and `target_weight` what to divide by, unless hard pixels are mined: then
    it is the weight of those that are kept, which is known after the pass only; see `rescale`.
    """
    logits, auxiliary = (outputs, None) if isinstance(outputs, Tensor) else outputs
    options = {"class_weights": class_weights, "align_corners": align_corners}
    if config.mining != "none":
        mask = hard_pixels(logits, mask, config, step=step, processes=processes, **options)
    if config.focal_gamma:
        loss = focal_loss_sum(logits, mask, config.focal_gamma, **options)
    else:
        loss = cross_entropy_sum(logits, mask, label_smoothing=config.label_smoothing, **options)
    if auxiliary is not None:
        extra = cross_entropy_sum(auxiliary, mask, label_smoothing=config.label_smoothing, **options)
        loss = loss + config.auxiliary_weight * extra
    if config.mining == "none":
        return loss, None
    # As in TensorFlow: the top pixels' weighted losses are divided by their number.
    counted = None if config.mining == "top_k" else class_weights
    return loss, target_weight(mask, logits.shape[1], counted)[0]


@torch.no_grad()
def hard_pixels(
    logits: Tensor,
    mask: Tensor,
    config: OptimConfig,
    *,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
    step: int = 0,
    processes: Processes = ALONE,
) -> Tensor:
    """`mask` with 255 at the pixels that are too easy to learn from, found on the device without waiting for it.

    "ohem": a pixel is kept where the probability of its class is at most `ohem_threshold`, and of the hardest pixels at
    least the share `ohem_min_kept` of all pixels of this pass, ignored ones counted, whatever their probability; the
    loss is the (weighted) mean over what is kept (CoinCheung/DeepLab-v3-plus-cityscapes, loss.py).
    "top_k": the share `top_k` of all pixels with the largest loss, class weights and smoothing included, and from
    `top_k_steps` on only: before, the share falls linearly from 1. The loss is divided by the number of kept pixels
    whose loss is not 0 (tensorflow/models, research/deeplab/utils/train_utils.py).
    Pixels that tie with the last one are kept, too, and so is a loss that is NaN, for the loop to see. Of several
    processes all take part, and these are shares of their pixels together.
    """
    ohem = config.mining == "ohem"
    losses, _, _ = upsample_cross_entropy(
        logits,
        mask,
        # A probability knows neither weights nor smoothing.
        weight=None if ohem else class_weights,
        ignore_index=IGNORE,
        label_smoothing=0.0 if ohem else config.label_smoothing,
        reduction="none",
        align_corners=align_corners,
    )
    if ohem:
        easy = -math.log(config.ohem_threshold) if config.ohem_threshold else math.inf
        limit = _largest(losses, config.ohem_min_kept, processes).clamp(max=easy)
        dropped = losses < limit
    else:
        progress = min(1.0, step / config.top_k_steps) if config.top_k_steps else 1.0
        share = progress * config.top_k + (1 - progress)
        dropped = (losses < _largest(losses, share, processes)) | (losses == 0)
    return mask.masked_fill(dropped, IGNORE)


def _largest(losses: Tensor, share: float, processes: Processes = ALONE) -> Tensor:
    """fp32 (): the smallest of the largest `share` of the values; infinite where that is none of them."""
    if processes.size > 1:
        return largest_of_all(losses, share, processes)
    count = round(share * losses.numel())
    if not count:
        return losses.new_full((), math.inf)
    return kth_largest(losses, count)


def focal_loss_sum(
    logits: Tensor,
    mask: Tensor,
    gamma: float,
    *,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Focal loss of bilinearly upsampled logits, w_y (1 - p_y) ** gamma nll_y summed over the pixels with a label.

    Each pixel by its own probability p_y (Lin et al. 2017, section 3.2), not by the probability that belongs to the
    mean loss. Arguments as in `cross_entropy_sum`, which it equals at gamma 0.
    """
    nll, _, _ = upsample_cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none", align_corners=align_corners)
    losses = (-torch.expm1(-nll)).clamp(min=_SMALLEST_MISS).pow(gamma) * nll
    if class_weights is not None:
        losses = losses * class_weights[mask.long().clamp(0, logits.shape[1] - 1)]
    return losses.sum()


def mean_loss(loss_sum: Tensor, weight: Tensor) -> Tensor:
    """`loss_sum / weight`, and 0 with gradient 0 where nothing carries a label or all that does has weight 0."""
    return torch.where(weight > 0, loss_sum / torch.where(weight > 0, weight, 1.0), 0.0)


@torch.no_grad()
def rescale(gradients: list[Tensor], loss: Tensor, assumed: Tensor, weight: Tensor) -> Tensor:
    """Divide `loss`, and `gradients` in place, by `weight` where they were divided by `assumed`; returns the loss.

    Which pixels are hard is known after a pass, and their weight in all passes of a step after the last; scalars, on
    the device. 0 where `weight` is 0.
    """
    factor = torch.where(weight > 0, assumed / torch.where(weight > 0, weight, 1.0), 0.0)
    torch._foreach_mul_(gradients, factor)
    return loss * factor

"""Batch norm over the batches of all processes: our four ops, with one message each way between them.

Forward, every process sends (n, mean, n var) of its own pixels, 3 C numbers, and merges what all have sent by Chan's
formula, in the order of the ranks: all get the same bits. A sum over processes of (n, sum, sum of squares) would be a
smaller message for many of them, but loses the variance where the mean is far from zero, and its bits depend on the
algorithm of the sum; the time of either is latency (C = 2048, 64 processes: 24 kB from each). Backward, sum_grad and
sum_grad_xhat are added over the processes, 2 C numbers. torch.compile traces these collectives: functional ones.
Source: Peng et al., "MegDet: A Large Mini-Batch Object Detector", section 3.3; Chan, Golub, LeVeque, 1979.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops.precision import autocast


class Group(NamedTuple):
    """The processes that share statistics: how functional collectives call them, and how many they are."""

    name: str
    size: int


def processes() -> Group | None:
    """All processes of torch.distributed, where it is initialised and they are two or more."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    return Group(distributed.group.WORLD.group_name, distributed.get_world_size())


# As in ops.dispatch: a compiled graph is of the processes that were there when it was traced.
processes._dynamo_marked_constant = True


def share_statistics(mean: Tensor, var: Tensor, pixels: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance (C,) and the number of pixels () of all processes, from those of each one's own batch.

    All in the dtype of mean. A process without pixels takes part; where none has any, they are 0, 1 and 0.
    """
    if pixels:
        message = torch.stack((torch.full_like(mean, pixels), mean, var * pixels))
    else:
        message = mean.new_zeros(3, mean.shape[0])
    collectives = torch.ops._c10d_functional
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(message, group.size, group.name))
    partials = gathered.view(group.size, 3, -1)
    mean, var = ops.batch_norm_merge(partials)
    count = partials[:, 0, 0].sum()
    if pixels:
        return mean, var, count
    return torch.where(count > 0, mean, 0), torch.where(count > 0, var, 1), count


def batch_norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    group: Group,
    *,
    eps: float,
    activation: str,
) -> Tensor:
    """As `ops.batch_norm_act`, with the statistics of all processes: what `share_statistics` returns.

    The gradients of weight and bias are this process's share of the sum, as nn.SyncBatchNorm's are.
    """
    x, *rest = autocast(x, *([] if residual is None else [residual]))
    residual = rest[0] if rest else None
    return _Normalise.apply(x, weight, bias, residual, mean, var, count, group.name, eps, activation)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        group: str,
        eps: float,
        activation: str,
    ) -> Tensor:
        result = ops.batch_norm_act(x.detach(), mean, var, weight, bias, residual, eps=eps, activation=activation)
        y = result if residual is not None and activation != "none" else None  # else the mask comes from x
        ctx.save_for_backward(x, y, mean, var, weight, bias, count)
        ctx.group, ctx.how = group, {"eps": eps, "activation": activation}
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *channels, count = ctx.saved_tensors
        sums = ops.batch_norm_act_backward_reduce(grad, x, y, *channels, **ctx.how)
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        grad_x, grad_residual = None, grad if needs_residual else None
        if needs_x or (needs_residual and y is not None):
            masks = needs_residual and y is not None
            means = sums
            if needs_x:
                collectives = torch.ops._c10d_functional
                shared = collectives.wait_tensor(collectives.all_reduce(torch.stack(sums), "sum", ctx.group))
                means = (shared / count.clamp(min=1)).unbind()  # the op's own count is on the host
            grad_x, *masked = ops.batch_norm_act_backward(
                grad, x, y, *channels, *means, count=1, residual=masks, **ctx.how
            )
            grad_residual = masked[0] if masks else grad_residual
        found = (grad_x, sums[1] if needs_weight else None, sums[0] if needs_bias else None, grad_residual)
        return *found, *[None] * 6

"""Atrous spatial pyramid pooling (DeepLabv3, section 3.3): the backbone's last features -> one map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import ConvNormAct, conv3x3, separable_concat


class ASPP(nn.Module):
    """x (N, in_channels, h, w) -> (N, channels, h, w).

    A 1x1 branch, a 3x3 branch for each rate, the image pooling branch (`pool`, None where it is off), their
    concat, a 1x1 projection, dropout, and with `refine` one more 3x3.
    """

    def __init__(
        self,
        norm: str,
        in_channels: int,
        channels: int,
        rates: tuple[int, ...],
        *,
        image_pooling: bool,
        separable: bool,
        order: str,
        dropout: float,
        refine: bool,
        activation: str,
    ) -> None:
        super().__init__()
        kind = {"separable": separable, "order": order, "activation": activation}
        self.branches = nn.ModuleList([ConvNormAct(norm, in_channels, channels, 1, activation=activation)])
        for rate in rates:
            self.branches.append(conv3x3(norm, in_channels, channels, rate, **kind))
        self.pool = ConvNormAct(norm, in_channels, channels, 1, activation=activation) if image_pooling else None
        parts = 1 + len(rates) + image_pooling
        self.project = ConvNormAct(norm, channels * parts, channels, 1, activation=activation)
        self.dropout = nn.Dropout(dropout)
        self.refine = conv3x3(norm, channels, channels, **kind) if refine else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.project(self._concat(x)))
        return x if self.refine is None else self.refine(x)

    def _concat(self, x: Tensor) -> Tensor:
        """All branches side by side: (N, parts * channels, h, w)."""
        first, *others = self.branches
        one = first(x)
        # Bilinear upsampling of a 1x1 map is a copy, whatever its corners.
        pooled = None if self.pool is None else self.pool(x.mean((2, 3), keepdim=True))
        y = separable_concat(x, one, others, pooled)
        if y is not None:
            return y
        features = [one, *(branch(x) for branch in others)]
        if pooled is not None and torch.compiler.is_exporting():
            features.append(pooled.expand_as(one))  # ONNX's copy does not broadcast
        elif pooled is not None:
            # In the layout of the branches beside it: torch.cat turns a mixture of layouts into NCHW.
            features.append(torch.empty_like(one).copy_(pooled))
        return torch.cat(features, dim=1)

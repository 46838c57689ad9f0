"""DeepLabv3+'s decoder (its paper, section 3.1): ASPP's map and low-level features -> a map at stride 4."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from ..ops import upsample_concat
from .layers import ConvNormAct, conv3x3


class Decoder(nn.Module):
    """x (N, in_channels, h, w), low_level (N, low_in_channels, H, W) -> (N, channels, H, W).

    The low-level features are reduced to `low_channels`, concatenated after the upsampled x, and refined by
    one or two 3x3 convolutions, each followed by its `dropout` where there is one.
    """

    def __init__(
        self,
        norm: str,
        in_channels: int,
        low_in_channels: int,
        *,
        low_channels: int,
        channels: int,
        refinements: int,
        separable: bool,
        order: str,
        align_corners: bool,
        activation: str,
        dropout: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        self.low_level = ConvNormAct(norm, low_in_channels, low_channels, 1, activation=activation)
        widths = [in_channels + low_channels] + [channels] * refinements
        self.refinements = nn.Sequential(
            *(
                conv3x3(norm, a, b, separable=separable, order=order, activation=activation)
                for a, b in itertools.pairwise(widths)
            )
        )
        self.dropouts = nn.ModuleList(nn.Dropout(p) for p in dropout)
        self.align_corners = align_corners

    def forward(self, x: Tensor, low_level: Tensor) -> Tensor:
        x = upsample_concat(x, self.low_level(low_level), align_corners=self.align_corners)
        if not self.dropouts:
            return self.refinements(x)
        for refinement, dropout in zip(self.refinements, self.dropouts, strict=True):
            x = dropout(refinement(x))
        return x

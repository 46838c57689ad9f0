"""What a backbone's weights expect of pixels, made from this project's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.normalize_image import MEAN, STD

PIXELS = ("imagenet", "symmetric", "bgr_unit")


class Pixels(nn.Module):
    """x (N, 3, H, W), RGB minus ImageNet's mean over its deviation -> what the weights were trained with.

    "symmetric": RGB from -1 to 1, TensorFlow's for Xception and MobileNet; "bgr_unit": blue, green, red from 0 to 1
    (zym1119/DeepLabv3_MobileNetv2_PyTorch). Exact at the borders too, where a convolution pads with zeros, which a
    rewritten first convolution would not be. No part of the state_dict.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        scale, shift = (2 * std, 2 * mean - 1) if kind == "symmetric" else (std, mean)
        self.kind = kind
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))
        return x.flip(1) if self.kind == "bgr_unit" else x

"""The auxiliary head (PSPNet, section 3.3): logits from the backbone's third stage, for the training loss alone."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import ConvNormAct


class AuxiliaryHead(nn.Module):
    """x (N, in_channels, h, w) -> logits (N, K, h, w): 3x3 to a quarter of the channels, dropout 0.1, 1x1.

    The graph is that of torchvision's FCNHead.
    """

    def __init__(self, norm: str, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(norm, in_channels, in_channels // 4, 3)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(in_channels // 4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.reduce(x)))

"""Any encoder of timm that gives its features and takes an output stride, as a backbone; an optional dependency."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UserError

PREFIX = "timm:"


def _create(backbone: str, output_stride: int, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"backbone {backbone}: timm is not installed: pip install 'deeplab_fast[timm]'") from error
    if output_stride != 32:  # what they have; not all take the argument
        options["output_stride"] = output_stride
    try:
        return timm.create_model(backbone.removeprefix(PREFIX), features_only=True, **options)
    # What timm raises for an unknown name, and encoders for a stride that they do not have.
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"backbone {backbone} with output_stride {output_stride}: timm has none ({reason})") from error


def pretrained_state(backbone: str, output_stride: int) -> dict[str, Tensor]:
    """The published weights of that encoder, which timm downloads once, by the names of `TimmEncoder`."""
    try:
        state = _create(backbone, output_stride, pretrained=True).state_dict()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the weights of {backbone} could not be downloaded ({reason}); expected a network") from error
    return {f"encoder.{key}": value for key, value in state.items()}


class TimmEncoder(nn.Module):
    """x (N, 3, H, W) -> (the features at stride 4, the last at `output_stride`), with timm's initial weights.

    Its layers are timm's: plain PyTorch, and a norm of their own.
    """

    def __init__(self, backbone: str, *, output_stride: int) -> None:
        super().__init__()
        self.encoder = _create(backbone, output_stride, pretrained=False)
        strides, channels = self.encoder.feature_info.reduction(), self.encoder.feature_info.channels()
        if 4 not in strides or strides[-1] != output_stride:
            raise UserError(
                f"backbone {backbone}: its features have strides {', '.join(map(str, strides))}; expected 4 among them "
                f"and {output_stride} at the end"
            )
        # The last of them, where dilation made several equal.
        self.low_level_index = max(i for i, stride in enumerate(strides) if stride == 4)
        self.low_level_channels, self.out_channels = channels[self.low_level_index], channels[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return features[self.low_level_index], features[-1]

"""DeepLabv3 and DeepLabv3+: normalised images -> class logits."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..errors import UserError
from .aspp import ASPP
from .auxiliary import AuxiliaryHead
from .decoder import Decoder
from .layers import resize
from .mobilenet import MOBILENETS, MobileNetV2, MobileNetV2Zym1119
from .norm import NORMS, SyncBatchNorm2d
from .pixels import PIXELS, Pixels
from .resnet import RESNETS, ResNet
from .resnet_beta import RESNETS_BETA, ResNetBeta
from .timm_encoder import PREFIX, TimmEncoder
from .xception import XCEPTIONS, Xception

BACKBONES = (*RESNETS, *MOBILENETS, *XCEPTIONS, *RESNETS_BETA)


class DeepLab(nn.Module):
    """backbone -> aspp (-> decoder) -> classifier; made by `build_model`.

    `decoder` is None for DeepLabv3, `auxiliary` where there is no auxiliary head; `num_classes`, `output_stride`,
    `align_corners`: what it was built with.
    """

    def __init__(
        self, backbone: nn.Module, aspp: ASPP, decoder: Decoder | None, classifier: nn.Conv2d, *,
        output_stride: int, align_corners: bool, pixels: str = "imagenet", auxiliary: AuxiliaryHead | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pixels = None if pixels == "imagenet" else Pixels(pixels)
        self.backbone = backbone
        self.aspp = aspp
        self.decoder = decoder
        self.classifier = classifier
        self.auxiliary = auxiliary
        self.num_classes = classifier.out_channels
        self.output_stride = output_stride
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x (N, 3, H, W) -> logits (N, K, h, w), h = ceil(H / S), S = 4 with a decoder, else the output one.

        In training mode with an auxiliary head, these and its logits (N, K, h', w'); in eval mode it does not run.
        Training plain batch norm on a single value per channel raises UserError.
        """
        if self.training:
            self._check_batch(x)
        if self.pixels is not None:
            x = self.pixels(x)
        auxiliary = None
        if self.training and self.auxiliary is not None:
            low_level, middle, x = self.backbone(x, auxiliary=True)
            auxiliary = self.auxiliary(middle)
        else:
            low_level, x = self.backbone(x)
        x = self.aspp(x)
        if self.decoder is not None:
            x = self.decoder(x, low_level)
        logits = self.classifier(x)
        return logits if auxiliary is None else (logits, auxiliary)

    def predict_logits(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) -> logits fp32 (N, K, H, W), under autocast too: upsampled in half precision, logits tie."""
        return resize(self(x).float(), x.shape[-2:], self.align_corners)

    def _check_batch(self, x: Tensor) -> None:
        n, _, h, w = x.shape
        stride = self.output_stride
        values = n if self.aspp.pool is not None else n * -(-h // stride) * -(-w // stride)
        norm = self.aspp.project.norm
        alone = type(norm) is nn.BatchNorm2d or (type(norm) is SyncBatchNorm2d and norm.processes() is None)
        if values == 1 and alone and norm.training:
            raise UserError(
                f"batch normalisation cannot be trained on one value per channel, all that an input of "
                f"{tuple(x.shape)} leaves in ASPP: expected a batch of 2, or norm group or frozen_batch"
            )


def build_model(
    name: str = "deeplabv3plus",
    *,
    num_classes: int,
    backbone: str = "mobilenet_v2",
    width_mult: float = 1.0,
    width_divisor: int = 8,
    beta_stem: bool = False,
    output_stride: int = 16,
    multi_grid: tuple[int, int, int] = (1, 1, 1),
    first_block_dilation: Literal["stage", "previous"] = "stage",
    atrous_rates: tuple[int, ...] | None = None,
    image_pooling: bool = True,
    aspp_channels: int = 256,
    separable: bool = True,
    separable_order: Literal["norm_last", "norm_each"] = "norm_last",
    aspp_refine: bool = False,
    low_level_channels: int = 48,
    decoder_channels: int = 256,
    refinements: int = 2,
    dropout: float = 0.1,
    decoder_dropout: tuple[float, ...] = (),
    align_corners: bool = False,
    norm: Literal["batch", "sync_batch", "frozen_batch", "group"] = "batch",
    activation: Literal["relu", "leaky_relu"] = "relu",
    aspp_activation: bool = True,
    pixels: Literal["imagenet", "symmetric", "bgr_unit"] = "imagenet",
    norm_momentum: float = 0.1,
    head_norm_momentum: float = 0.1,
    auxiliary: bool = False,
) -> DeepLab:
    """A DeepLab with random weights from torch's global random state; keywords as in `ModelConfig`.

    name: "deeplabv3" (Chen et al. 2017) or "deeplabv3plus" (Chen et al. 2018), the one with a decoder.
    backbone: resnet18, resnet34, resnet50, resnet101, resnet152, mobilenet_v2, xception41, xception65 or xception71;
        and those of other projects: mobilenet_v2_1280, mobilenet_v2_tf, mobilenet_v2_vainf, mobilenet_v2_zym1119,
        resnet_v1_50_beta and resnet_v1_101_beta (see `ResNetBeta`); or timm:NAME, an encoder of timm (`TimmEncoder`).
    output_stride: input size over the size of the last features; strides beyond it become dilation.
    multi_grid: factors of the dilation in a ResNet's last three blocks: (1, 2, 4) gives 2, 4, 8 at 16; in an Xception's
        last three convolutions.
    first_block_dilation: whether a block that lost its stride has the dilation of its stage (2, 2, 2 at 16)
        or of the one before (1, 2, 2; torchvision's: the undilated network's features, on a finer grid). An Xception
        and a resnet_v1_*_beta are always the latter: their stride is at the end of a stage.
    width_divisor: of every width of a MobileNetV2; TensorFlow's DeepLab has 4 where width_mult is not 1.
    atrous_rates: None for 6, 12, 18 at output stride 16, doubled at 8, halved at 32; () leaves the 1x1 branch and the
        image pooling, TensorFlow's head for MobileNetV2.
    separable_order, aspp_refine, refinements: see `SeparableConv`, `ASPP` and `Decoder`.
    decoder_dropout: one probability for each refinement, or none.
    norm: see `make_norm`; "group" comes with weight standardisation.
    activation: after every norm of a ResNet and of the head; "leaky_relu" has InPlaceABN's slope of 0.01. The sum of a
        residual block is followed by ReLU all the same.
    aspp_activation: False leaves it out in ASPP.
    pixels: what the backbone is given, see `Pixels`; the model's input is the same for all.
    norm_momentum, head_norm_momentum: share of a batch in the running statistics, in the backbone and elsewhere.
    auxiliary: an `AuxiliaryHead` on the backbone's third stage; its logits are returned in training mode only.

    The backbone is initialised as torchvision's (Kaiming normal, fan out), the head with Kaiming normal, fan
    in, and the classifier with a standard deviation of 0.01 and zero bias. A bad value raises UserError.
    """
    _check_names(
        name=(name, ("deeplabv3", "deeplabv3plus")),
        backbone=(backbone, (*BACKBONES, backbone) if backbone.startswith(PREFIX) else (*BACKBONES, "timm:NAME")),
        output_stride=(output_stride, (8, 16, 32)),
        first_block_dilation=(first_block_dilation, ("stage", "previous")),
        separable_order=(separable_order, ("norm_last", "norm_each")),
        refinements=(refinements, (1, 2)),
        norm=(norm, NORMS),
        activation=(activation, ("relu", "leaky_relu")),
        pixels=(pixels, PIXELS),
    )
    _check_at_least_one(
        num_classes=num_classes,
        width_divisor=width_divisor,
        aspp_channels=aspp_channels,
        low_level_channels=low_level_channels,
        decoder_channels=decoder_channels,
    )
    if atrous_rates is None:
        atrous_rates = tuple(rate * 16 // output_stride for rate in (6, 12, 18))
    for rate in atrous_rates:
        _check_at_least_one(atrous_rates=rate)
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: expected a probability in [0, 1)")
    if decoder_dropout and name == "deeplabv3":
        raise UserError(f"decoder_dropout is {decoder_dropout}: deeplabv3 has no decoder, expected ()")
    if decoder_dropout and (len(decoder_dropout) != refinements or not all(0 <= p < 1 for p in decoder_dropout)):
        raise UserError(
            f"decoder_dropout is {decoder_dropout}: expected {refinements} probabilities in [0, 1), or none"
        )
    for momentum in (norm_momentum, head_norm_momentum):
        if not 0 < momentum <= 1:
            raise UserError(f"norm_momentum is {momentum}: expected a share in (0, 1]")

    features = _build_backbone(
        backbone,
        *(width_mult, width_divisor, beta_stem, norm, output_stride, tuple(multi_grid)),
        *(first_block_dilation, activation),
    )
    conv = {"separable": separable, "order": separable_order}
    aspp = ASPP(
        norm,
        features.out_channels,
        aspp_channels,
        tuple(atrous_rates),
        image_pooling=image_pooling,
        dropout=dropout,
        refine=aspp_refine,
        activation=activation if aspp_activation else "none",
        **conv,
    )
    decoder = None
    if name == "deeplabv3plus":
        decoder = Decoder(
            norm,
            aspp_channels,
            features.low_level_channels,
            low_channels=low_level_channels,
            channels=decoder_channels,
            refinements=refinements,
            align_corners=align_corners,
            activation=activation,
            dropout=tuple(decoder_dropout),
            **conv,
        )
    classifier = nn.Conv2d(aspp_channels if decoder is None else decoder_channels, num_classes, 1)
    head = None
    if auxiliary:
        if not hasattr(features, "auxiliary_channels"):
            raise UserError(f"auxiliary is set: {backbone} has no features for it, expected a ResNet or mobilenet_v2")
        head = AuxiliaryHead(norm, features.auxiliary_channels, num_classes)
    model = DeepLab(
        *(features, aspp, decoder, classifier),
        output_stride=output_stride,
        align_corners=align_corners,
        pixels=pixels,
        auxiliary=head,
    )
    _initialise(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = head_norm_momentum
    for module in model.backbone.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = norm_momentum
    return model


def _check_names(**given: tuple[object, tuple]) -> None:
    for field, (value, allowed) in given.items():
        if value not in allowed:
            raise UserError(f"{field} is {value!r}: expected one of {', '.join(map(str, allowed))}")


def _check_at_least_one(**given: int) -> None:
    for field, value in given.items():
        if value < 1:
            raise UserError(f"{field} is {value}: expected 1 or more")


def _build_backbone(
    name: str,
    width_mult: float,
    width_divisor: int,
    beta_stem: bool,
    norm: str,
    output_stride: int,
    multi_grid: tuple[int, ...],
    first_block_dilation: str,
    activation: str,
) -> ResNet | ResNetBeta | MobileNetV2 | MobileNetV2Zym1119 | Xception | TimmEncoder:
    if len(multi_grid) != 3 or min(multi_grid) < 1:
        raise UserError(f"multi_grid is {multi_grid}: expected three factors of 1 or more")
    if width_mult != 1.0 and not name.startswith("mobilenet_v2"):
        raise UserError(f"width_mult is {width_mult}: {name} has no width multiplier, expected 1.0")
    if width_divisor != 8 and not name.startswith("mobilenet_v2"):
        raise UserError(f"width_divisor is {width_divisor}: {name} has no width multiplier, expected 8")
    if beta_stem and name not in RESNETS:
        raise UserError(f"beta_stem is set: {name} has 3x3 convolutions for a stem already, expected a ResNet backbone")
    if activation != "relu" and name not in RESNETS:
        raise UserError(f"activation is {activation!r}: {name} has its own, expected relu, or a ResNet backbone")
    if name.startswith(PREFIX):
        if norm != "batch":
            raise UserError(f"norm is {norm!r}: {name} has its own, expected batch")
        if multi_grid != (1, 1, 1):
            raise UserError(f"multi_grid is {multi_grid}: {name} has none, expected (1, 1, 1)")
        return TimmEncoder(name, output_stride=output_stride)
    shared = {"norm": norm, "output_stride": output_stride}
    if name in XCEPTIONS:
        return Xception(name, multi_grid=multi_grid, **shared)
    if name in RESNETS_BETA:
        return ResNetBeta(name, multi_grid=multi_grid, **shared)
    shared["first_block_dilation"] = first_block_dilation
    if name in RESNETS:
        blocks = RESNETS[name][1][-1]
        if multi_grid != (1, 1, 1) and blocks != 3:
            raise UserError(
                f"multi_grid is {multi_grid}: {name} ends with {blocks} blocks, not three: expected (1, 1, 1)"
            )
        return ResNet(name, multi_grid=multi_grid, beta=beta_stem, activation=activation, **shared)
    if not 0 < width_mult < float("inf"):
        raise UserError(f"width_mult is {width_mult}: expected a number above 0")
    width = {"width_mult": width_mult, "width_divisor": width_divisor}
    if name == "mobilenet_v2_zym1119":
        if output_stride != 16:
            raise UserError(f"output_stride is {output_stride}: {name} has one stride, expected 16")
        return MobileNetV2Zym1119(**width, norm=norm, multi_grid=multi_grid)
    if multi_grid != (1, 1, 1):
        raise UserError(f"multi_grid is {multi_grid}: {name} has none, expected (1, 1, 1)")
    return MobileNetV2(**width, **MOBILENETS[name], **shared)


def _initialise(model: DeepLab) -> None:
    """Norms keep torch's weight 1 and bias 0."""
    own = None if isinstance(model.backbone, TimmEncoder) else model.backbone
    for part in (own, model.aspp, model.decoder, model.auxiliary):
        mode = "fan_out" if part is model.backbone else "fan_in"
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    for classifier in (model.classifier, *(() if model.auxiliary is None else (model.auxiliary.classifier,))):
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)

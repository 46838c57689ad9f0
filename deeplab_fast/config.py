"""Everything that a run can be told, as frozen dataclasses; the command lines and the checkpoints are made from them.

Every field is a flag of the same name (`crop_size` is `--crop-size`), and the text below it is the flag's help.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from .errors import UserError

Year = Literal["2007", "2008", "2009", "2010", "2011", "2012"]
DataName = Literal["scenes", "voc", "cityscapes", "camvid", "ade20k", "coco", "folder"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and from where."""

    name: Annotated[DataName, tyro.conf.arg(name="data")] = "scenes"
    """the data set; `scenes` is painted on the fly and reads no file"""
    root: str | None = None
    """folder of the data set (not for scenes)"""
    train_split: str | None = None
    """split to train on; None: the data set's own (`train`; `train_aug` where VOC has SegmentationClassAug)"""
    val_split: str | None = None
    """split to validate on; None: the data set's own (`val`)"""
    year: Year = "2012"
    """VOC only: which VOCdevkit folder"""
    sbd: str | None = None
    """VOC only: folder of the Semantic Boundaries Dataset, whose images, but VOC's val, train and trainval then hold"""
    scene_size: tuple[int, int] = (128, 256)
    """scenes only: height and width that are painted, in pixels"""
    scene_count: int = 10_000
    """scenes only: training scenes in one epoch"""
    scene_val_count: int = 100
    """scenes only: held-out scenes"""
    workers: int | None = None
    """loader processes of each process; None: one a core of its share, 8 at most, 0 where there is one core"""
    check: bool = True
    """read every mask's header and values before training starts, and name all that is wrong"""


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a training image; evaluation does none of it. Every item can be turned off by its value."""

    crop_size: tuple[int, int] = (513, 513)
    """height and width of a training crop, in pixels"""
    scale_min: float = 0.5
    """smallest random scale; equal to scale_max: no random scale"""
    scale_max: float = 2.0
    """largest random scale"""
    scale_sampling: Literal["uniform", "log", "step"] = "uniform"
    """uniform; log: halving as likely as doubling; step: one of scale_min, scale_min + scale_step ... scale_max"""
    scale_step: float = 0.25
    """step: distance of two scales"""
    base_size: int = 0
    """length in pixels of the image's shorter side at scale 1; 0: its own"""
    flip: float = 0.5
    """probability of a left-right flip"""
    jitter: float = 0.0
    """brightness, contrast and saturation are each multiplied by a factor from [1 - jitter, 1 + jitter]; 0: off"""
    blur: float = 0.0
    """probability of a Gaussian blur"""
    blur_sigma: float = 1.0
    """largest standard deviation of that blur, in pixels"""
    rare_crop: float = 0.0
    """probability that a crop is centred on a pixel of a class drawn evenly from those in the image; 0: off"""


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `deeplab_fast.build_model`; their meaning is in its docstring."""

    name: Annotated[Literal["deeplabv3", "deeplabv3plus"], tyro.conf.arg(name="model")] = "deeplabv3plus"
    """architecture"""
    backbone: str = "mobilenet_v2"
    """resnet18, resnet34, resnet50, resnet101, resnet152, mobilenet_v2, xception41, xception65, xception71, or another
    project's mobilenet_v2_1280, mobilenet_v2_tf, mobilenet_v2_vainf, mobilenet_v2_zym1119, resnet_v1_50_beta,
    resnet_v1_101_beta, or timm:NAME (an encoder of timm, which has to be installed)"""
    width_mult: float = 1.0
    """mobilenet_v2 only: width multiplier"""
    width_divisor: int = 8
    """mobilenet_v2 only: every width is a multiple of it; TensorFlow's DeepLab has 4 where the multiplier is not 1"""
    beta_stem: bool = False
    """ResNet only: three 3x3 convolutions in place of the 7x7 stem"""
    output_stride: Literal[8, 16, 32] = 16
    """input size over the size of the backbone's last feature map"""
    multi_grid: tuple[int, int, int] = (1, 1, 1)
    """factors of the dilation in a ResNet's last three blocks or an Xception's last three convolutions (DeepLabv3,
    section 3.2)"""
    first_block_dilation: Literal["stage", "previous"] = "stage"
    """dilation of the first block of a stage that lost its stride: its stage's, or that of the stage before it, as
    in torchvision"""
    atrous_rates: tuple[int, ...] | None = None
    """ASPP's rates; None: 6, 12, 18 at output stride 16, doubled at 8, halved at 32; empty: the 1x1 branch and the
    image pooling alone, TensorFlow's head for MobileNetV2"""
    image_pooling: bool = True
    """ASPP's global pooling branch"""
    aspp_channels: int = 256
    """width of every ASPP branch and of what leaves ASPP"""
    separable: bool = True
    """depthwise-separable 3x3 convolutions in ASPP and decoder"""
    separable_order: Literal["norm_last", "norm_each"] = "norm_last"
    """norm_last: depthwise, pointwise, norm, ReLU; norm_each: norm and ReLU after each of the two"""
    aspp_refine: bool = False
    """a 3x3 convolution after ASPP, as in torchvision and segmentation_models_pytorch"""
    low_level_channels: int = 48
    """width to which the decoder reduces the low-level features"""
    decoder_channels: int = 256
    """width of the decoder's 3x3 convolutions"""
    refinements: int = 2
    """3x3 convolutions after the concat: 1 or 2"""
    dropout: float = 0.1
    """dropout after ASPP's projection"""
    decoder_dropout: tuple[float, ...] = ()
    """dropout after each of the decoder's 3x3 convolutions; empty: none"""
    align_corners: bool = False
    """how every bilinear upsampling of the model places its corners"""
    norm: Literal["batch", "sync_batch", "frozen_batch", "group"] = "batch"
    """normalisation; sync_batch is batch over all processes, and takes its place where there are
    several and the flag is not given; group comes with weight standardisation"""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """ResNet only: what follows a norm, in the head too; leaky_relu has InPlaceABN's slope of 0.01"""
    aspp_activation: bool = True
    """the activation after ASPP's norms"""
    pixels: Literal["imagenet", "symmetric", "bgr_unit"] = "imagenet"
    """what the backbone is given: RGB normalised by ImageNet's mean and deviation, RGB from -1 to 1 (TensorFlow's
    Xception), or BGR from 0 to 1; the input is converted"""
    norm_momentum: float = 0.1
    """share of a batch in the running statistics of the backbone's batch norms"""
    head_norm_momentum: float = 0.1
    """the same for those of ASPP, decoder and auxiliary head"""
    auxiliary: bool = False
    """a second head on the backbone's third stage, for the training loss alone (see auxiliary_weight)"""


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimiser and schedule."""

    batch_size: int = 16
    """images in one forward pass, of all processes together where there are several"""
    accumulate: int = 1
    """forward passes in one optimiser step"""
    steps: int = 30_000
    """optimiser steps"""
    optimizer: Literal["sgd", "adamw", "rmsprop"] = "sgd"
    """sgd (with momentum), adamw or rmsprop (with momentum)"""
    lr: float = 0.01
    """peak learning rate of the backbone"""
    head_lr_mult: float = 10.0
    """learning rate of ASPP, decoder and classifier over the backbone's"""
    momentum: float = 0.9
    """of SGD and RMSprop; AdamW's first beta"""
    nesterov: bool = False
    """SGD only: Nesterov's momentum"""
    weight_decay: float = 1e-4
    """L2 penalty of SGD and RMSprop; AdamW's decoupled decay"""
    rms_decay: float = 0.99
    """RMSprop only: decay a step of the averaged squared gradient; TensorFlow's MobileNets have 0.9"""
    epsilon: float = 1e-8
    """AdamW and RMSprop: what is added to the root of that average; TensorFlow's MobileNets have 1 in RMSprop"""
    decay_norm_bias: bool = False
    """apply it to normalisation parameters and biases as well"""
    decay_depthwise: bool = True
    """apply it to depthwise convolutions; TensorFlow's DeepLab does not"""
    schedule: Literal["poly", "cosine", "step", "constant"] = "poly"
    """how the rate falls: (1 - step / steps) ** poly_power, half a cosine to 0, or by step_factor every step_every"""
    poly_power: float = 0.9
    """poly: the exponent"""
    step_every: int = 10_000
    """step: steps between two falls"""
    step_factor: float = 0.1
    """step: the rate after a fall over that before it"""
    warmup_steps: int = 0
    """steps in which the rate rises from warmup_lr_mult of its value"""
    warmup: Literal["linear", "exponential", "constant"] = "linear"
    """linear: times the schedule, which has begun; exponential: by one factor a step, and the schedule begins after;
    constant: stays there, and the schedule begins after (TensorFlow's slow start)"""
    warmup_lr_mult: float = 0.01
    """where the warm-up starts, over the peak rate"""
    clip_norm: float = 0.0
    """largest norm of the gradient; 0: no clipping"""
    ema_decay: float = 0.0
    """decay a step of the averaged weights, which are then validated and saved as the model; 0: off"""
    class_weights: tuple[float, ...] | Literal["enet", "median"] | None = None
    """weight of each class in the loss, or measured on the training split: enet, 1 / ln(1.02 + share of the pixels), or
    median, median frequency over its own; None: all 1"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes"""
    focal_gamma: float = 0.0
    """exponent of the focal loss, (1 - p) ** gamma times the cross entropy of each pixel; 0: cross entropy"""
    auxiliary_weight: float = 0.4
    """weight of the auxiliary head's cross entropy (PSPNet, section 3.3; torchvision's script has 0.5)"""
    mining: Literal["none", "ohem", "top_k"] = "none"
    """learn from the hard pixels of each forward pass only: by their probability, or the share with the largest loss"""
    ohem_threshold: float = 0.7
    """ohem: a pixel is hard where the probability of its class is at most this"""
    ohem_min_kept: float = 1 / 16
    """ohem: share of all pixels, ignored ones too, that is kept however large their probability"""
    top_k: float = 0.25
    """top_k: share of all pixels, ignored ones too, that is kept"""
    top_k_steps: int = 0
    """top_k: steps in which that share falls linearly from 1"""


@dataclass(frozen=True)
class RunConfig:
    """Where and how it runs."""

    output: str = "runs/scenes"
    """folder for checkpoints, curves, pictures and logs"""
    seed: int = 0
    """of the initial weights and of every random draw in the data"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device has it, fp16 on older GPUs, else fp32"""
    channels_last: bool = True
    """channels-last activations and weights"""
    compile: bool = False
    """torch.compile the model"""
    recompute: bool = False
    """compute the backbone's blocks again in the backward pass instead of keeping what is inside them (activation
    checkpointing): less memory, a forward pass of the backbone more"""
    threads: int = 0
    """CPU threads; 0: all that torch would take"""
    log_every: int = 10
    """steps between two lines of metrics.jsonl"""
    val_every: int = 1000
    """steps between two validations; the last step is always validated"""
    save_every: int = 500
    """steps between two writes of last.pt"""
    sample_count: int = 4
    """validation images in samples.png and TensorBoard"""
    tensorboard: bool = True
    """write TensorBoard events"""
    weights: str | None = None
    """weights to start from: a file, of this project or of one that `deeplab_fast.load_weights` knows, a URL, or
    `imagenet` for torchvision's ImageNet weights of the backbone"""


# Smallest and largest value of each number that has one; None: no bound. Model fields are checked by build_model.
_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "data.scene_size": (32, None),
    "data.scene_count": (1, None),
    "data.scene_val_count": (1, None),
    "data.workers": (0, None),
    "augment.crop_size": (1, None),
    "augment.scale_min": (0.01, None),
    "augment.scale_max": (0.01, None),
    "augment.scale_step": (0.01, None),
    "augment.base_size": (0, None),
    "augment.flip": (0, 1),
    "augment.jitter": (0, 1),
    "augment.blur": (0, 1),
    "augment.blur_sigma": (0, 32),
    "augment.rare_crop": (0, 1),
    "optim.batch_size": (1, None),
    "optim.accumulate": (1, None),
    "optim.steps": (1, None),
    "optim.lr": (0, None),
    "optim.head_lr_mult": (0, None),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, None),
    "optim.rms_decay": (0, 1),
    "optim.epsilon": (0, None),
    "optim.poly_power": (0, None),
    "optim.step_every": (1, None),
    "optim.step_factor": (0, 1),
    "optim.warmup_steps": (0, None),
    "optim.warmup_lr_mult": (0, 1),
    "optim.clip_norm": (0, None),
    "optim.ema_decay": (0, 1),
    "optim.class_weights": (0, None),
    "optim.label_smoothing": (0, 1),
    "optim.focal_gamma": (0, 32),
    "optim.auxiliary_weight": (0, None),
    "optim.ohem_threshold": (0, 1),
    "optim.ohem_min_kept": (0, 1),
    "optim.top_k": (0, 1),
    "optim.top_k_steps": (0, None),
    "run.seed": (0, 2**31 - 1),
    "run.threads": (0, None),
    "run.log_every": (1, None),
    "run.val_every": (1, None),
    "run.save_every": (1, None),
    "run.sample_count": (1, 64),
}


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise UserError for a number that is out of its bounds; NaN is out of any."""
        for name, (low, high) in _BOUNDS.items():
            group, _, item = name.partition(".")
            value = getattr(getattr(self, group), item)
            for number in (
                value if isinstance(value, tuple) else () if value is None or isinstance(value, str) else (value,)
            ):
                within = (low is None or number >= low) and (high is None or number <= high)
                if not (within and math.isfinite(number)):
                    bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                    raise UserError(f"--{item.replace('_', '-')} {number}: expected {bounds}")
        if self.augment.scale_min > self.augment.scale_max:
            raise UserError(f"--scale-min {self.augment.scale_min} is larger than --scale-max {self.augment.scale_max}")
        if self.run.recompute and self.run.compile:
            raise UserError("--recompute --compile: expected one of them; torch.compile chooses what it recomputes")
        if self.optim.warmup == "exponential" and self.optim.warmup_steps and not self.optim.warmup_lr_mult:
            raise UserError("--warmup exponential --warmup-lr-mult 0: expected a number above 0 to start from")
        if self.optim.nesterov and not self.optim.momentum:
            raise UserError("--nesterov --momentum 0: expected a momentum above 0")
        if self.optim.focal_gamma and self.optim.label_smoothing:
            raise UserError(
                f"--focal-gamma {self.optim.focal_gamma} --label-smoothing {self.optim.label_smoothing}: "
                "expected one of them, the other 0"
            )
        if self.optim.optimizer == "adamw" and self.optim.momentum == 1:
            raise UserError("--optimizer adamw --momentum 1: expected a momentum under 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: what `config.json` and the checkpoints hold."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. A field that this version does not know raises UserError."""
        groups = {}
        for group in dataclasses.fields(cls):
            kind = group.default_factory
            values = dict(saved.get(group.name, {}))
            known = {f.name for f in dataclasses.fields(kind)}
            if unknown := sorted(values.keys() - known):
                raise UserError(
                    f"the saved config has {group.name}.{unknown[0]}, which this version of deeplab_fast does not know"
                )
            groups[group.name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return cls(**groups)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value

"""Presets: functions that return a `Config`, a log of what was trained and where its numbers come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .config import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from .recipes import RECIPES


def scenes() -> Config:
    """The built-in street scenes, from random weights, in under five minutes on two CPU cores.

    Every scene is new, so nothing has to keep the model from learning the training set by heart: no jitter, no dropout.
    """
    return Config(
        data=DataConfig(name="scenes"),
        augment=AugmentConfig(crop_size=(128, 256), scale_min=1.0, scale_max=1.0),
        model=ModelConfig(backbone="resnet18", output_stride=32, aspp_channels=128, decoder_channels=128, dropout=0.0),
        optim=OptimConfig(
            batch_size=8,
            steps=600,
            optimizer="adamw",
            lr=3e-3,
            head_lr_mult=1.0,
            weight_decay=0.05,
            warmup_steps=20,
            clip_norm=5.0,
            ema_decay=0.98,
            # sky, building, road, pavement, vegetation, car, person, pole, sign, fence
            class_weights=(0.8, 0.7, 0.8, 1.0, 1.0, 1.0, 1.5, 1.3, 1.8, 1.0),
        ),
        run=RunConfig(output="runs/scenes", val_every=300, save_every=150),
    )


def voc() -> Config:
    """PASCAL VOC 2012, the schedule of DeepLabv3 section 4.1 and DeepLabv3+ section 4: 30k steps of 16 crops of 513.

    With ResNet-101 DeepLabv3+ reaches 78.85 (table 2), at one rate for all layers and with ordinary convolutions in
    ASPP and decoder; here the head has ten times the rate, and separable ones.
    """
    return Config(
        data=DataConfig(name="voc"),
        augment=AugmentConfig(crop_size=(513, 513)),
        model=ModelConfig(backbone="resnet101", multi_grid=(1, 2, 4)),
        optim=OptimConfig(batch_size=16, steps=30_000, lr=0.007, head_lr_mult=10.0, weight_decay=4e-5),
        run=RunConfig(output="runs/voc", weights="imagenet", val_every=2000, save_every=500),
    )


def cityscapes() -> Config:
    """Cityscapes fine annotations: 90k steps of 8 crops of 769 from a rate of 0.01. Crop, steps and rate are those of
    DeepLabv3+'s authors (tensorflow/models#3677); no published figure is aimed at.
    """
    return Config(
        data=DataConfig(name="cityscapes"),
        augment=AugmentConfig(crop_size=(769, 769), jitter=0.5),
        model=ModelConfig(backbone="resnet101", multi_grid=(1, 2, 4)),
        optim=OptimConfig(batch_size=8, steps=90_000, lr=0.01, head_lr_mult=10.0, warmup_steps=1000),
        run=RunConfig(output="runs/cityscapes", weights="imagenet", val_every=5000, save_every=500),
    )


def camvid() -> Config:
    """CamVid at 480 x 360 with 11 classes: 1,000 steps of 8; benchmarks/results/camvid.jsonl is the record of a run."""
    return Config(
        data=DataConfig(name="camvid"),
        augment=AugmentConfig(crop_size=(352, 352), scale_min=0.75, scale_max=1.75, jitter=0.3, rare_crop=0.3),
        model=ModelConfig(backbone="mobilenet_v2"),
        optim=OptimConfig(
            batch_size=8,
            steps=1000,
            optimizer="adamw",
            lr=5e-4,
            head_lr_mult=4.0,
            weight_decay=0.05,
            warmup_steps=50,
            ema_decay=0.99,
            # About the inverse square root of each class's share of the training pixels, and twice that for poles,
            # two pixels wide: sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, cyclist.
            class_weights=(0.6, 0.6, 4.0, 0.5, 0.9, 0.7, 2.0, 1.3, 0.9, 2.0, 2.0),
        ),
        run=RunConfig(output="runs/camvid", weights="imagenet", val_every=250, save_every=250),
    )


def ade20k() -> Config:
    """ADE20K's 150 classes: 80k steps of 16 crops of 513; no published figure is aimed at.

    tensorflow/models names 45.65 for its Xception-65, but neither the rate, nor the batch, nor the sizes behind it.
    """
    return Config(
        data=DataConfig(name="ade20k"),
        augment=AugmentConfig(crop_size=(513, 513), jitter=0.5),
        model=ModelConfig(backbone="resnet50", multi_grid=(1, 2, 4)),
        optim=OptimConfig(batch_size=16, steps=80_000, lr=0.01, head_lr_mult=10.0, warmup_steps=1000),
        run=RunConfig(output="runs/ade20k", weights="imagenet", val_every=5000, save_every=500),
    )


def coco() -> Config:
    """COCO with VOC's 21 classes, to start VOC from: the schedule of `voc`, three times as long."""
    config = voc()
    return replace(
        config,
        data=DataConfig(name="coco"),
        optim=replace(config.optim, steps=90_000),
        run=replace(config.run, output="runs/coco", val_every=5000),
    )


def folder() -> Config:
    """A folder of one's own: small crops and a short schedule, to be changed to the data."""
    return Config(
        data=DataConfig(name="folder"),
        augment=AugmentConfig(crop_size=(321, 321), jitter=0.3),
        model=ModelConfig(backbone="mobilenet_v2"),
        optim=OptimConfig(batch_size=8, steps=2000, lr=0.01, head_lr_mult=5.0, warmup_steps=50, ema_decay=0.99),
        run=RunConfig(output="runs/folder", weights="imagenet", val_every=250, save_every=100),
    )


_SMOKE = {"resnet101": "resnet50", "resnet152": "resnet50", "xception65": "xception41", "xception71": "xception41"}


def smoke(config: Config) -> Config:
    """`config` at a size that any CPU runs in seconds: 20 steps of 2 small crops, narrow heads, random weights.

    Loss, optimiser, schedule, augmentation and the kind of network stay; a ResNet becomes ResNet-18, or ResNet-50 where
    it has a multi-grid, which takes three blocks, and an Xception Xception-41.
    """
    augment, model, optim = config.augment, config.model, config.optim
    steps = 20
    shrink = 65 / max(augment.crop_size)
    backbone = _SMOKE.get(model.backbone, model.backbone)
    if backbone.startswith("resnet") and model.multi_grid == (1, 1, 1):
        backbone = "resnet18"
    return replace(
        config,
        data=replace(config.data, workers=0, scene_size=(64, 64), scene_count=8, scene_val_count=2),
        augment=replace(augment, crop_size=(65, 65), base_size=round(augment.base_size * shrink)),
        model=replace(model, backbone=backbone, aspp_channels=16, decoder_channels=16, low_level_channels=8),
        optim=replace(
            optim,
            batch_size=2,
            accumulate=1,
            steps=steps,
            warmup_steps=min(optim.warmup_steps, 5),
            step_every=min(optim.step_every, 8),
            top_k_steps=min(optim.top_k_steps, 10),
        ),
        run=replace(config.run, weights=None, val_every=steps, save_every=steps, sample_count=2, tensorboard=False),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset for preset in (scenes, voc, cityscapes, camvid, ade20k, coco, folder, *RECIPES)
}

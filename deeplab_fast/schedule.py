"""Learning-rate factor of each optimiser step, and the averaged copy of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from .config import OptimConfig


def lr_factor(step: int, config: OptimConfig) -> float:
    """The rate of 0-based `step` over the peak rate.

    A linear warm-up multiplies the decay (DeepLabv3, section 4.1: poly), which begins at step 0; after an exponential
    one (CoinCheung/DeepLab-v3-plus-cityscapes, optimizer.py) and a constant one (tensorflow/models, research/deeplab,
    slow_start_step) the decay has the steps that are left.
    """
    warmup, start = config.warmup_steps, config.warmup_lr_mult
    if config.warmup != "linear":
        if step >= warmup:
            return _decay(step - warmup, config.steps - warmup, config)
        return start ** (1 - step / warmup) if config.warmup == "exponential" else start
    rise = start + (1 - start) * step / warmup if step < warmup else 1.0
    return rise * _decay(step, config.steps, config)


def _decay(step: int, steps: int, config: OptimConfig) -> float:
    """The factor of 0-based `step` of `steps`."""
    if config.schedule == "poly":
        return (1 - step / steps) ** config.poly_power
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    if config.schedule == "step":
        return config.step_factor ** (step // config.step_every)
    return 1.0


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """SGD's groups: backbone and head, each with and without weight decay. Every parameter stands in exactly one."""
    backbone = {id(p) for p in model.backbone.parameters()}
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    depthwise = {id(m.weight) for m in convolutions if 1 < m.groups == m.in_channels}
    groups = {(is_head, decay): [] for is_head in (False, True) for decay in (True, False)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Weights of convolutions are the only parameters with more than one dimension.
            decay = config.decay_norm_bias or parameter.ndim > 1
            decay = decay and (config.decay_depthwise or id(parameter) not in depthwise)
            groups[id(parameter) not in backbone, decay].append(parameter)
    return [
        {
            "params": parameters,
            "lr_mult": config.head_lr_mult if is_head else 1.0,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (is_head, decay), parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; the loop sets each group's rate before every step."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), eps=config.epsilon)
    if config.optimizer == "rmsprop":
        momentum = {"alpha": config.rms_decay, "momentum": config.momentum}
        return torch.optim.RMSprop(groups, lr=config.lr, eps=config.epsilon, **momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


class WeightAverage:
    """Exponential moving average of parameters and floating-point buffers; integer buffers are copied.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the random first weights are forgotten at once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after 0-based `step`."""
        floating = [(mine, new) for mine, new in self._pairs if mine.is_floating_point()]
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([mine for mine, _ in floating], [new for _, new in floating], weight)
        for mine, new in self._pairs:
            if not mine.is_floating_point():
                mine.copy_(new)

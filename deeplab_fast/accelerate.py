"""Makes somebody else's DeepLab run on this project's ops, in place: `accelerate(model)`.

A module whose forward holds what the layers of this project compute becomes an instance of a subclass of its own class
with another forward; parameters, buffers, keys, children and hooks stay what and where they are. The new forward looks
at each call whether the module still is what it was built for, and else calls the old one.
"""

from __future__ import annotations

import copy
import copyreg
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import UserError

if TYPE_CHECKING:
    from .model.fusing import Plan


def accelerate(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """The same model, faster in training and inference; the same object, whose modules are changed in place.

    model: any nn.Module, on any device, as of segmentation_models_pytorch, torchvision or timm. Depthwise and separable
        convolutions, batch norms with the sum and the activation that follow, bilinear upsampling into a concatenation
        and concatenations are looked for in every module's forward, by structure.
    channels_last: also puts the weights into that layout (`model.to(memory_format=torch.channels_last)`), which the ops
        want; inputs may have any.

    Results, gradients and running statistics equal the model's own to rounding; parameters, state_dict, train(),
    eval(), hooks and deepcopy are what they were. A hook, a conversion or another child put in later is honoured: that
    module then runs its own forward again. So does what is compiled, exported or traced. Pickled, it is the model that
    it was. Inference wants torch.inference_mode(): with gradients on, batch norms in eval mode are torch's own.
    Calling it twice changes nothing more. `accelerated(model)` tells what was found.

    Raises UserError where there is nothing to replace.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"accelerate was given a {type(model).__name__}: expected a torch.nn.Module")
    found = {module: plans for module in _others(model) if (plans := _plans(module))}
    for module, plans in found.items():
        module.__class__ = _subclass(type(module), plans)
    if not accelerated(model):
        raise UserError(
            f"accelerate found nothing to replace in {type(model).__name__}: expected convolutions and batch norms of "
            "torch.nn (models of deeplab_fast are made of its layers already)"
        )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def accelerated(model: nn.Module) -> dict[str, int]:
    """What `accelerate` has put in place, and how often, in the model's present mode; {} where it has not."""
    counts: Counter[str] = Counter()
    inside: set[nn.Module] = set()  # of a module that calls their layers itself
    for module in model.modules():
        if module in inside or not isinstance(module, Accelerated) or (plan := module._plan()) is None:
            continue
        counts += plan.found
        inside.update(plan.inlined(module))
    return dict(sorted(counts.items()))


class Accelerated:
    """What an accelerated module's class has beside the module's own class."""

    _plain_class: type[nn.Module]
    _plans: dict[bool, Plan]

    def _plan(self) -> Plan | None:
        plan = self._plans.get(self.training)
        return plan if plan is not None and plan.holds(self) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not _is_recorded(args[0]) and (plan := self._plan()) is not None:
            return plan.forward(self, args[0])
        return self._plain_class.forward(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        own = type(self)
        self.__class__ = self._plain_class
        try:
            copied = copy.deepcopy(self, memo)
        finally:
            self.__class__ = own
        copied.__class__ = own
        return copied

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        function, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__:  # which insists on the class of self
            function = self._plain_class.__new__
        return function, tuple(self._plain_class if a is type(self) else a for a in arguments), *state


def _is_recorded(x: Any) -> bool:
    """Whether somebody else records what is called: they get the plain modules."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


def _others(model: nn.Module) -> list[nn.Module]:
    """Modules with children that are neither this project's, nor within one, nor accelerated already."""
    own = {part for module in model.modules() if _is_own(module) for part in module.modules()}
    foreign = (module for module in model.modules() if module not in own and module._modules)
    return [m for m in foreign if not isinstance(m, (Accelerated, torch.jit.ScriptModule)) and "forward" not in vars(m)]


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == __package__


def _plans(module: nn.Module) -> dict[bool, Plan]:
    from .model.fusing import plan

    found = {training: plan(module, training=training) for training in (True, False)}
    return {training: plan for training, plan in found.items() if plan is not None}


def _subclass(original: type[nn.Module], plans: dict[bool, Plan]) -> type[nn.Module]:
    """With the name of the original, so that it prints and is found as such."""
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (Accelerated, original), same | {"_plain_class": original, "_plans": plans})

"""Makes somebody else's DeepLab run on this project's ops, in place: `accelerate(model)`.

A module whose forward holds what the layers of this project compute becomes an instance of a subclass of its own class
that is called in another way; parameters, buffers, keys, children, hooks and `forward` stay what and where they are.
The call looks each time whether the module still is what it was built for, and else is the old one.
"""

from __future__ import annotations

import copy
import copyreg
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .errors import UserError

if TYPE_CHECKING:
    from .model.fusing import Plan


def accelerate(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """The same model, faster in training and inference; the same object, whose modules are changed in place.

    model: any nn.Module, on any device, as of segmentation_models_pytorch, torchvision or timm. Depthwise and separable
        convolutions, batch norms with the sum and the activation that follow, bilinear upsampling into a concatenation
        and concatenations are looked for by structure in every module's forward, which is read, not run. A forward
        that holds more than calls of layers, loops over them and decisions by constants is left alone.
    channels_last: also puts weights of four dimensions into that layout, which the ops want, except those in memory
        that others share. Inputs may have any layout; results have that one: `reshape` them, where `view` raises.

    Results, gradients and running statistics equal the model's own to rounding; parameters, state_dict, train(),
    eval(), hooks and deepcopy are what they were. A hook, a conversion, an option or another child put in later is
    honoured: that module then runs its own forward again. So does what is compiled, exported, traced or transformed.
    Pickled, it is the model that it was. A gradient of a gradient raises. Inference wants torch.inference_mode(): with
    gradients on, batch norms in eval mode are torch's own. Calling it twice changes nothing more. `accelerated(model)`
    tells what was found.

    Raises UserError where there is nothing to replace.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"accelerate was given a {type(model).__name__}: expected a torch.nn.Module")
    found = [(module, plans) for module in _others(model) if (plans := _plans(module))]
    for module, plans in found:
        module.__class__ = _subclass(type(module), plans)
    if not any(isinstance(module, Accelerated) for module in model.modules()):
        raise UserError(
            f"accelerate found nothing to replace in {type(model).__name__}: expected convolutions and batch norms of "
            "torch.nn (models of deeplab_fast are made of its layers already)"
        )
    if channels_last:
        for weight in filter(_may_move, model.parameters()):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


def accelerated(model: nn.Module) -> dict[str, int]:
    """What `accelerate` has put in place, and how often, in the model's present mode; {} where it has not."""
    counts: Counter[str] = Counter()
    inside: set[nn.Module] = set()  # of a module that calls their layers itself
    for module in model.modules():
        if module in inside or not isinstance(module, Accelerated) or (plan := _plan(module)) is None:
            continue
        counts += plan.found
        inside.update(plan.inlined(module))
    return dict(sorted(counts.items()))


class Accelerated:
    """What an accelerated module's class has beside the module's own class."""

    _deeplab_fast_class: type[nn.Module]  # what it was
    _deeplab_fast_plans: dict[bool, Plan]  # by `training`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not by `forward`: who scripts, traces or calls that finds the model's own.
        plan = None if kwargs or _is_watched() or not all(map(_is_plain, args)) else _plan(self)
        if plan is None or (len(args) != 1 and not plan.starred):
            return nn.Module.__call__(self, *args, **kwargs)
        return plan.forward(self, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        own = type(self)
        self.__class__ = plain = own._deeplab_fast_class
        try:
            copied = copy.deepcopy(self, memo)
        finally:
            self.__class__ = own
        if type(copied) is plain:
            copied.__class__ = own
        return copied

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        function, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__:  # which insists on the class of self
            function = self._deeplab_fast_class.__new__
        return function, tuple(self._deeplab_fast_class if a is type(self) else a for a in arguments), *state


def _plan(module: nn.Module) -> Plan | None:
    """The one that holds. Of the class, which another thread may have changed back to copy the module."""
    plan = getattr(type(module), "_deeplab_fast_plans", {}).get(module.training)
    return plan if plan is not None and plan.holds(module) else None


def _may_move(weight: nn.Parameter) -> bool:
    """A weight of four dimensions in memory that nobody else can know."""
    if type(weight) is not nn.Parameter or weight.dim() != 4:
        return False
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return alone and not (weight.device.type == "cpu" and weight.is_shared())


def _is_watched() -> bool:
    """Whether somebody else records or transforms what is called: they get the plain modules."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return any(not isinstance(mode, DeviceContext) for mode in _function_modes())


def _function_modes() -> Iterator[Any]:
    return map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))


def _is_plain(x: Any) -> bool:
    """A tensor of torch's own in the memory of a device, or a collection of such."""
    if type(x) is Tensor or type(x) is nn.Parameter:
        return x.device.type in ("cpu", "cuda") and x.layout is torch.strided
    if type(x) in (dict, OrderedDict):
        x = x.values()
    elif type(x) not in (list, tuple):
        return False
    return all(map(_is_plain, x))


def _others(model: nn.Module) -> list[nn.Module]:
    """Modules with children that are neither this project's, nor a graph or script, nor in one, nor accelerated."""
    closed = (torch.jit.ScriptModule, torch.fx.GraphModule)
    own = {part for m in model.modules() if _is_own(m) or isinstance(m, closed) for part in m.modules()}
    return [m for m in model.modules() if m not in own and m._modules and _can_be_subclassed(m)]


def _can_be_subclassed(module: nn.Module) -> bool:
    """Its class has no say in what it is to be a subclass of it."""
    kinds = type(module).__mro__
    free = type(type(module)) is type and not any("__init_subclass__" in vars(kind) for kind in kinds[:-1])
    return free and not isinstance(module, Accelerated) and "forward" not in vars(module)


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == __package__


def _plans(module: nn.Module) -> dict[bool, Plan]:
    from .model.fusing import plan

    found = {training: plan(module, training=training) for training in (True, False)}
    return {training: plan for training, plan in found.items() if plan is not None}


def _subclass(original: type[nn.Module], plans: dict[bool, Plan]) -> type[nn.Module]:
    """With the name of the original, so that it prints and is found as such."""
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"_deeplab_fast_class": original, "_deeplab_fast_plans": plans}
    return type(original.__name__, (Accelerated, original), same | own)

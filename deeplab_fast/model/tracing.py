"""Somebody else's module as a graph of what its forward calls, or None where a graph would not say all that it does.

A forward is run once on stand-ins for tensors (torch.fx). What these cannot see would be lost in the graph: a decision
by the kind of an argument, a random draw, an attribute or a buffer that is written. Such a forward is refused.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .layers import is_plain


class _StandIn(fx.Proxy):
    """Records assignments in place as such, and refuses to be asked for its type by anything but torch."""

    @property
    def __class__(self) -> type:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if not asking.startswith("torch."):
            raise TypeError(f"{asking} asks for the type of a tensor")
        return _StandIn


def _in_place(function: Callable) -> Callable:
    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


for _name in ("iadd", "isub", "imul", "itruediv"):  # torch.fx records them as `add` and so on, which write nothing
    setattr(_StandIn, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not is_flat(module)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def create_arg(self, value: Any) -> Any:
        if type(value) is _StandIn:
            return super().create_arg(value)
        if type(value) is OrderedDict:  # what torchvision's backbones return; torch.fx makes a dict of it
            return self.create_proxy("call_function", OrderedDict, (list(value.items()),), {}).node
        if isinstance(value, dict) and type(value) is not dict:
            raise TypeError(f"{type(value).__name__} is no plain dict")
        if isinstance(value, Tensor):
            own = (*self.root.parameters(), *self.root.buffers())
            if not any(value is tensor for tensor in own):
                raise TypeError("a tensor that is neither parameter nor buffer")
        return super().create_arg(value)


def trace(module: nn.Module, *, training: bool) -> fx.Graph | None:
    """What module(x) calls in that mode; modules of flat sequences (`is_flat`) by their full names.

    None where it takes other than one argument or does what a graph does not show.
    """
    if not _takes_one(class_of(module).forward):
        return None
    parts = [part for part in module.modules() if part is module or is_flat(part)]
    before = [dict(vars(part)) for part in parts]
    drawn = random.getstate(), torch.get_rng_state()
    module.training = training
    with torch.inference_mode(False):  # where tensors have no version
        buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        vars(module)["_buffers"] = buffers
        try:
            graph = _Tracer().trace(module)
        # Foreign code on stand-ins: whatever it raises, it is not understood.
        except Exception:
            graph = None
    written = any(b is not None and b._version for b in buffers.values())
    vars(module).update(training=before[0]["training"], _buffers=before[0]["_buffers"])
    same = all(_same(vars(part), old) for part, old in zip(parts, before, strict=True))
    for part, old in zip(parts, before, strict=True):
        vars(part).clear()
        vars(part).update(old)
    same = same and random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
    random.setstate(drawn[0])
    torch.set_rng_state(drawn[1])
    return graph if same and not written else None


def _takes_one(forward: Callable) -> bool:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    one = len(parameters) == 1 and parameters[0].default is inspect.Parameter.empty
    return one and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is before[name] for name in before)


def class_of(module: nn.Module) -> type[nn.Module]:
    """What a module was before it was accelerated."""
    return getattr(type(module), "_plain_class", type(module))


def is_flat(module: nn.Module) -> bool:
    """A plain sequence of torch's own layers, or of such sequences."""
    if class_of(module).forward is not nn.Sequential.forward or not is_plain(module, type(module)):
        return False
    return all(is_flat(child) or _is_torchs_own(child) for child in module)


def _is_torchs_own(module: nn.Module) -> bool:
    return not module._modules and type(module).__module__.startswith("torch.nn.")

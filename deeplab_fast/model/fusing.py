"""Which calls in the graph of somebody else's module are this project's layers, and the forward with these in place.

What is looked for is structure: types of torch's own layers and who reads whose result, never a name. Convolutions and
norms stay children and are called through `layers`, which reads them at each call. A result that is no longer there was
read by the call alone that is put in place. What is computed later than it was passes calls alone that write nothing.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .fused import concat, convolve, norm_act, resize_concat
from .layers import conv_norm_act, conv_norm_act_depthwise, is_plain_depthwise, is_plain_pointwise, is_unhooked
from .layers import separable_norm_act as separable
from .reading import Path, Reading, add_in_place, attribute, class_of, read

ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
ACTIVATION_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
TENSORS = (nn.Parameter, Tensor, type(None))
RESIZES = (nn.Upsample, nn.UpsamplingBilinear2d)
WRITE_NOTHING = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, *RESIZES)
# Methods that torch's layers call, which an attribute of a module's own would hide.
SHADOWABLE = ("_conv_forward", "_check_input_dim", "_call_impl")
OURS = (convolve, norm_act, conv_norm_act, conv_norm_act_depthwise, separable, resize_concat, concat)


class Plan(NamedTuple):
    """A forward that computes what a module's own does while `holds`."""

    forward: Callable[..., Any]
    found: Counter[str]
    reading: Reading
    plain: dict[Path, type[nn.Module]]  # what the forward counts on; norms each once
    options: dict[Path, dict[str, Any]]

    def holds(self, module: nn.Module) -> bool:
        _, function, names, attributes, children, _ = self.reading
        if class_of(module).forward is not function or not is_untouched(module):
            return False
        if any(space.get(name) is not was for space, name, was in names):
            return False
        if any(not _equal(attribute(module, name), value) for name, value in attributes.items()):
            return False
        for path, keys in children.items():
            container = descend(module, path)
            if container is None or tuple(container._modules) != keys:
                return False
        for path, options in self.options.items():
            part = descend(module, path)
            if part is None or _options(part) != options:
                return False
        parts = [descend(module, path) for path in self.plain]
        if any(part is None or not is_untouched(part) for part in parts):
            return False
        norms = [part for part in parts if type(part) is nn.BatchNorm2d]
        same = all(class_of(part) is kind for part, kind in zip(parts, self.plain.values(), strict=True))
        return same and len(set(map(id, norms))) == len(norms)

    @property
    def starred(self) -> bool:
        """Whether the forward takes any number of arguments."""
        return bool(self.reading.function.__code__.co_flags & inspect.CO_VARARGS)

    def inlined(self, module: nn.Module) -> Iterator[nn.Module]:
        """Sequences whose layers the forward calls in their place."""
        return (descend(module, path) for path in self.reading.sequences)


def plan(module: nn.Module, *, training: bool) -> Plan | None:
    """None where nothing in the module's forward is replaced."""
    reading = read(module, training=training)
    if reading is None:
        return None
    rewriting = Rewriting(module, reading.graph)
    if not rewriting.found:
        return None
    paths = {*reading.children, *(tuple(name.split(".")) for name in rewriting.plain)} - {()}
    parts = {path: descend(module, path) for path in sorted(paths)}
    plain = {path: class_of(part) for path, part in parts.items()}
    options = {path: _options(part) for path, part in parts.items() if _options(part)}
    found = Plan(rewriting.forward(), rewriting.found, reading._replace(graph=None), plain, options)
    return found if found.holds(module) else None


def descend(module: nn.Module, path: Path) -> nn.Module | None:
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def _equal(now: Any, before: Any) -> bool:
    return now is before or (type(now) is type(before) and now == before)


def _options(module: nn.Module) -> dict[str, Any]:
    """What the forward holds instead of a module that it no longer calls."""
    names: tuple[str, ...] = ("min_val", "max_val") if type(module) is nn.ReLU6 else ()
    if type(module) in RESIZES:
        names = ("mode", "size", "scale_factor", "align_corners", "recompute_scale_factor")
    return {name: getattr(module, name) for name in names}


def is_untouched(module: nn.Module) -> bool:
    """No hooks, the methods of its type, and parameters of torch's own."""
    own = vars(module)
    for name in SHADOWABLE:
        if name in own:
            return False
    for tensor in own["_parameters"].values():
        if type(tensor) not in TENSORS:
            return False
    return module._compiled_call_impl is None and is_unhooked(module)


class Rewriting:
    """Replaces calls in `graph`, the graph of `module`.

    found: how many of what; plain: names of the modules that must stay as they are for this.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.found: Counter[str] = Counter()
        self.plain: set[str] = set()
        called = [id(module.get_submodule(node.target)) for node in graph.nodes if node.op == "call_module"]
        self.once = {key for key, times in Counter(called).items() if times == 1}
        for node in list(graph.nodes):
            if self._calls(node, nn.Identity):
                self._replace([node], node.args[0])
        for replace in (self._norm, self._convolution, self._concat):
            for node in list(graph.nodes):
                if not node._erased:
                    replace(node)

    def forward(self) -> Callable[..., Any]:
        """The graph as a function of a module like the one that was read and its argument."""
        code = self.graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<deeplab_fast.accelerate>", "exec"), names)
        return names["forward"]

    def _calls(self, node: Any, *types: type) -> nn.Module | None:
        """The module that a node calls, where it is exactly of one of these types and nobody has changed it."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
            return None
        module = self.module.get_submodule(node.target)
        kind = type(module)
        own = kind in types and kind.forward.__module__ == kind.__module__ and is_untouched(module)
        return module if own else None

    def _before(self, node: fx.Node, kind: type) -> fx.Node | None:
        """The call of a `kind` just before, whose result this node alone reads."""
        source = node.args[0] if len(node.args) == 1 else None
        return source if self._calls(source, kind) and source.next is node and len(source.users) == 1 else None

    def _norm(self, node: fx.Node) -> None:
        if not self._calls(node, nn.BatchNorm2d):
            return
        if self._sum(node):
            return
        last, activation = self._activation(node)
        chain = [node] if last is node else [node, last]
        if (conv := self._before(node, nn.Conv2d)) is None:
            self._emit("batch norm" + _named(activation), norm_act, (node.args[0], node, activation), chain)
            return
        convolution, chain = self._calls(conv, nn.Conv2d), [conv, *chain]
        inner = self._before(conv, nn.Conv2d)
        if inner and self._is_depthwise(inner) and is_plain_pointwise(convolution):
            name = "separable convolution, batch norm" + _named(activation)
            self._emit(name, separable, (inner.args[0], inner, conv, node, activation), [inner, *chain])
        elif after := self._depthwise_after(last, activation):
            depthwise, norm, _ = after
            arguments = (conv.args[0], conv, node, depthwise, norm, activation)
            name = f"batch norm{_named(activation)}, depthwise convolution, batch norm{_named(activation)}"
            self._emit(name, conv_norm_act_depthwise, arguments, [*chain, *after])
        else:
            kind = "depthwise convolution, batch norm" if is_plain_depthwise(convolution) else "batch norm"
            self._emit(kind + _named(activation), conv_norm_act, (conv.args[0], conv, node, activation), chain)

    def _depthwise_after(self, node: fx.Node, activation: str) -> list[fx.Node] | None:
        """Depthwise convolution, norm and the same activation, where just these follow a node that they alone read."""
        depthwise, norm = node.next, node.next.next
        if not self._is_depthwise(depthwise) or self._before(norm, nn.Conv2d) is not depthwise:
            return None
        if depthwise.args != (node,) or len(node.users) != 1 or not self._calls(norm, nn.BatchNorm2d):
            return None
        last, then = self._activation(norm)
        return [depthwise, norm, last] if then == activation != "none" else None

    def _is_depthwise(self, node: fx.Node) -> bool:
        convolution = self._calls(node, nn.Conv2d)
        return convolution is not None and is_plain_depthwise(convolution)

    def _activation(self, node: fx.Node) -> tuple[fx.Node, str]:
        """The activation that directly follows a node and is all that reads it, or the node itself and "none"."""
        after = node.next
        if list(node.users) == [after] and node in after.args[:1]:
            module = self._calls(after, *ACTIVATION_MODULES)
            if module and _options(module) in ({}, {"min_val": 0, "max_val": 6}):
                return after, ACTIVATION_MODULES[type(module)]
            known = after.op == "call_function" and after.target in ACTIVATION_FUNCTIONS
            if known and len(after.args) == 1 and not after.kwargs.keys() - {"inplace"}:
                return after, ACTIVATION_FUNCTIONS[after.target]
        return node, "none"

    def _sum(self, node: fx.Node) -> bool:
        """Norm, sum and activation, where the sum alone reads the norm's result."""
        total = next(iter(node.users)) if len(node.users) == 1 else None
        known = total is not None and total.target in (operator.add, add_in_place, torch.add)
        if not known or total.kwargs or len(total.args) != 2 or not self._may_wait(node, total):
            return False
        first, second = total.args
        # A sum in place into the other, or with itself.
        if first is second or not isinstance(second, fx.Node) or (node is second and total.target is add_in_place):
            return False
        residual, (last, activation) = second if node is first else first, self._activation(total)
        arguments = (node.args[0], node, activation, residual, total.target is add_in_place)
        chain = [node, total] if last is total else [node, total, last]
        self._emit("batch norm, sum" + _named(activation), norm_act, arguments, chain)
        return True

    def _may_wait(self, node: fx.Node, until: fx.Node) -> bool:
        """Whether the call may be made there: nothing on the way writes into its input, nor calls the same module."""
        if node.op == "call_module" and id(self.module.get_submodule(node.target)) not in self.once:
            return False
        passed, after = set(), node.next
        while after is not until:
            if self._calls(after, *WRITE_NOTHING):
                passed.add(after.target)
            elif after.op != "get_attr" and after.target not in (getattr, operator.getitem, *OURS):
                return False
            after = after.next
        self.plain |= passed
        return True

    def _convolution(self, node: fx.Node) -> None:
        if self._is_depthwise(node):
            self._emit("depthwise convolution", convolve, (node.args[0], node), [node])

    def _concat(self, node: fx.Node) -> None:
        if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
            return
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        parts = given.get("tensors")
        if given.keys() != {"tensors", "dim"} or given["dim"] != 1 or not isinstance(parts, (list, tuple)):
            return
        if not all(isinstance(part, fx.Node) for part in parts):
            return
        resized = parts[0]
        alone = len(parts) == 2 and parts[1] is not resized and len(resized.users) == 1
        options = self._resize(resized) if alone else None
        if options and self._may_wait(resized, node):
            size, scale, align_corners = options
            arguments = (resized.args[0], parts[1], size, scale, align_corners)
            self._emit("upsampling, concatenation", resize_concat, arguments, [resized, node])
        else:
            self._emit("concatenation", concat, (list(parts),), [node])

    def _resize(self, node: fx.Node) -> tuple[Any, Any, Any] | None:
        """size, scale and align_corners where a node resizes bilinearly."""
        if module := self._calls(node, *RESIZES):
            options = _options(module)
        elif node.op == "call_function" and node.target is F.interpolate and len(node.args) == 1:
            options = dict(node.kwargs)
        else:
            return None
        found = options.pop("size", None), options.pop("scale_factor", None), options.pop("align_corners", None)
        plain = options.pop("mode", None) == "bilinear" and not any(options.values())
        return found if plain and found[:2].count(None) == 1 and all(map(_can_be_written, found)) else None

    def _emit(self, name: str, function: Callable, arguments: tuple, chain: list[fx.Node]) -> None:
        """One call in the place of a chain's last; nodes of the chain among its arguments stand for their modules."""
        with self.graph.inserting_before(chain[-1]):
            given = [
                self.graph.create_node("get_attr", a.target) if isinstance(a, fx.Node) and a in chain else a
                for a in arguments
            ]
            self._replace(chain, self.graph.call_function(function, tuple(given)))
        self.found[name] += 1

    def _replace(self, chain: list[fx.Node], result: fx.Node) -> None:
        chain[-1].replace_all_uses_with(result)
        for node in reversed(chain):
            self.graph.erase_node(node)
            if node.op == "call_module":
                self.plain.add(node.target)


def _can_be_written(option: Any) -> bool:
    """Stands in the forward's code as it prints."""
    if type(option) is tuple:
        return all(map(_can_be_written, option))
    return option is None or isinstance(option, fx.Node) or type(option) in (bool, int, float)


def _named(activation: str) -> str:
    return "" if activation == "none" else ", ReLU" + activation.removeprefix("relu")

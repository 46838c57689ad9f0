"""Which calls in the graph of somebody else's module are this project's layers, and the forward with these in place.

What is looked for is structure: types of torch's own layers and who reads whose result, never a name. Convolutions and
norms stay children and are called through `layers`, which reads them at each call.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import ops
from .layers import ACTIVATIONS, conv_norm_act, convolve, is_plain, is_plain_depthwise, is_plain_pointwise, norm_act
from .layers import separable_norm_act as separable
from .tracing import class_of, is_flat, trace

ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
ACTIVATION_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6"}
CALLED = (nn.Conv2d, nn.BatchNorm2d)  # by `layers`, where these are not plain when it reads them
SUMS = (operator.add, operator.iadd, torch.add)
CONCATS = (torch.cat, torch.concat)


def residual_norm_act(x: Tensor, norm: nn.Module, activation: str, residual: Tensor) -> Tensor:
    """activation(norm(x) + residual), where residual may also be one that broadcasts."""
    if isinstance(residual, Tensor) and residual.shape == x.shape:
        return norm_act(x, norm, activation, residual)
    return ACTIVATIONS[activation](norm(x) + residual)


def resize_concat(x: Tensor, low_level: Tensor, size: Any, scale: Any, align_corners: bool | None) -> Tensor:
    """torch.cat((x resized, low_level), 1), x by `F.interpolate`'s bilinear mode with size or scale."""
    wanted = tuple(low_level.shape[2:])
    if scale is not None:
        scales = scale if isinstance(scale, tuple) else (scale,) * 2
        given = tuple(s * n for s, n in zip(scales, x.shape[2:], strict=True))
    else:
        given = tuple(size) if isinstance(size, (tuple, list)) else (size,) * 2
    if given == wanted and x.shape[0] == low_level.shape[0] and ops.has_kernel("upsample_concat", x):
        return ops.upsample_concat(x, low_level, align_corners=bool(align_corners))
    return torch.cat((F.interpolate(x, size, scale, "bilinear", align_corners), low_level), 1)


def concat(parts: list[Tensor]) -> Tensor:
    """torch.cat(parts, 1), in channels-last where one of them is: torch turns a mixture of layouts into NCHW."""
    last = torch.channels_last
    if any(x.dim() == 4 and x.is_contiguous(memory_format=last) and not x.is_contiguous() for x in parts):
        parts = [x.contiguous(memory_format=last) for x in parts]
    return torch.cat(parts, 1)


class Plan(NamedTuple):
    """A forward that computes what a module's own does while `holds`."""

    forward: Callable[[nn.Module, Any], Any]
    found: Counter[str]
    containers: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]  # by path, what the trace may have read of them
    silent: tuple[tuple[tuple[str, ...], type], ...]  # by path, what is no longer called as a module

    def holds(self, module: nn.Module) -> bool:
        for path, seen in self.containers:
            part = _descend(module, path)
            if part is None or _readable(part) != seen:
                return False
        parts = ((_descend(module, path), kind) for path, kind in self.silent)
        return all(part is not None and class_of(part) is kind and is_plain(part, type(part)) for part, kind in parts)

    def inlined(self, module: nn.Module) -> Iterator[nn.Module]:
        """Sequences whose layers the forward calls in their place."""
        parts = (_descend(module, path) for path, _ in self.silent)
        yield from (part for part in parts if isinstance(part, nn.Sequential))


def plan(module: nn.Module, *, training: bool) -> Plan | None:
    """None where nothing in the module's forward is replaced."""
    graph = trace(module, training=training)
    if graph is None:
        return None
    names = [node.target for node in graph.nodes if node.op in ("call_module", "get_attr")]
    containers = {()} | {path[:i] for name in names for path in [tuple(name.split("."))] for i in range(len(path))}
    rewriting = Rewriting(module, graph)
    if not rewriting.found:
        return None
    inlined = [path for path in containers if path and is_flat(_descend(module, path))]
    silent = {*inlined, *(tuple(name.split(".")) for name in rewriting.bypassed)}
    resizes = {path for path in silent if isinstance(_descend(module, path), nn.Upsample)}
    return Plan(
        rewriting.forward(),
        rewriting.found,
        tuple((path, _readable(_descend(module, path))) for path in sorted(containers | resizes)),
        tuple((path, class_of(_descend(module, path))) for path in sorted(silent)),
    )


def _descend(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _readable(module: nn.Module) -> dict[str, Any]:
    """What a forward may decide by: attributes that are no tensors, and which children there are."""
    found = {k: copy.copy(v) for k, v in vars(module).items() if k not in OF_EVERY_MODULE and _is_constant(v)}
    return found | {"children": [(name, child is None) for name, child in module._modules.items()]}


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


class Rewriting:
    """Replaces calls in `graph`, the graph of `module`.

    found: how many of what; bypassed: names of the modules that are no longer called.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.found: Counter[str] = Counter()
        self.bypassed: set[str] = set()
        for node in list(graph.nodes):
            if self._calls(node, nn.Identity):
                self._replace([node], node.args[0])
        for replace in (self._norm, self._convolution, self._concat):
            for node in list(graph.nodes):
                replace(node)

    def forward(self) -> Callable[[nn.Module, Any], Any]:
        """The graph as a function of a module like the traced one and its argument."""
        code = self.graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<deeplab_fast.accelerate>", "exec"), names)
        return names["forward"]

    def _calls(self, node: Any, *types: type) -> nn.Module | None:
        """The module that a node calls, where it is exactly of one of these types and has no hook."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.module.get_submodule(node.target)
        return module if is_plain(module, *types) else None

    def _norm(self, node: fx.Node) -> None:
        if not self._calls(node, nn.BatchNorm2d):
            return
        source = node.args[0]
        convolution = self._calls(source, nn.Conv2d) if isinstance(source, fx.Node) else None
        alone = convolution is not None and len(source.users) == 1
        total, residual = self._sum(node) if alone else (None, None)
        if total is not None:
            last, activation = self._activation(total)
            chain = [node, total] if last is total else [node, total, last]
            arguments = (source, self._child(node, last), activation, residual)
            self._emit("batch norm, sum" + _named(activation), residual_norm_act, arguments, chain)
            return
        last, activation = self._activation(node)
        chain = [node] if last is node else [node, last]
        norm = self._child(node, last)
        if not alone or source.next is not node:
            self._emit("batch norm" + _named(activation), norm_act, (source, norm, activation), chain)
            return
        inner = source.args[0]
        depthwise = self._calls(inner, nn.Conv2d) if isinstance(inner, fx.Node) else None
        follows = depthwise is not None and len(inner.users) == 1 and inner.next is source
        if follows and is_plain_depthwise(depthwise) and is_plain_pointwise(convolution):
            arguments = (inner.args[0], self._child(inner, last), self._child(source, last), norm, activation)
            name = "separable convolution, batch norm" + _named(activation)
            self._emit(name, separable, arguments, [inner, source, *chain])
            return
        kind = "depthwise convolution, batch norm" if is_plain_depthwise(convolution) else "batch norm"
        arguments = (source.args[0], self._child(source, last), norm, activation)
        self._emit(kind + _named(activation), conv_norm_act, arguments, [source, *chain])

    def _activation(self, node: fx.Node) -> tuple[fx.Node, str]:
        """The activation that directly follows a node and is all that reads it, or the node itself and "none"."""
        after = node.next
        if list(node.users) == [after] and node in after.args[:1]:
            if module := self._calls(after, *ACTIVATION_MODULES):
                return after, ACTIVATION_MODULES[type(module)]
            known = after.op == "call_function" and after.target in ACTIVATION_FUNCTIONS
            if known and len(after.args) == 1 and not after.kwargs.keys() - {"inplace"}:
                return after, ACTIVATION_FUNCTIONS[after.target]
        return node, "none"

    def _sum(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The sum that alone reads a norm's result, and its other summand."""
        (total,) = node.users if len(node.users) == 1 else (None,)
        if total is None or total.op != "call_function" or total.target not in SUMS or total.kwargs:
            return None, None
        first, second = total.args
        if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None, None
        if node is second and total.target is operator.iadd:  # writes into the other
            return None, None
        return total, second if node is first else first

    def _convolution(self, node: fx.Node) -> None:
        if (convolution := self._calls(node, nn.Conv2d)) and is_plain_depthwise(convolution):
            arguments = (node.args[0], self._child(node, node))
            self._emit("depthwise convolution", convolve, arguments, [node])

    def _concat(self, node: fx.Node) -> None:
        if node.op != "call_function" or node.target not in CONCATS:
            return
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        parts = given.get("tensors")
        if given.keys() != {"tensors", "dim"} or given["dim"] != 1 or not isinstance(parts, (list, tuple)):
            return
        if not all(isinstance(part, fx.Node) for part in parts):
            return
        resized = parts[0]
        # Read once, so that nothing can have written into it until the concatenation.
        once = len(parts) == 2 and all(len(n.users) == 1 for n in (resized, *resized.all_input_nodes[:1]))
        if once and (options := self._resize(resized)):
            size, scale, align_corners = options
            arguments = (resized.args[0], parts[1], size, scale, align_corners)
            self._emit("upsampling, concatenation", resize_concat, arguments, [resized, node])
        else:
            self._emit("concatenation", concat, (list(parts),), [node])

    def _resize(self, node: fx.Node) -> tuple[Any, Any, Any] | None:
        """size, scale and align_corners where a node resizes bilinearly."""
        if module := self._calls(node, nn.Upsample, nn.UpsamplingBilinear2d):
            if module.mode == "bilinear" and not module.recompute_scale_factor:
                return module.size, module.scale_factor, module.align_corners
            return None
        if node.op != "call_function" or node.target is not F.interpolate or len(node.args) != 1:
            return None
        options = dict(node.kwargs)  # all of them, as torch passes them on
        found = options.pop("size", None), options.pop("scale_factor", None), options.pop("align_corners", None)
        plain = options.pop("mode", None) == "bilinear" and not any(options.values())
        return found if plain else None

    def _child(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The module that a node calls, as an argument of what is put in place of `before`."""
        with self.graph.inserting_before(before):
            return self.graph.create_node("get_attr", node.target)

    def _emit(self, name: str, function: Callable, arguments: tuple, chain: list[fx.Node]) -> None:
        with self.graph.inserting_before(chain[-1]):
            self._replace(chain, self.graph.call_function(function, arguments))
        self.found[name] += 1

    def _replace(self, chain: list[fx.Node], result: fx.Node) -> None:
        chain[-1].replace_all_uses_with(result)
        for node in reversed(chain):
            self.graph.erase_node(node)
            if node.op == "call_module" and not self._calls(node, *CALLED):
                self.bypassed.add(node.target)


def _named(activation: str) -> str:
    return "" if activation == "none" else ", ReLU" + activation.removeprefix("relu")

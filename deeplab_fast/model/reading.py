"""Somebody else's forward as a graph of what it calls, read from its source and never run.

Read is a small part of Python (`Reader`); a forward that holds anything else is refused as a whole. What is read is
done again in the same order with the same objects, so that a graph nobody has changed does what the forward does,
whatever its values are.
"""

from __future__ import annotations

import ast
import inspect
import keyword
import operator
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .layers import is_unhooked
from .source import Refused, parse

Path = tuple[str, ...]  # names of children, from the module whose forward it is
MISSING = object()
CONTAINERS = (nn.Sequential, nn.ModuleList)
FUNCTIONS = (
    *(F.relu, F.relu6, torch.relu, F.interpolate, torch.cat, torch.concat, torch.add, torch.flatten),
    *(F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.dropout),
)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
COMPARISONS = {
    **{ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Eq: operator.eq, ast.NotEq: operator.ne},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
}


def add_in_place(x: Any, y: Any) -> Any:
    """What `x += y` makes of x."""
    x += y
    return x


class Child(NamedTuple):
    """A module that an expression names."""

    path: Path
    module: nn.Module


class Reading(NamedTuple):
    """A forward's graph, and what it is true for: see `Plan.holds`."""

    graph: fx.Graph | None  # None once a function is made of it
    function: FunctionType
    names: list[tuple[dict[str, Any], str, Any]]  # a namespace, a name, what it named
    attributes: dict[str, Any]  # of the module itself: constants, or whether a child is there
    children: dict[Path, tuple[str, ...]]  # of the containers that the forward loops over
    sequences: list[Path]  # whose layers the graph calls in their place


def read(module: nn.Module, *, training: bool) -> Reading | None:
    """What module(x) does in that mode, or None where it is not understood."""
    if not _is_ordinary(class_of(module)):
        return None
    try:
        return Reader(module, training).reading
    except (Refused, OSError, SyntaxError, TypeError, ValueError):  # the last four: no source, or none of this code
        return None


def class_of(module: nn.Module) -> type[nn.Module]:
    """What a module was before it was accelerated."""
    return getattr(type(module), "_deeplab_fast_class", type(module))


def attribute(module: nn.Module, name: str) -> Any:
    """A constant, or a child as True; MISSING for anything else."""
    value = vars(module).get(name, MISSING)
    if value is MISSING:
        child = module._modules.get(name, MISSING)
        return child if child in (None, MISSING) else True if isinstance(child, nn.Module) else MISSING
    return value if value is None or type(value) in (bool, int, str) else MISSING


def is_sequence(module: nn.Module) -> bool:
    """A plain sequence of layers without children, or of such sequences."""
    kind = class_of(module)
    if kind.forward is not nn.Sequential.forward or not _is_ordinary(kind) or not _is_container(kind):
        return False
    if not is_unhooked(module):
        return False
    layers = module._modules.values()
    return all(layer is not None and (not layer._modules or is_sequence(layer)) for layer in layers)


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Calls and attributes are those of nn.Module."""
    names = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
    same = all(getattr(kind, name) is getattr(nn.Module, name) for name in names)
    return same and kind.__getattribute__ is object.__getattribute__


def _is_container(kind: type[nn.Module]) -> bool:
    return any(issubclass(kind, container) and kind.__iter__ is container.__iter__ for container in CONTAINERS)


class Reader:
    """Goes through the statements of a forward once, loops unrolled, and puts down in a graph what is called.

    Values are nodes (anything known only when it runs), constants, lists and tuples made in the forward, children,
    and names of the forward's globals.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        function = inspect.getattr_static(class_of(module), "forward")
        if type(function) is not FunctionType:
            raise Refused
        definition, argument = parse(function)
        self.module, self.training, self.globals = module, training, function.__globals__
        self.own = function.__code__.co_varnames[0]
        if argument.lstrip("*") == "self":
            raise Refused
        self.locals = {*function.__code__.co_varnames, *function.__code__.co_cellvars}
        self.reading = Reading(fx.Graph(), function, [], {}, {}, [])
        self.graph = self.reading.graph
        self.values = {self.own: Child((), module), argument.lstrip("*"): self.graph.placeholder(argument)}
        self.result: Any = None
        self.run(definition.body)
        flat = isinstance(self.result, (list, tuple)) and all(isinstance(part, fx.Node) for part in self.result)
        if not flat and not isinstance(self.result, fx.Node):
            raise Refused
        self.graph.output(type(self.result)(self.result) if flat else self.result)

    def run(self, statements: Iterable[ast.stmt]) -> bool:
        """Whether they returned."""
        return any(self.statement(statement) for statement in statements)

    def statement(self, s: ast.stmt) -> bool:
        match s:
            case ast.Return():
                self.result = None if s.value is None else self.value(s.value)
                return True
            case ast.If():
                return self.run(s.body if self.truth(s.test) else s.orelse)
            case ast.For(target=ast.Name(id=name), orelse=[]):
                for child in self.loop(s.iter):
                    self.assign(name, child)
                    if self.run(s.body):
                        return True
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                self.assign(name, self.value(s.value))
            case ast.AugAssign(target=ast.Name(id=name), op=ast.Add()):
                x, y = self.value(ast.Name(name)), self.value(s.value)
                if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
                    raise Refused
                self.assign(name, self.graph.call_function(add_in_place, (x, y)))
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name() as name, attr="append"), args=[item])):
                values = self.value(name)
                if type(values) is not list or s.value.keywords:
                    raise Refused
                values.append(self.argument(item))
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case _:
                raise Refused
        return False

    def assign(self, name: str, value: Any) -> None:
        if name == self.own:
            raise Refused
        self.values[name] = value

    def loop(self, e: ast.expr) -> list[Child]:
        container = self.value(e)
        if not isinstance(container, Child) or not _is_container(class_of(container.module)):
            raise Refused
        return self.layers(container)

    def layers(self, container: Child) -> list[Child]:
        children = container.module._modules
        if not _is_ordinary(class_of(container.module)) or None in children.values():
            raise Refused
        self.reading.children[container.path] = tuple(children)
        return [Child((*container.path, name), child) for name, child in children.items()]

    def truth(self, e: ast.expr) -> bool:
        value = self.value(e)
        if value is not None and type(value) not in (bool, int, str):
            raise Refused
        return bool(value)

    def argument(self, e: ast.expr) -> Any:
        """What may be handed on: a node, or what holds nothing but nodes and constants."""
        value = self.value(e)
        if isinstance(value, Child) or not _is_argument(value):
            raise Refused
        return value

    def value(self, e: ast.expr) -> Any:
        match e:
            case ast.Constant(value=value) if value is None or type(value) in (bool, int, float, str):
                return value
            case ast.Name(id=name) if name in self.values:
                return self.values[name]
            case ast.Name(id=name) if name not in self.locals:
                return self.named(self.globals, name)
            case ast.Attribute():
                return self.attribute(self.value(e.value), e.attr)
            case ast.Call():
                return self.call(e)
            case ast.List():
                return [self.argument(item) for item in e.elts]
            case ast.Tuple():
                return tuple(self.argument(item) for item in e.elts)
            case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), ifs=[], is_async=0) as one]):
                return self.comprehension(name, one.iter, e.elt)
            case ast.Subscript():
                return self.subscript(self.value(e.value), self.argument(e.slice))
            case ast.Slice():
                return slice(*(part and self.argument(part) for part in (e.lower, e.upper, e.step)))
            case ast.UnaryOp(op=ast.Not()):
                return not self.truth(e.operand)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (int, float):
                return -value
            case ast.BoolOp(op=op, values=[*first, last]):
                decided = next((part for part in first if self.truth(part) is isinstance(op, ast.Or)), last)
                return self.value(decided)
            case ast.IfExp():
                return self.value(e.body if self.truth(e.test) else e.orelse)
            case ast.Compare(ops=[op], comparators=[other]) if type(op) in COMPARISONS:
                return self.compare(op, self.value(e.left), self.value(other))
            case ast.BinOp() if type(e.op) in OPERATORS:
                x, y = self.argument(e.left), self.argument(e.right)
                if not isinstance(x, fx.Node) and not isinstance(y, fx.Node):
                    raise Refused
                return self.graph.call_function(OPERATORS[type(e.op)], (x, y))
        raise Refused

    def named(self, names: dict[str, Any], name: str) -> Any:
        """A module of Python's, or one of FUNCTIONS."""
        value = names.get(name, MISSING)
        if not isinstance(value, ModuleType) and not any(value is function for function in FUNCTIONS):
            raise Refused
        self.reading.names.append((names, name, value))
        return value

    def attribute(self, of: Any, name: str) -> Any:
        if isinstance(of, ModuleType):
            return self.named(vars(of), name)
        if isinstance(of, fx.Node) and name == "shape":
            return self.graph.call_function(getattr, (of, name))
        if not isinstance(of, Child) or hasattr(class_of(of.module), name) or not _is_ordinary(class_of(of.module)):
            raise Refused
        if name.startswith("__"):  # which a class makes another name of
            raise Refused
        if name == "training" and not of.path:
            return self.training
        value = attribute(of.module, name)
        if value is True and name not in vars(of.module):
            return Child((*of.path, name), of.module._modules[name])
        if value is MISSING or of.path:
            raise Refused
        self.reading.attributes[name] = value
        return value

    def compare(self, op: ast.cmpop, x: Any, y: Any) -> bool:
        if isinstance(x, Child) and y is None and isinstance(op, (ast.Is, ast.IsNot)):
            if len(x.path) != 1:
                raise Refused
            self.reading.attributes[x.path[0]] = True
            return isinstance(op, ast.IsNot)
        if any(v is not None and type(v) not in (bool, int, str) for v in (x, y)):
            raise Refused
        return COMPARISONS[type(op)](x, y)

    def subscript(self, of: Any, index: Any) -> Any:
        if isinstance(of, fx.Node):
            return self.graph.call_function(operator.getitem, (of, index))
        if isinstance(of, (list, tuple)) and type(index) is int and -len(of) <= index < len(of):
            return of[index]
        raise Refused

    def comprehension(self, name: str, over: ast.expr, element: ast.expr) -> list[Any]:
        before, results = dict(self.values), []
        for child in self.loop(over):
            self.assign(name, child)
            results.append(self.argument(element))
        self.values = before
        return results

    def call(self, e: ast.Call) -> Any:
        if any(isinstance(a, ast.Starred) for a in e.args) or any(k.arg is None for k in e.keywords):
            raise Refused
        if isinstance(e.func, ast.Attribute) and e.func.attr == "size":
            of = self.value(e.func.value)
            if isinstance(of, fx.Node) and not e.keywords:
                return self.graph.call_method("size", (of, *map(self.argument, e.args)))
            raise Refused
        function = self.value(e.func)
        arguments = tuple(map(self.argument, e.args))
        if isinstance(function, Child):
            if e.keywords or not all(isinstance(a, fx.Node) for a in arguments):
                raise Refused
            return self.called(function, arguments)
        if not any(function is known for known in FUNCTIONS):
            raise Refused
        return self.graph.call_function(function, arguments, {k.arg: self.argument(k.value) for k in e.keywords})

    def called(self, child: Child, arguments: tuple[fx.Node, ...]) -> fx.Node:
        if not child.path or any(map(keyword.iskeyword, child.path)):  # itself, or no name that code can hold
            raise Refused
        if len(arguments) != 1 or not is_sequence(child.module):
            return self.graph.create_node("call_module", ".".join(child.path), arguments)
        self.reading.sequences.append(child.path)
        (x,) = arguments
        for layer in self.layers(child):
            x = self.called(layer, (x,))
        return x


def _is_argument(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, fx.Node) or _is_constant(part) for part in value)
    return isinstance(value, fx.Node) or _is_constant(value)


def _is_constant(value: Any) -> bool:
    if isinstance(value, slice):
        return all(map(_is_constant, (value.start, value.stop, value.step)))
    return value is None or type(value) in (bool, int, float, str)

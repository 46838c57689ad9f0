"""Which backend runs an op: the op's own table, a name given by the caller, or DEEPLAB_FAST_BACKEND.

A table maps a backend's name to a `Backend`, best first. `auto` takes the first one without an objection, of
those measured on the device if there are any; a backend that is named runs or raises its reason.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from . import gpu, native
from .precision import autocast_dtype

LIBRARY = torch.library.Library("deeplab_fast", "FRAGMENT")
VARIABLE = "DEEPLAB_FAST_BACKEND"


class Backend(NamedTuple):
    """One way to compute an op. `run` and `why_not` take the op's arguments without `backend`."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    measured: tuple[str, ...]  # device types on which its place in the table was measured


def always(*_: Any) -> str | None:
    """The why-not of a backend that takes everything: the reference's."""
    return None


class Op(NamedTuple):
    call: Callable[..., Any]  # torch.ops.deeplab_fast.<name>
    backends: Mapping[str, Backend]
    example: Callable[[torch.device], tuple[Any, ...]]  # small arguments, for tables of what runs where


OPS: dict[str, Op] = {}
_override: str | None = None  # by `requesting`
_last: dict[str, str] = {}


def register(
    name: str,
    schema: str,
    backends: Mapping[str, Backend],
    fake: Callable[..., Any],
    example: Callable[[torch.device], tuple[Any, ...]],
) -> torch._ops.OpOverload:
    """Defines `torch.ops.deeplab_fast.<name>` for CPU and CUDA; `schema` ends in `str backend`.

    The backend is chosen inside the op, at run time, so that a compiled or exported graph names none.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        *inputs, backend = args
        chosen = choose(name, inputs, backend)
        _last[name] = chosen
        return backends[chosen].run(*inputs)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"deeplab_fast::{name}", fake, lib=LIBRARY)
    call = getattr(torch.ops.deeplab_fast, name).default
    OPS[name] = Op(call, backends, example)
    return call


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]) -> None:
    """The gradient of an op, as in `torch.library.register_autograd`; `backward` calls the op's `_backward`."""
    torch.library.register_autograd(f"deeplab_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def forbid_gradient(name: str, reason: str) -> None:
    """Make a gradient of this op raise: torch would lose it silently. For ops `_backward`, and for inference's."""

    def raise_reason(*_: Any) -> Any:
        raise RuntimeError(f"deeplab_fast.{name} {reason}")

    torch.library.register_autograd(f"deeplab_fast::{name}", raise_reason, lib=LIBRARY)


def run(name: str, *inputs: Any, backend: str = "auto") -> Any:
    """What public functions call once they have checked their arguments.

    Where an eager call goes to the reference, torch records its steps and differentiates them: the op's own gradient
    would have to compute them again. A compiled graph holds the op, unless the device has no kernel for it at all: then
    the compiler sees the reference's steps. So does an exported one where the reference was asked for.
    """
    if torch.compiler.is_exporting():
        if backend == "auto" and requested().get(name) == "reference":
            return OPS[name].backends["reference"].run(*inputs)
    elif torch.compiler.is_compiling():
        tensor = next(x for x in inputs if isinstance(x, Tensor))
        if backend == "auto" and not _has_kernel(name, str(tensor.device), torch.float32):
            return OPS[name].backends["reference"].run(*inputs)
    elif choose(name, list(inputs), backend) == "reference":
        _last[name] = "reference"
        return OPS[name].backends["reference"].run(*inputs)
    return OPS[name].call(*inputs, backend)


def choose(name: str, inputs: list[Any], backend: str = "auto") -> str:
    """The name of the backend that is to run. Raises UserError where a named one cannot."""
    table = OPS[name].backends
    if backend == "auto":
        backend = requested().get(name, "auto")
    if backend != "auto":
        if backend not in table:
            raise UserError(f"{name} has no backend {backend!r}; it has {', '.join(table)}")
        if reason := table[backend].why_not(*inputs):
            raise UserError(f"{name} cannot run on the backend {backend!r}: {reason}")
        return backend
    willing = [key for key, entry in table.items() if entry.why_not(*inputs) is None]
    if not willing:
        reasons = "; ".join(f"{key}: {why}" for key, why in explain(name, *inputs).items())
        raise UserError(f"{name} has no backend for these inputs ({reasons})")
    device = next(x.device.type for x in inputs if isinstance(x, torch.Tensor))
    measured = [key for key in willing if device in table[key].measured]
    return (measured or willing)[0]


def has_kernel(name: str, x: Tensor) -> bool:
    """Whether `auto` would run more than the reference on activations like x, for layers that else take torch's own.

    By device and dtype alone: a shape that the kernel declines goes to the op's reference. Layers whose dtype no kernel
    takes are torch's own, whatever DEEPLAB_FAST_BACKEND names.
    """
    dtype = autocast_dtype(x.device, x.dtype)
    taken = gpu.FLOAT_DTYPES if x.device.type == "cuda" else native.FLOAT_DTYPES
    return dtype in taken and _has_kernel(name, str(x.device), dtype)


def _has_kernel(name: str, device: str, dtype: torch.dtype) -> bool:
    return _leaves_reference(name, device, dtype)


# What torch.compiler.assume_constant_result does; calling that would import torch._dynamo, and triton with it.
_has_kernel._dynamo_marked_constant = True


@functools.cache
def _leaves_reference(name: str, device: str, dtype: torch.dtype) -> bool:
    def cast(value: Any) -> Any:
        """What is per channel stays fp32."""
        if isinstance(value, (list, tuple)):
            return [cast(item) for item in value]
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype if value.dim() > 1 else torch.float32) if floating else value

    return choose(name, [cast(value) for value in OPS[name].example(torch.device(device))]) != "reference"


def explain(name: str, *inputs: Any) -> dict[str, str | None]:
    """For each backend of an op: None where it would run on these inputs, else the reason why not."""
    return {key: entry.why_not(*inputs) for key, entry in OPS[name].backends.items()}


def last_backend(name: str) -> str | None:
    """The backend that ran last in this process: how tests show which path was taken."""
    return _last.get(name)


@functools.cache
def requested() -> dict[str, str]:
    """DEEPLAB_FAST_BACKEND as {op: backend}; read once, at the first op that runs."""
    return parse_request(os.environ.get(VARIABLE, "") if _override is None else _override)


@contextlib.contextmanager
def requesting(text: str) -> Iterator[None]:
    """What DEEPLAB_FAST_BACKEND would say, for the scope and all threads: so that one process compares backends."""
    global _override
    previous, _override = _override, text
    _forget()
    try:
        yield
    finally:
        _override = previous
        _forget()


def _forget() -> None:
    requested.cache_clear()
    _leaves_reference.cache_clear()


def parse_request(text: str) -> dict[str, str]:
    """`op=backend,op=backend`, or one bare backend for every op that has it."""
    if not text:
        return {}
    if "=" not in text:
        having = {name: text for name, op in OPS.items() if text in op.backends}
        if not having and text != "auto":
            known = sorted({key for op in OPS.values() for key in op.backends})
            raise UserError(f"{VARIABLE} is {text!r}; expected one of {', '.join(known)}, or op=backend,...")
        return having
    request = {}
    for item in text.split(","):
        name, _, backend = item.strip().partition("=")
        if name not in OPS:
            raise UserError(f"{VARIABLE} names the op {name!r}; expected one of {', '.join(sorted(OPS))}")
        if backend != "auto" and backend not in OPS[name].backends:
            raise UserError(
                f"{VARIABLE} asks for {name}={backend}; {name} has {', '.join(OPS[name].backends)} and auto"
            )
        request[name] = backend
    return request

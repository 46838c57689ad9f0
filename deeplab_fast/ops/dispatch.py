"""Which backend runs an op: the op's own table, a name given by the caller, or DEEPLAB_FAST_BACKEND.

A table maps a backend's name to a `Backend`, best first. `auto` takes the first one without an objection, of
those measured on the device if there are any; a backend that is named runs or raises its reason.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import UserError

LIBRARY = torch.library.Library("deeplab_fast", "FRAGMENT")
VARIABLE = "DEEPLAB_FAST_BACKEND"


class Backend(NamedTuple):
    """One way to compute an op. `run` and `why_not` take the op's arguments without `backend`."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    measured: tuple[str, ...]  # device types on which its place in the table was measured


class Op(NamedTuple):
    backends: Mapping[str, Backend]
    example: Callable[[torch.device], tuple[Any, ...]]  # small arguments, for tables of what runs where


OPS: dict[str, Op] = {}
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
    OPS[name] = Op(backends, example)
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        *inputs, backend = args
        chosen = choose(name, inputs, backend)
        _last[name] = chosen
        return backends[chosen].run(*inputs)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"deeplab_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.deeplab_fast, name).default


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


def explain(name: str, *inputs: Any) -> dict[str, str | None]:
    """For each backend of an op: None where it would run on these inputs, else the reason why not."""
    return {key: entry.why_not(*inputs) for key, entry in OPS[name].backends.items()}


def last_backend(name: str) -> str | None:
    """The backend that ran last in this process: how tests show which path was taken."""
    return _last.get(name)


@functools.cache
def requested() -> dict[str, str]:
    """DEEPLAB_FAST_BACKEND as {op: backend}; read once, at the first op that runs."""
    return parse_request(os.environ.get(VARIABLE, ""))


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

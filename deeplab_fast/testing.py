"""What tests and benchmarks share: which backends run here, how close is close, and the comparison itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ops import dispatch

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

SKIPPED_BACKEND = "backend case"  # how the reason of such a skip starts; the summary of a test run counts them

# (rtol, atol) against the reference in fp32 or fp64. A change here is a change of its own, with a reason.
TOLERANCES = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (2e-2, 1e-2),
}


def device_why_not(kind: str) -> str | None:
    """None where torch can use a device of this type ("cpu" or "cuda"), else the reason."""
    if kind == "cpu" or torch.cuda.is_available():
        return None
    return "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"


def backend_why_not(op: str, backend: str, kind: str) -> str | None:
    """None where `backend` runs `op`'s example on a device of this type, else the reason."""
    if reason := device_why_not(kind):
        return reason
    return dispatch.explain(op, *dispatch.OPS[op].example(torch.device(kind)))[backend]


def backends(op: str) -> list[ParameterSet]:
    """`(backend, device)` for `pytest.mark.parametrize`: the op's whole table, skipped with the reason."""
    import pytest

    cases = []
    for kind in ("cpu", "cuda"):
        for backend in dispatch.OPS[op].backends:
            reason = backend_why_not(op, backend, kind)
            skip = [pytest.mark.skip(reason=f"{SKIPPED_BACKEND} {kind}: {reason}")] if reason else []
            cases.append(pytest.param(backend, kind, id=f"{backend}-{kind}", marks=skip))
    return cases


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol); integers are equal."""
    return TOLERANCES.get(dtype, (0.0, 0.0))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance for `actual`'s dtype, whatever `expected` has; integers are equal, NaN is not."""
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    rtol, atol = tolerances(actual.dtype)
    expected = expected.to(actual.device)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)

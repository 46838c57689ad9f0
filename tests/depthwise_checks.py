"""What the tests of the depthwise convolutions' Triton kernels share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from unittest import mock

from tests.ahead_of_time import Compiled


def check_compiled(kernel: Compiled) -> None:
    """No spills; nothing narrower than 16 bytes is loaded, the statistics' parts aside; sums are gathered."""
    assert kernel.stack == 0, f"{kernel.name}: {kernel.stack} bytes of stack at {kernel.registers} registers"
    loads = re.findall(r"ld\.global[.\w:]*", kernel.ptx)
    assert loads and (kernel.name == "_merge" or all(".v4." in load or ".v8." in load for load in loads)), loads
    assert not re.search(r"\b(atom|red)\.", kernel.ptx)


def check_image_index(kernel: Compiled) -> None:
    """The image, the grid's second dimension, is widened before anything is computed with it."""
    (register,) = re.findall(r"mov\.[us]32\s+(%r\d+), %ctaid\.y", kernel.ptx)
    uses = [line for line in kernel.ptx.splitlines() if re.search(rf"{register}\b", line) and "ctaid" not in line]
    assert uses and all(re.search(r"cvt\.[us]64|\.wide\.", line) for line in uses), uses


@contextlib.contextmanager
def several_tiles_and_pieces() -> Iterator[None]:
    """Programs as large inputs have them, whose size would take the interpreter minutes."""
    from deeplab_fast.kernels import common, depthwise_chains

    found, many = common.configuration, {"SPAN": 3, "REGION": 7, "PROGRAMS": 1}
    with (
        mock.patch.object(depthwise_chains, "LARGER", 1),
        mock.patch.object(common, "configuration", lambda *a: {k: many.get(k, v) for k, v in found(*a).items()}),
    ):
        yield

"""Batch norm in training with residual and activation, forward and backward, against torch's separate ops."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import BATCH_NORMS
from deeplab_fast.ops import batch_norm_act, batch_norm_statistics, dispatch
from deeplab_fast.testing import assert_close

OP = "batch_norm_act"
CASES = [(name, dtype) for name, (_, _, _, dtypes) in BATCH_NORMS.items() for dtype in dtypes]


@functools.cache
def case(name: str, dtype: str, layout: torch.memory_format, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias and perhaps a residual, all asking for a gradient; and the gradient of y."""
    shape, _, with_residual, _ = BATCH_NORMS[name]
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)).contiguous(memory_format=layout)
        for _ in range(3)
    )
    weight, bias = (torch.rand(shape[1], generator=generator).to(device) + 0.5 for _ in range(2))
    inputs = [x, weight, bias, *([residual] if with_residual else [])]
    return [t.requires_grad_() for t in inputs], grad


def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    z = F.batch_norm(x, None, None, weight, bias, training=True)
    z = z if residual is None else z + residual
    return F.relu(z) if activation == "relu" else F.relu6(z)


@functools.cache
def expected(name: str, dtype: str, device: torch.device) -> list[Tensor]:
    """One image's worth of y and the gradients, in fp64 over the whole batch."""
    inputs, grad = case(name, dtype, torch.channels_last, device)
    x, weight, bias, *residual = wide = [t.detach().double().requires_grad_() for t in inputs]
    y = composed(x, weight, bias, residual[0] if residual else None, BATCH_NORMS[name][1])
    grads = torch.autograd.grad(y, wide, grad.double())
    return [y.detach()[:1].clone(), *(g[:1].clone() if g.dim() == 4 else g for g in grads)]


@pytest.mark.parametrize("variant", ["native", "triton", "reference", "eager", "eager_nchw", "compile"])
@pytest.mark.parametrize("name, dtype", CASES)
def bench_batch_norm_act(timed, device, name, dtype, variant):
    shape, activation, _, _ = BATCH_NORMS[name]
    layout = torch.contiguous_format if variant == "eager_nchw" else torch.channels_last
    inputs, grad = case(name, dtype, layout, device)
    x, weight, bias, *rest = inputs
    residual = rest[0] if rest else None
    forward: Callable[..., Tensor] = composed
    if variant in dispatch.OPS[OP].backends:
        if reason := dispatch.explain(OP, x, weight, weight, weight, bias, residual, 1e-5, activation)[variant]:
            pytest.skip(reason)

        def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
            mean, var = batch_norm_statistics(x, backend=variant)
            return batch_norm_act(x, mean, var, weight, bias, residual, activation=activation, backend=variant)

    elif variant == "compile":
        if not shutil.which("g++"):
            pytest.skip("torch.compile needs a C++ compiler")
        forward = torch.compile(composed, dynamic=False)

    def run() -> list[Tensor]:
        y = forward(x, weight, bias, residual, activation)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    def check(found: list[Tensor]) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        for i, (ours, theirs) in enumerate(zip(found, expected(name, dtype, device), strict=True)):
            if variant.startswith(("eager", "compile")):  # their long sums are rounded more than a kernel's may be
                if ours.dim() == 4:
                    ours = ours[:1]
                assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm()
            elif ours.dim() == 1:
                # Sums of n terms, of x's precision: their rounding grows with the size of the terms.
                scale = (x.numel() / shape[1]) ** 0.5
                assert_close((ours / scale).to(x.dtype), theirs / scale)
            elif i == 0 or activation == "relu" or variant in dispatch.OPS[OP].backends:
                # Eager's relu6 in bf16 stops the gradient where 5.99 was rounded to 6: no error, and not comparable.
                assert_close(ours[:1], theirs)

    # Read x for the statistics, for y and for both halves of the gradient, grad twice; write y and grad_x.
    tensors = 4 + 2 + 2 + (1 + 2 + 1 if residual is not None else 0)  # residual; y twice for its sign; its gradient
    timed(f"{OP} {name} {dtype}", variant, run, check, tensors * x.numel() * x.element_size())

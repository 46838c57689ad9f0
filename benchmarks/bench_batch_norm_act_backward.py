"""The gradient of batch norm with residual and activation alone: torch's separate ops, against the backends."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import BATCH_NORMS
from deeplab_fast.ops import batch_norm_statistics, dispatch
from deeplab_fast.testing import assert_close

OP = "batch_norm_act_backward"
OPS = torch.ops.deeplab_fast
CASES = [(name, dtype) for name, (_, _, _, dtypes) in BATCH_NORMS.items() for dtype in dtypes]
EPS = 1e-5


@functools.cache
def inputs(name: str, dtype: str, device: torch.device) -> tuple[Tensor | None, ...]:
    """grad_y, x, weight, bias and perhaps a residual, in channels-last memory."""
    shape, _, with_residual, _ = BATCH_NORMS[name]
    generator = torch.Generator().manual_seed(0)
    grad, x, residual = (
        torch.randn(shape, generator=generator)
        .to(device, getattr(torch, dtype))
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    weight, bias = (torch.rand(shape[1], generator=generator).to(device) + 0.5 for _ in range(2))
    return grad, x, weight, bias, residual if with_residual else None


def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    z = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    z = z if residual is None else z + residual
    return F.relu(z) if activation == "relu" else F.relu6(z)


@functools.cache
def kept(name: str, dtype: str, device: torch.device) -> tuple[Tensor | None, ...]:
    """What the forward of the ops keeps: x, y where there is a residual, and what is per channel."""
    _, x, weight, bias, residual = inputs(name, dtype, device)
    mean, var = batch_norm_statistics(x)
    y = None
    if residual is not None:
        y = OPS.batch_norm_act(x, mean, var, weight, bias, residual, EPS, BATCH_NORMS[name][1], "auto")
    return x, y, mean, var, weight, bias


@functools.cache
def expected(name: str, dtype: str, device: torch.device) -> list[Tensor]:
    """One image's worth of the gradients of x and the residual, and those of weight and bias, in fp64."""
    grad, *rest = inputs(name, dtype, device)
    wide = [t if t is None else t.double().requires_grad_() for t in rest]
    y = composed(*wide, BATCH_NORMS[name][1])
    found = torch.autograd.grad(y, [t for t in wide if t is not None], grad.double())
    return [g[:1].clone() if g.dim() == 4 else g for g in found]


@pytest.mark.parametrize("variant", ["native", "triton", "reference", "eager"])
@pytest.mark.parametrize("name, dtype", CASES)
def bench_batch_norm_act_backward(timed, device, name, dtype, variant):
    _, activation, with_residual, _ = BATCH_NORMS[name]
    grad, *rest = inputs(name, dtype, device)
    x, y, *channels = kept(name, dtype, device)
    count = x.numel() // x.shape[1]
    if variant == "eager":
        leaves = [t if t is None else t.detach().requires_grad_() for t in rest]
        result = composed(*leaves, activation)

        def run() -> list[Tensor]:
            return list(torch.autograd.grad(result, [t for t in leaves if t is not None], grad, retain_graph=True))

    else:
        last = (count, EPS, activation, with_residual)
        if reason := dispatch.explain(OP, grad, x, y, *channels, *channels[:2], *last)[variant]:
            pytest.skip(reason)

        def run() -> list[Tensor]:
            sums = OPS.batch_norm_act_backward_reduce(grad, x, y, *channels, EPS, activation, variant)
            grads = OPS.batch_norm_act_backward(grad, x, y, *channels, *sums, *last, variant)
            return [grads[0], sums[1], sums[0], *grads[1:]]

    def check(found: list[Tensor]) -> None:
        if variant in dispatch.OPS[OP].backends:
            assert dispatch.last_backend(OP) == variant
        for ours, theirs in zip(found, expected(name, dtype, device), strict=True):
            if variant == "eager":
                part = ours[:1] if ours.dim() == 4 else ours
                # Its long sums are rounded more than a kernel's may be, and in bf16 its relu6 stops the gradient where
                # 5.99 was rounded to 6.
                limit = 0.1 if activation == "relu6" else 0.02
                assert (part.double() - theirs).norm() <= limit * theirs.norm()
            elif ours.dim() == 1:
                scale = count**0.5  # of n terms: their rounding grows with the size of the terms
                assert_close((ours / scale).to(x.dtype), theirs / scale)
            else:
                assert_close(ours[:1], theirs)

    # Both passes read grad_y and x, and y where it was kept; written are grad_x and perhaps the residual's gradient.
    tensors = 2 * (2 + with_residual) + 1 + with_residual
    timed(f"{OP} {name} {dtype}", variant, run, check, tensors * x.numel() * x.element_size())

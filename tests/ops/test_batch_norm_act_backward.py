from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deeplab_fast.ops import batch_norm_statistics, dispatch
from deeplab_fast.ops.batch_norm_act_backward import (
    batch_norm_act_backward_inference_reference,
    batch_norm_act_backward_reduce_reference,
    batch_norm_act_backward_reference,
)
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, check_passes, compile_launches, needs_compiler

OPS = torch.ops.deeplab_fast
EPS = 1e-5
on_each_backend = pytest.mark.parametrize("backend, device", backends("batch_norm_act_backward"))
on_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
on_each_form = pytest.mark.parametrize(
    "activation, with_y, residual",
    [
        ("none", False, False),
        ("relu", False, False),
        ("relu6", False, False),
        ("relu", True, True),
        ("relu6", True, True),
    ],
)


def image(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def channels(c: int, device: str, seed: int) -> Tensor:
    return torch.randn(c, generator=torch.Generator().manual_seed(seed)).to(device)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), correction=0)


def arguments(dtype: torch.dtype, device: str, activation: str, with_y: bool, residual: bool) -> tuple:
    """What both passes take; where rounding decides on which side of the mask an element is, grad is zero."""
    shape = (2, 40, 9, 11)
    grad, x = image(shape, dtype, device, 1), image(shape, dtype, device, 2)
    values = (*statistics(x), 2 * channels(40, device, 3), channels(40, device, 4))
    mean, var, weight, bias = (v.reshape(1, -1, 1, 1) for v in values)
    z = (x.float() - mean) * torch.rsqrt(var + EPS) * weight + bias
    z = z + image(shape, dtype, device, 5) if residual else z
    grad[(z.abs() < 1e-4) | ((z - 6).abs() < 1e-4)] = 0
    y = z.to(dtype).contiguous(memory_format=torch.channels_last) if with_y else None
    return grad, x, y, *values


def skip_fp16(backend: str, dtype: torch.dtype) -> None:
    if backend == "native" and dtype == torch.float16:
        pytest.skip("the CPU kernels take float32 or bfloat16")


@on_each_backend
@on_each_dtype
@on_each_form
def test_matches_the_reference(backend, device, dtype, activation, with_y, residual):
    skip_fp16(backend, dtype)
    given = arguments(dtype, device, activation, with_y, residual)
    sums = OPS.batch_norm_act_backward_reduce(*given, EPS, activation, backend)
    assert dispatch.last_backend("batch_norm_act_backward_reduce") == backend
    wide = [None if t is None else t.double() for t in given]
    expected_sums = batch_norm_act_backward_reduce_reference(*wide, EPS, activation)
    for ours, theirs in zip(sums, expected_sums, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours / 10, theirs / 10)  # of 198 terms each
    rest = (300, EPS, activation, residual)  # more pixels than there are here: those of other processes
    found = OPS.batch_norm_act_backward(*given, *sums, *rest, backend)
    assert dispatch.last_backend("batch_norm_act_backward") == backend
    expected = batch_norm_act_backward_reference(*wide, *expected_sums, *rest)
    assert len(found) == 1 + residual
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, theirs)


@on_each_backend
@on_each_dtype
@pytest.mark.parametrize("activation, residual", [("none", False), ("relu", False), ("relu6", True)])
def test_frozen_form_matches_the_reference(backend, device, dtype, activation, residual):
    skip_fp16(backend, dtype)
    grad, y, scale = (
        image((2, 19, 5, 7), dtype, device, 1),
        image((2, 19, 5, 7), dtype, device, 2),
        channels(19, device, 3),
    )
    given = (None if activation == "none" else y.mul_(3), scale, activation, residual)
    found = OPS.batch_norm_act_backward_inference(grad, *given, backend)
    assert dispatch.last_backend("batch_norm_act_backward_inference") == backend
    expected = batch_norm_act_backward_inference_reference(grad, *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@on_each_backend
def test_any_strides(backend, device):
    grad, x, _, *values = arguments(torch.float32, device, "relu", False, False)
    strided = (
        grad.contiguous()[:, :, ::2],
        x.contiguous()[:, :, ::2],
        None,
        *(v.repeat_interleave(2)[::2] for v in values),
    )
    dense = (*(t.contiguous(memory_format=torch.channels_last) for t in strided[:2]), None, *values)
    results = []
    for given in (strided, dense):
        sums = OPS.batch_norm_act_backward_reduce(*given, EPS, "relu", backend)
        results.append([*sums, *OPS.batch_norm_act_backward(*given, *sums, 90, EPS, "relu", False, backend)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@on_each_backend
def test_nothing(backend, device):
    x, c = torch.ones(0, 3, 4, 5, device=device), torch.ones(3, device=device)
    sums = OPS.batch_norm_act_backward_reduce(x, x, None, c, c, c, c, EPS, "relu", backend)
    assert [values.tolist() for values in sums] == [[0.0] * 3] * 2
    (grad_x,) = OPS.batch_norm_act_backward(x, x, None, c, c, c, c, *sums, 0, EPS, "relu", False, backend)
    assert grad_x.shape == x.shape


@on_each_backend
@on_each_dtype
def test_two_runs_agree(backend, device, dtype):
    skip_fp16(backend, dtype)
    given = arguments(dtype, device, "relu", False, False)

    def run() -> list[Tensor]:
        sums = OPS.batch_norm_act_backward_reduce(*given, EPS, "relu", backend)
        statistics = OPS.batch_norm_act_statistics(given[1], backend)
        return [*statistics, *sums, *OPS.batch_norm_act_backward(*given, *sums, 198, EPS, "relu", False, backend)]

    assert all(map(torch.equal, run(), run()))


@on_each_backend
def test_the_halves_of_two_processes_give_the_whole(backend, device):
    """Synchronised batch norm: the sums of both halves, added, and the count of both."""
    x, grad = image((4, 6, 5, 5), torch.float32, device, 1), image((4, 6, 5, 5), torch.float32, device, 2)
    weight, bias = channels(6, device, 3), channels(6, device, 4)
    stats = (*batch_norm_statistics(x), weight, bias)
    parts = [
        OPS.batch_norm_act_backward_reduce(grad[i : i + 2], x[i : i + 2], None, *stats, EPS, "relu", backend)
        for i in (0, 2)
    ]
    sums = [a + b for a, b in zip(*parts, strict=True)]
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    F.relu(F.batch_norm(wide[0], None, None, *wide[1:], training=True, eps=EPS)).backward(grad.double())
    for i in (0, 2):
        args = (grad[i : i + 2], x[i : i + 2], None, *stats, *sums, 100, EPS, "relu", False, backend)
        assert_close(OPS.batch_norm_act_backward(*args)[0], wide[0].grad[i : i + 2])


@on_each_backend
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(backend, device, residual):
    grad, x, y, *values = arguments(torch.float32, device, "relu", residual, residual)
    check_op, last = torch.library.opcheck, (EPS, "relu", backend)
    check_op(OPS.batch_norm_act_backward_reduce.default, (grad, x, y, *values, *last))
    rest = (*values[:2], 24, EPS, "relu", residual, backend)
    check_op(OPS.batch_norm_act_backward.default, (grad, x, y, *values, *rest))
    check_op(OPS.batch_norm_act_backward_inference.default, (grad, x, values[0], "relu", residual, backend))


def test_no_second_derivative():
    x = image((2, 3, 4, 5), torch.float32, "cpu", 1).requires_grad_()
    mean, var = batch_norm_statistics(x)
    y = OPS.batch_norm_act(x, mean, var, channels(3, "cpu", 2), channels(3, "cpu", 3), None, EPS, "relu", "auto")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_act_backward.* has no second derivative"):
        grad.sum().backward()


def test_no_gradient_is_computed_that_nobody_asked_for():
    x = image((2, 3, 4, 5), torch.float32, "cpu", 1)
    weight, bias = channels(3, "cpu", 2).requires_grad_(), channels(3, "cpu", 3).requires_grad_()
    dispatch._last.pop("batch_norm_act_backward", None)
    mean, var = batch_norm_statistics(x)
    OPS.batch_norm_act(x, mean, var, weight, bias, None, EPS, "relu", "auto").sum().backward()
    assert weight.grad is not None and dispatch.last_backend("batch_norm_act_backward") is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip, dtype):
    from deeplab_fast.kernels import batch_norm_act_backward as kernels

    x = torch.empty((2, 256, 65, 65), dtype=dtype, memory_format=torch.channels_last)
    c = torch.empty(256)
    for y in (None, x):
        sums = compile_launches(chip, lambda y=y: kernels.reduce(x, x, y, c, c, c, c, EPS, "relu6"))
        assert [kernel.name for kernel in sums] == ["_sums", "_add"]
        check_passes(sums, chip)
        given = (x, x, y, c, c, c, c, c, c, 8450, EPS, "relu6", y is not None)
        check_passes(compile_launches(chip, lambda given=given: kernels.apply(*given)), chip)
    frozen = (x, None, x, None, None, c, None, None, None, 0, 0.0, "relu6", True)
    check_passes(compile_launches(chip, lambda: kernels.apply(*frozen)), chip)

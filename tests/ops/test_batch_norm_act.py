from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deeplab_fast.ops import (
    batch_norm_act,
    batch_norm_act_inference,
    batch_norm_merge,
    batch_norm_statistics,
    dispatch,
    native,
)
from deeplab_fast.ops.batch_norm_act import batch_norm_act_inference_reference, batch_norm_act_reference
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, check_passes, compile_launches, needs_compiler
from tests.interpreted import crossed

OP = "batch_norm_act"
OPS = torch.ops.deeplab_fast
EPS = 1e-5
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
in_triton = pytest.mark.parametrize("backend, device", [case for case in backends(OP) if case.values[0] == "triton"])
DTYPES = [torch.float32, torch.bfloat16]
on_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [
    (0, 3, 4, 5),  # nothing
    (1, 1, 1, 2),  # one channel
    (2, 3, 5, 7),  # 3 channels, a pixel count that no wide row divides
    (1, 17, 1, 33),  # an odd number of channels
    (2, 24, 9, 9),  # half a vector left over
    (3, 64, 8, 8),
    (1, 257, 3, 5),  # wider than 4096 when repeated: rows that end inside a vector
    (1, 2048, 2, 3),
    (2, 96, 48, 50),  # several threads
]


# Many programs, which Triton's interpreter runs one after another: fewer that say the same.
IN_THE_INTERPRETER = {(1, 2048, 2, 3): (1, 512, 2, 3), (2, 96, 48, 50): (2, 96, 10, 13)}


def image(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def channels(c: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(c, generator=generator) * 2
    return weight.to(device), torch.randn(c, generator=generator).to(device)


def truth(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What torch does, in fp64."""
    z = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    z = z if residual is None else z + residual
    return z if activation == "none" else F.relu(z) if activation == "relu" else F.relu6(z)


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def check(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str, activation: str, with_residual: bool
) -> None:
    if backend == "triton" and device == "cpu":
        shape = IN_THE_INTERPRETER.get(shape, shape)
    x = image(shape, dtype, device, 1)
    residual = image(shape, dtype, device, 2) if with_residual else None
    grad = image(shape, dtype, device, 3)
    inputs = leaves(x, *channels(shape[1], device, 4), residual)
    mean, var = batch_norm_statistics(x, backend=backend)
    assert dispatch.last_backend("batch_norm_act_statistics") == backend
    assert mean.dtype == var.dtype == torch.float32
    y = batch_norm_act(inputs[0], mean, var, *inputs[1:], activation=activation, backend=backend)
    assert dispatch.last_backend(OP) == backend
    assert y.dtype == dtype and y.shape == x.shape
    if backend == "native":
        assert y.stride() == torch.empty(shape).to(memory_format=torch.channels_last).stride()
    if x.numel() == 0:
        y.backward(grad)
        assert inputs[0].grad.shape == shape and inputs[1].grad.tolist() == inputs[2].grad.tolist() == [0.0] * shape[1]
        return
    wide = leaves(*inputs, dtype=torch.float64)
    expected = truth(*wide, activation)
    with torch.no_grad():  # at the edges of the activation rounding decides, so no gradient comes from there
        z = truth(*wide, "none")
        grad[(z.abs() < 1e-4) | ((z - 6).abs() < 1e-4)] = 0
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(mean, x.double().mean((0, 2, 3)))
    assert_close(var, x.double().var((0, 2, 3), correction=0))
    assert_close(y, expected)
    for ours, theirs in zip(inputs, wide, strict=True):
        if ours is not None:
            # Sums of n terms: their rounding grows with the size of the terms, not with that of the sum.
            scale = math.sqrt(x.numel() / shape[1]) if ours.dim() == 1 else 1.0
            assert_close(ours.grad / scale, theirs.grad / scale)


@on_each_backend
@pytest.mark.parametrize("shape, dtype", crossed(SHAPES, DTYPES), ids=str)
@pytest.mark.parametrize(
    "activation, with_residual", [("none", False), ("relu", False), ("relu6", False), ("relu", True)]
)
def test_matches_torch(backend, device, dtype, shape, activation, with_residual):
    check(shape, dtype, device, backend, activation, with_residual)


@on_each_backend
@pytest.mark.parametrize("activation", ["none", "relu6"])  # bf16 rounds 5.99 to 6: its mask is eager's, not fp64's
def test_residual_forms(backend, device, activation):
    check((2, 40, 7, 9), torch.float32, device, backend, activation, True)


@in_triton
@pytest.mark.parametrize("activation, with_residual", [("relu", False), ("relu6", False), ("relu", True)])
def test_fp16(backend, device, activation, with_residual):
    check((2, 40, 7, 9), torch.float16, device, backend, activation, with_residual)


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """So few programs that each takes several steps, as at real sizes."""
    from deeplab_fast.kernels import batch_norm_act as kernels

    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
    return kernels


@in_triton
@on_each_dtype
def test_programs_of_several_steps(one_multiprocessor, backend, device, dtype):
    x = image((2, 24, 31, 35), dtype, device, 1)
    tiles = one_multiprocessor.tiling("statistics", x)
    assert 1 < tiles.groups <= tiles.tiles // 3
    assert tiles.tiles % tiles.groups, "not all of them take as many"
    check((2, 24, 31, 35), dtype, device, backend, "relu", False)
    check((2, 24, 31, 35), dtype, device, backend, "relu", True)
    test_statistics_far_from_zero(backend, device, dtype)


@on_each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(instruction_set, dtype, shape):
    check(shape, dtype, "cpu", "native", "relu", True)
    check(shape, dtype, "cpu", "native", "relu6", False)


@on_each_backend
@on_each_dtype
@pytest.mark.parametrize("activation, with_residual", [("none", True), ("relu", True), ("relu6", False)])
def test_frozen_form(backend, device, dtype, activation, with_residual):
    shape = (2, 24, 7, 9)
    x, residual = leaves(image(shape, dtype, device, 1), image(shape, dtype, device, 2) if with_residual else None)
    scale, shift = channels(24, device, 3)
    y = batch_norm_act_inference(x, scale, shift, residual, activation=activation, backend=backend)
    assert dispatch.last_backend("batch_norm_act_inference") == backend
    wide = leaves(x, residual, dtype=torch.float64)
    expected = batch_norm_act_inference_reference(wide[0], scale.double(), shift.double(), wide[1], activation)
    assert_close(y, expected)
    grad = image(shape, dtype, device, 4)
    # By the mask of the rounded output, as in eager.
    passed = (y > 0) & (y < (6 if activation == "relu6" else math.inf)) if activation != "none" else torch.ones_like(y)
    y.backward(grad)
    assert_close(x.grad, grad.double() * passed * scale.double().reshape(1, -1, 1, 1))
    if with_residual:
        assert_close(residual.grad, grad.double() * passed)


def test_scale_that_asks_for_a_gradient_takes_the_reference():
    x, scale, shift = image((1, 3, 4, 5), torch.float32, "cpu", 1), *leaves(*channels(3, "cpu", 2))
    batch_norm_act_inference(x, scale, shift, activation="relu").sum().backward()
    assert dispatch.last_backend("batch_norm_act_inference") == "reference"
    assert scale.grad is not None and shift.grad is not None


@on_each_backend
@on_each_dtype
def test_statistics_far_from_zero(backend, device, dtype):
    """Plain sums of squares would lose the variance: the mean is a thousand deviations away, one outlier first."""
    x = image((4, 5, 60, 61), torch.float32, device, 1) / 8 + 1000
    x[0, :, 0, 0] = 0
    x = x.to(dtype)
    mean, var = batch_norm_statistics(x, backend=backend)
    assert_close(mean, x.double().mean((0, 2, 3)))
    assert_close(var, x.double().var((0, 2, 3), correction=0))


@in_triton
def test_more_partial_sums_than_a_step_merges(backend, device):
    from deeplab_fast.kernels import batch_norm_act as kernels
    from deeplab_fast.kernels import common

    shape = (1, 5, 140, 140)
    x = image(shape, torch.float32, device, 1)
    for case in ("statistics", "backward_reduce"):
        assert kernels.tiling(case, x).groups > common.configuration(OP, "merge", x)["PARTS"]
    check(shape, torch.float32, device, backend, "relu", False)


@pytest.mark.parametrize("backend, device", backends("batch_norm_act_merge"))
def test_statistics_of_several_processes_merge(backend, device):
    """Synchronised batch norm: one message (n, mean, n * var) of each, of different numbers of pixels, one of none."""
    x = image((102, 6, 1, 2), torch.float32, device, 1)
    x = x + 100 * torch.arange(102, device=device).reshape(-1, 1, 1, 1)
    messages = [torch.zeros(3, 6, device=device)]
    for part in (x[:3], *x[3:].split(1)):
        own = part.double().permute(1, 0, 2, 3).reshape(6, -1)
        messages.append(
            torch.stack([torch.full_like(own[:, 0], own.shape[1]), own.mean(1), own.var(1) * (own.shape[1] - 1)])
        )
    partials = torch.stack([m.float() for m in messages])
    mean, var = batch_norm_merge(partials, backend=backend)
    assert dispatch.last_backend("batch_norm_act_merge") == backend
    torch.library.opcheck(OPS.batch_norm_act_merge.default, (partials, backend))
    assert batch_norm_merge(torch.zeros(2, 3, 5, device=device), backend=backend)[1].isnan().all()
    assert_close(mean, x.double().mean((0, 2, 3)))
    assert_close(var, x.double().var((0, 2, 3), correction=0))


@on_each_backend
def test_no_pixels_have_no_statistics(backend, device):
    found = batch_norm_statistics(torch.ones(0, 3, 4, 5, device=device), backend=backend)
    assert [values.shape for values in found] == [(3,), (3,)] and all(values.isnan().all() for values in found)


@on_each_backend
@pytest.mark.parametrize("view", ["nchw", "sliced", "expanded", "offset"])
def test_any_strides_and_alignment(backend, device, view):
    x = image((2, 33, 9, 11), torch.float32, device, 1)
    x = {
        "nchw": x.contiguous(),
        "sliced": x[:, 3:20, 1::2, 2:],
        "expanded": x[:1].expand(3, -1, -1, -1),
        "offset": x.permute(0, 2, 3, 1).reshape(-1)[1 : 1 + 2 * 5 * 7 * 8].view(2, 7, 8, 5).permute(0, 3, 1, 2),
    }[view]
    mean, var = batch_norm_statistics(x, backend=backend)
    weight, bias = (values[::2] for values in channels(2 * x.shape[1], device, 2))
    y = batch_norm_act(x, mean, var, weight, bias, activation="relu", backend=backend)
    assert_close(y, truth(x.double(), weight.double(), bias.double(), None, "relu"))


@on_each_backend
def test_not_a_number(backend, device):
    x = image((2, 5, 6, 7), torch.float32, device, 1)
    x[0, 1, 2, 3], x[1, 3, 0, 0] = math.nan, math.inf
    mean, var = batch_norm_statistics(x, backend=backend)
    y = batch_norm_act(x, mean, var, *channels(5, device, 2), activation="relu6", backend=backend)
    assert y.isnan().all((0, 2, 3)).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    "activation, with_residual, tensors", [("relu", False, 1), ("none", True, 1), ("relu", True, 2)]
)
def test_saved_bytes(activation, with_residual, tensors):
    """x alone; y too where a residual hides its sign. Eager keeps x and the activation's output always."""
    x = image((2, 32, 16, 16), torch.float32, "cpu", 1)
    weight, bias = leaves(*channels(32, "cpu", 2))
    mean, var = batch_norm_statistics(x)
    saved: dict[int, int] = {}
    pack = lambda t: saved.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_norm_act(*leaves(x), mean, var, weight, bias, x if with_residual else None, activation=activation)
    assert dispatch.last_backend(OP) == "native" or pytest.skip("the native kernels are not built")
    assert sum(saved.values()) == tensors * x.nbytes + 4 * 32 * 4


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_gradcheck_of_statistics_and_application(activation):
    generator = torch.Generator().manual_seed(5)
    x, residual = (torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    weight, bias = (6 * torch.randn(3, dtype=torch.float64, generator=generator) for _ in range(2))
    inputs = leaves(x, weight, bias, residual)
    assert (truth(*inputs, "none") > 6).any()
    for through_op in (False, True):

        def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, op: bool = through_op) -> Tensor:
            mean, var = batch_norm_statistics(x, backend="reference")
            if op:
                return OPS.batch_norm_act(x, mean, var, weight, bias, residual, EPS, activation, "reference")
            return batch_norm_act(x, mean, var, weight, bias, residual, activation=activation, backend="reference")

        assert_close(composed(*inputs), truth(*inputs, activation))
        assert torch.autograd.gradcheck(composed, inputs)


@on_each_backend
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(backend, device, with_residual):
    x, residual = leaves(image((2, 5, 3, 4), torch.float32, device, 1), image((2, 5, 3, 4), torch.float32, device, 2))
    weight, bias = channels(5, device, 2)
    mean, var = batch_norm_statistics(x)
    rest = residual if with_residual else None
    check_op = torch.library.opcheck
    check_op(OPS.batch_norm_act_statistics.default, (x.detach(), backend))
    check_op(OPS.batch_norm_act.default, (x, mean, var, *leaves(weight, bias), rest, EPS, "relu", backend))
    check_op(OPS.batch_norm_act_inference.default, (x, weight, bias, rest, "relu", backend))


def test_statistics_alone_have_no_gradient():
    x = leaves(image((2, 3, 4, 5), torch.float32, "cpu", 1))[0]
    mean, _ = OPS.batch_norm_act_statistics(x, "auto")
    with pytest.raises(RuntimeError, match="batch_norm_act_statistics has no gradient"):
        mean.sum().backward()


def test_compile_and_export_hold_one_op_and_name_no_backend():
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return batch_norm_act(x, *batch_norm_statistics(x), weight, bias, activation="relu")

    args = (image((2, 5, 6, 7), torch.float32, "cpu", 1), *channels(5, "cpu", 2))
    expected = Norm()(*args)
    assert torch.equal(torch.compile(Norm(), backend="aot_eager", fullgraph=True)(*args), expected)
    exported = torch.export.export(Norm(), args)
    calls = [n for n in exported.graph.nodes if n.target is OPS.batch_norm_act.default]
    assert [call.args[-1] for call in calls] == ["auto"]


@pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")
def test_threads_and_repetition():
    x = image((2, 24, 71, 73), torch.bfloat16, "cpu", 1)  # 1295 wide rows: no equal parts
    weight, bias = channels(24, "cpu", 2)
    before = torch.get_num_threads()

    def run() -> list[Tensor]:
        inputs = leaves(x, weight, bias)
        mean, var = batch_norm_statistics(x)
        y = batch_norm_act(inputs[0], mean, var, *inputs[1:], activation="relu6")
        y.backward(x)
        return [mean, var, y.detach(), *(t.grad for t in inputs)]

    try:
        torch.set_num_threads(1)
        expected = run()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first, second = run(), run()
            assert all(map(torch.equal, first, second))
            for ours, theirs in zip(first, expected, strict=True):
                assert_close(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_autocast_casts_x_and_not_the_statistics():
    x, (weight, bias) = image((2, 5, 6, 7), torch.float32, "cpu", 1), channels(5, "cpu", 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = batch_norm_act(x, *batch_norm_statistics(x), weight, bias, x)
        frozen = batch_norm_act_inference(x, weight, bias, x)
    assert y.dtype == frozen.dtype == torch.bfloat16


def test_rejects_wrong_inputs():
    x, c = torch.ones(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(ValueError, match=r"x is torch.int64 \(2, 3, 4, 5\); expected a floating"):
        batch_norm_statistics(x.long())
    with pytest.raises(ValueError, match="activation is 'gelu'; expected one of none, relu, relu6"):
        batch_norm_act(x, c, c, c, c, activation="gelu")
    with pytest.raises(ValueError, match=r"var is torch.float32 \(2,\); expected torch.float32 \(3,\)"):
        batch_norm_act(x, c, c[:2], c, c)
    with pytest.raises(ValueError, match="scale is torch.bfloat16"):
        batch_norm_act_inference(x, c.bfloat16(), c)
    with pytest.raises(ValueError, match=r"residual is torch.float32 \(1, 3, 4, 5\); expected as x"):
        batch_norm_act_inference(x, c, c, x[:1])
    with pytest.raises(ValueError, match="mean is on meta and x on cpu"):
        batch_norm_act(x, c.to("meta"), c, c, c)
    with pytest.raises(ValueError, match=r"partials is torch.float32 \(3,\); expected fp32 or fp64 \(groups, 3, C\)"):
        batch_norm_merge(c)


def test_half_precision_takes_the_reference():
    x, c = torch.ones(2, 3, 4, 5, dtype=torch.float16), torch.ones(3)
    assert batch_norm_act_reference(x, c, c, c, c).dtype == torch.float16
    batch_norm_act(x, c, c, c, c)
    assert dispatch.last_backend(OP) == "reference"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip, dtype):
    from deeplab_fast.kernels import batch_norm_act as kernels

    # ResNet's layers, and MobileNetV2's of channels that 16 does not divide
    for c in (256, 24) if chip == 90 else (256,):
        x = torch.empty((2, c, 65, 65), dtype=dtype, memory_format=torch.channels_last)
        values = torch.empty(c)
        statistics = compile_launches(chip, lambda x=x: kernels.statistics(x))
        assert [kernel.name for kernel in statistics] == ["_statistics", "_merge"]
        check_passes(statistics[: None if c % 16 == 0 else 1], chip)
        for given in ((values, values, values, values, None), (None, None, values, values, x)):
            found = compile_launches(chip, lambda x=x, given=given: kernels.forward(x, *given, EPS, "relu6"))
            check_passes(found, chip)


@pytest.mark.parametrize("chip", [86, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [24, 48, 64, 96, 144, 256, 304, 320, 728, 960, 2048])
def test_blocks_of_channels_fit(c, dtype, chip, monkeypatch):
    """Rows of 64 bytes at least, and little beyond C; the partial sums stay few beside x."""
    pytest.importorskip("triton")
    from deeplab_fast.kernels import batch_norm_act as kernels
    from deeplab_fast.kernels import common

    monkeypatch.setattr(common, "capability", lambda device: chip)
    x = torch.empty((1, c, 128, 128), dtype=dtype, memory_format=torch.channels_last)
    for case in ("statistics", "forward", "backward_reduce", "backward_apply"):
        tiles = kernels.tiling(case, x)
        block, rows = tiles.constants["BLOCK"], tiles.constants["ROWS"]
        assert block * x.element_size() >= 64 and block * rows <= 8192
        assert tiles.blocks * block <= c * (1.12 if c > 64 else 1.34), "few lanes are idle"
        assert tiles.sizes[1] * tiles.constants["VEC"] == c
        assert tiles.groups <= kernels.MULTIPROCESSORS * 4

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import depthwise_conv, depthwise_conv_rates, depthwise_conv_statistics, dispatch, native
from deeplab_fast.ops.depthwise_conv import (
    depthwise_conv_rates_reference,
    depthwise_conv_reference,
    depthwise_conv_statistics_reference,
)
from deeplab_fast.testing import assert_close, backends, tolerances
from tests.ahead_of_time import CHIPS, Compiled, compile_launches, needs_compiler
from tests.depthwise_checks import check_compiled, check_image_index, several_tiles_and_pieces

OP = "depthwise_conv"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
# CUDA's own kernel is forward alone.
on_each_gradient = pytest.mark.parametrize("backend, device", backends(f"{OP}_backward"))
on_triton = pytest.mark.parametrize("backend, device", [case for case in backends(OP) if case.values[0] == "triton"])
on_each_half = pytest.mark.parametrize(
    "backend, device", [c for c in backends(OP) if c.values[0] == "triton" or c.values == ("native", "cuda")]
)
on_each_kernel = pytest.mark.parametrize(
    "backend, device", [case for case in backends(OP) if case.values[0] != "reference"]
)
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 37),  # one row, fewer channels than a vector, several chains of columns
    (1, 17, 41, 1),  # one column, one channel above a vector
    (3, 19, 13, 9),
    (1, 150, 7, 35),
    (2, 304, 5, 6),
    (1, 2048, 3, 4),
    (1, 96, 40, 50),  # enough for several threads
]
# kernel, stride, dilation
GEOMETRIES = [
    (3, 1, 1),
    (3, 1, 2),
    (3, 1, 6),
    (3, 1, 60),  # larger than any image: only the centre tap is inside
    (3, 2, 1),
    (3, 2, 3),
    (3, 3, 1),  # from here on the code for any kernel and stride
    (5, 1, 2),
    (7, 2, 1),
    (1, 1, 1),
]


def tensors(shape: tuple[int, ...], kernel: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, weight, scale and shift; the weight is scaled so that results are of order one."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[1]
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (torch.randn(c, 1, kernel, kernel, generator=generator) / kernel).to(dtype)
    return [x, weight, torch.randn(c, generator=generator), torch.randn(c, generator=generator)]


def wide(given: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in given]


def is_packed(y: Tensor) -> bool:
    n, c, h, w = y.shape
    return y.stride() == (c * h * w, 1, w * c, c) and y.is_contiguous(memory_format=torch.channels_last)


def check(given: list[Tensor], backend: str, stride: int = 1, dilation: int = 1, activation: str = "none") -> Tensor:
    y = depthwise_conv(*given, stride=stride, dilation=dilation, activation=activation, backend=backend)
    assert dispatch.last_backend(OP) == backend
    assert y.dtype == given[0].dtype
    assert_close(y, depthwise_conv_reference(*wide(given), stride, dilation, activation))
    return y


def check_statistics(x: Tensor, weight: Tensor, backend: str, stride: int = 1, dilation: int = 1) -> None:
    y, mean, variance = depthwise_conv_statistics(x, weight, stride=stride, dilation=dilation, backend=backend)
    assert dispatch.last_backend("depthwise_conv_statistics") == backend
    assert mean.dtype == variance.dtype == torch.float32
    assert_close(y, depthwise_conv_reference(x.double(), weight.double(), None, None, stride, dilation))
    rounded = y.double()
    assert_close(mean, rounded.mean((0, 2, 3)))
    assert_close(variance, rounded.var((0, 2, 3), correction=0))


@on_each_backend
@in_each_dtype
@pytest.mark.parametrize("kernel, stride, dilation", GEOMETRIES)
def test_matches_reference(backend, device, dtype, kernel, stride, dilation):
    interpreted = backend == "triton" and torch.device(device).type == "cpu"  # by one thread, and slowly
    shapes = SHAPES
    if interpreted:  # one vector of channels after another; what a dtype changes is how many fill one
        shapes = SHAPES[3:6:2] if dtype != torch.float32 else SHAPES[:6] if kernel <= 3 else SHAPES[3:6]
    for shape in shapes:
        given = [t.to(device) for t in tensors(shape, kernel, dtype)]
        y = check(given, backend, stride, dilation, "relu")
        assert y.shape == (*shape[:2], -(-shape[2] // stride), -(-shape[3] // stride)) and is_packed(y)
        check_statistics(*given[:2], backend, stride, dilation)


@on_each_backend
@in_each_dtype
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_affine_and_activation(backend, device, dtype, activation):
    x, weight, scale, shift = (t.to(device) for t in tensors((2, 33, 9, 11), 3, dtype))
    for affine in ((None, None), (3 * scale, None), (None, 3 * shift), (3 * scale, 3 * shift)):
        y = depthwise_conv(x, weight, *affine, activation=activation, backend=backend)
        expected = depthwise_conv_reference(x.double(), weight.double(), *affine, 1, 1, activation)
        assert_close(y, expected)


@on_each_backend
@in_each_dtype
@pytest.mark.parametrize("dilations", [[6, 12, 18], [1], [3, 3]], ids=str)
def test_rates(backend, device, dtype, dilations):
    for shape in ((1, 70, 20, 23), (2, 5, 3, 1)):
        given = [[t.to(device) for t in tensors(shape, 3, dtype, seed)] for seed in range(len(dilations))]
        x, (weights, scales, shifts) = given[0][0], zip(*(g[1:] for g in given), strict=True)
        ours = depthwise_conv_rates(
            x, weights, scales, shifts, dilations=dilations, activation="relu6", backend=backend
        )
        assert dispatch.last_backend("depthwise_conv_rates") == backend
        expected = depthwise_conv_rates_reference(
            x.double(), wide(weights), wide(scales), wide(shifts), dilations, "relu6"
        )
        for y, e in zip(ours, expected, strict=True):
            assert is_packed(y)
            assert_close(y, e)


@on_each_backend
@in_each_dtype
def test_result_larger_than_a_cache(backend, device, dtype):
    """Written around the cache where lines of it are whole, as they are not with 136 channels."""
    size = (40, 41) if (backend, device) == ("triton", "cpu") else (130, 131)  # the interpreter has no such cache
    for channels in (128, 136):
        given = [t.to(device) for t in tensors((1, channels, *size), 3, dtype)]
        check(given, backend, dilation=12)
        check_statistics(*given[:2], backend)


@on_each_backend
@in_each_dtype
def test_any_strides_and_alignment(backend, device, dtype):
    x, weight, scale, shift = (t.to(device) for t in tensors((4, 40, 12, 14), 3, dtype))
    for view in (
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 3:],
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.flatten()[1 : 1 + 2 * 20 * 36].view(2, 20, 6, 6).contiguous(memory_format=torch.channels_last),
        lambda x: torch.as_strided(x, (2, 20, 6, 6), (720, 1, 120, 20), 1),  # packed, not aligned to a vector
    ):
        part = view(x)
        c = part.shape[1]
        check([part, weight[:c].mT, scale[:c].flip(0), shift[::2][:c] if c <= 20 else shift[:c]], backend, 1, 2)


@pytest.mark.skipif(not native.load(), reason="deeplab_fast._C is not built")
def test_one_conversion_of_the_layout():
    x, *rest = tensors((2, 6, 5, 5), 3, torch.float32)
    before = native.conversions
    depthwise_conv(x, *rest, backend="native")
    assert native.conversions == before + 1
    depthwise_conv(x.contiguous(memory_format=torch.channels_last), *rest, backend="native")
    assert native.conversions == before + 1


@on_each_backend
def test_empty_batch(backend, device):
    x, weight, scale, shift = (t.to(device) for t in tensors((0, 5, 7, 6), 3, torch.float32))
    y = check([x, weight, scale, shift], backend, 2)
    assert y.shape == (0, 5, 4, 3) and is_packed(y)
    y, mean, variance = depthwise_conv_statistics(x, weight, backend=backend)
    assert y.shape == x.shape and mean.isnan().all() and variance.isnan().all()


@on_each_backend
@in_each_dtype
def test_nan_and_infinity_reach_their_neighbours_only(backend, device, dtype):
    x, weight, scale, shift = (t.to(device) for t in tensors((1, 35, 9, 40), 3, dtype))
    x[0, 3, 4, 20] = torch.nan
    x[0, 7, 0, 0] = torch.inf
    x[0, 34, 8, 39] = -torch.inf
    x[0, 34, 8, 38] = torch.inf
    for activation in native.ACTIVATIONS:
        check_equal_nan([x, weight, scale, shift], activation, backend)
    weight[5] = torch.nan
    shift[6] = torch.nan
    y = depthwise_conv(x, weight, scale, shift, dilation=12, backend=backend)
    assert y[0, 5].isnan().all() and y[0, 6].isnan().all() and not y[0, 4].isnan().any()
    mean, variance = depthwise_conv_statistics(x, weight, backend=backend)[1:]
    assert mean[3].isnan() and variance[3].isnan() and mean[5].isnan() and variance[7].isnan()
    assert not mean[[0, 1, 2, 4]].isnan().any()


def check_equal_nan(given: list[Tensor], activation: str, backend: str) -> None:
    y = depthwise_conv(*given, dilation=2, activation=activation, backend=backend)
    expected = depthwise_conv_reference(*wide(given), 1, 2, activation)
    assert torch.equal(y.isnan(), expected.isnan()) and expected.isnan().sum() >= 9
    assert torch.equal(y.isinf(), expected.isinf())
    assert_close(y[expected.isfinite()], expected[expected.isfinite()])


@on_each_kernel
@in_each_dtype
@pytest.mark.parametrize("shape, dilation", [((2, 9, 5, 30), 5), ((2, 9, 30, 5), 5), ((1, 9, 5, 6), 60)], ids=str)
def test_taps_outside_for_every_pixel_are_not_computed(backend, device, shape, dilation, dtype):
    """Infinite weights there would make NaN of the zeros outside."""
    x, weight, scale, shift = (t.to(device) for t in tensors(shape, 3, dtype))
    inside = weight.clone()
    if shape[2] <= dilation:
        weight[:, :, [0, 2]], inside[:, :, [0, 2]] = torch.inf, 0
    if shape[3] <= dilation:
        weight[..., [0, 2]], inside[..., [0, 2]] = torch.inf, 0
    y = depthwise_conv(x, weight, scale, shift, dilation=dilation, backend=backend)
    assert_close(y, depthwise_conv_reference(*wide([x, inside, scale, shift]), 1, dilation))


@on_each_half
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 1, 1), (3, 2, 1), (3, 1, 6), (5, 1, 2)])
def test_fp16(backend, device, kernel, stride, dilation):
    given = [t.to(device) for t in tensors((2, 40, 9, 14), kernel, torch.float16)]
    check(given, backend, stride, dilation, "relu6")
    check_statistics(*given[:2], backend, stride, dilation)
    rates = [[t] * 4 for t in given[1:]]
    dilations = [1, 2, 3, 20]
    for d, y in zip(
        dilations, depthwise_conv_rates(given[0], *rates, dilations=dilations, backend=backend), strict=True
    ):
        assert_close(y, depthwise_conv_reference(*wide(given), 1, d))


@on_triton
@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 5), (2, 1), (2, 6), (3, 2)])
def test_programs_of_several_tiles_and_pieces(backend, device, stride, dilation):
    for shape in ((1, 9, 23, 20), (1, 24, 5, 200)):
        given = [t.to(device) for t in tensors(shape, 3, torch.float32)]
        with several_tiles_and_pieces():
            check(given, backend, stride, dilation, "relu")
            check_statistics(*given[:2], backend, stride, dilation)
            if stride == 1:
                rates = [given[1]] * 3, [given[2]] * 3, [given[3]] * 3
                dilations = [dilation, 2 * dilation, 4 * dilation]
                for d, y in zip(
                    dilations, depthwise_conv_rates(given[0], *rates, dilations=dilations, backend=backend), strict=True
                ):
                    assert_close(y, depthwise_conv_reference(*wide(given), 1, d))


@on_triton
def test_statistics_of_many_parts(backend, device):
    """More than the merge takes at once."""
    from deeplab_fast.kernels import common

    found = common.configuration
    with mock.patch.object(
        common, "configuration", lambda *a: {k: {"BLOCK_P": 2}.get(k, v) for k, v in found(*a).items()}
    ):
        x, weight, *_ = (t.to(device) for t in tensors((11, 5, 3, 4), 3, torch.float32))
        check_statistics(x + 100, weight, backend)


@on_triton
def test_too_many_images_are_a_reason(backend, device):
    x = torch.zeros((1 << 16, 1, 1, 1), device=device)
    weight = torch.zeros((1, 1, 1, 1), device=device)
    for op, weights in {OP: weight, f"{OP}_statistics": weight, f"{OP}_rates": [weight]}.items():
        assert "at most 65535 images, and got 65536" in str(dispatch.explain(op, x, weights)[backend])
        assert dispatch.explain(op, x[1:], weights)[backend] is None


@on_each_backend
def test_two_runs_agree_bit_for_bit(backend, device):
    x, weight, scale, shift = (t.to(device) for t in tensors((2, 40, 20, 21), 3, torch.float32))
    for call in (
        lambda: [depthwise_conv(x, weight, scale, shift, dilation=3, activation="relu", backend=backend)],
        lambda: depthwise_conv_statistics(x, weight, stride=2, backend=backend),
    ):
        assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


@pytest.mark.skipif(not native.load(), reason="deeplab_fast._C is not built")
def test_rounds_to_the_nearest_even_bf16_and_keeps_denormals():
    bits = torch.arange(0, 1 << 16, 7, dtype=torch.int32)
    scale = (bits << 16 | 0x8000).view(torch.float32)  # ties, and with the next line what lies beside them
    for values in (scale, (scale.view(torch.int32) + 1).view(torch.float32), scale.nextafter(torch.tensor(0.0))):
        values = values[values.isfinite()]
        c = values.numel()
        x, weight = torch.ones(1, c, 1, 1).bfloat16(), torch.ones(c, 1, 1, 1).bfloat16()
        y = depthwise_conv(x, weight, values, backend="native")
        assert torch.equal(y.flatten(), values.bfloat16())


@pytest.mark.skipif(not native.load(), reason="deeplab_fast._C is not built")
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@in_each_dtype
def test_every_instruction_set(name, dtype):
    module = native.load()
    if name not in module.instruction_sets():
        pytest.skip(f"this processor has no kernels for {name}")
    before = module.instruction_set()
    module.use_instruction_set(name)
    try:
        for kernel, stride, dilation in GEOMETRIES:
            for shape in SHAPES[:6]:
                given = tensors(shape, kernel, dtype)
                check(given, "native", stride, dilation, "relu6")
                check_statistics(*given[:2], "native", stride, dilation)
        test_rates("native", "cpu", dtype, [2, 5])
        test_result_larger_than_a_cache("native", "cpu", dtype)
        test_nan_and_infinity_reach_their_neighbours_only("native", "cpu", dtype)
    finally:
        module.use_instruction_set(before)


@pytest.mark.skipif(not native.load(), reason="deeplab_fast._C is not built")
@in_each_dtype
def test_any_place_in_a_page(dtype):
    """Where x and y are as far into a page each and pixels are pages apart, y is written after its row was read."""
    page = 4096 // dtype.itemsize
    given = tensors((1, page, 3, 5), 3, dtype)
    size = given[0].numel()
    room = torch.empty(size + page, dtype=dtype)

    def apart_at(begin: int) -> int:
        x = room[begin : begin + size].view(1, 3, 5, -1).permute(0, 3, 1, 2).copy_(given[0])
        y = check([x, *given[1:]], "native", activation="relu")
        return (x.data_ptr() - y.data_ptr()) % 4096

    apart = {apart_at(begin) for begin in range(0, page, 64 // dtype.itemsize)}
    begin = 0
    for _ in range(100):  # y lies where the allocator puts it
        if 0 in apart:
            break
        begin = (begin - apart_at(begin) // dtype.itemsize) % page
        apart.add(apart_at(begin))
    assert 0 in apart


@on_each_backend
def test_statistics_where_the_mean_is_large(backend, device):
    x, weight, *_ = (t.to(device) for t in tensors((4, 20, 60, 61), 1, torch.float32))
    weight = weight.abs().clamp(min=0.1)
    y, mean, variance = depthwise_conv_statistics(x + 1000, weight, backend=backend)
    assert_close(mean, y.double().mean((0, 2, 3)))
    assert_close(variance, y.double().var((0, 2, 3), correction=0))


def eager(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int, dilation: int, name: str) -> Tensor:
    """Each step in x's dtype, as torch users write it."""
    y = F.conv2d(x, weight, None, stride, dilation, dilation, groups=x.shape[1])
    y = y * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)
    return {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[name](y)


@on_each_gradient
@in_each_dtype
@pytest.mark.parametrize("stride, dilation, activation", [(1, 2, "relu"), (2, 1, "none"), (1, 12, "relu6")])
def test_gradient(backend, device, dtype, stride, dilation, activation):
    """A bf16 gradient is the sum of rounded terms, in eager too: the error may be twice that of eager."""
    given = [t.to(device) for t in tensors((2, 18, 9, 10), 3, dtype)]
    given[3] *= 6  # results on both sides of relu6's bounds
    arguments = (stride, dilation, activation)
    ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    exact = [t.double().requires_grad_() for t in given]
    y = depthwise_conv(*ours, stride=stride, dilation=dilation, activation=activation, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(device)
    z = depthwise_conv_reference(*exact, stride, dilation).detach()
    assert (z < 0).any() and (z > 6).any()
    rtol, atol = tolerances(dtype)
    grad[torch.minimum(z.abs(), (z - 6).abs()) < 6 * rtol + atol] = 0  # at the bounds rounding decides
    expected = torch.autograd.grad(depthwise_conv_reference(*exact, *arguments), exact, grad.double())
    rounded = torch.autograd.grad(eager(*theirs, *arguments), theirs, grad)
    for a, e, r, like in zip(torch.autograd.grad(y, ours, grad), expected, rounded, given, strict=True):
        assert a.dtype == like.dtype
        if dtype == torch.float32:
            assert_close(a, e)
        else:
            assert (a - e).abs().max() <= 2 * (r - e).abs().max() + tolerances(torch.float32)[1]
    if backend != "reference":
        assert dispatch.last_backend("depthwise_conv_backward") == backend


@on_each_gradient
def test_gradient_of_what_asks_for_one_only(backend, device):
    x, weight, scale, shift = (t.to(device) for t in tensors((1, 4, 5, 6), 3, torch.float32))
    weight.requires_grad_()
    y = depthwise_conv(x, weight, scale, shift, activation="relu", backend=backend)
    y.sum().backward()
    assert weight.grad is not None and x.grad is None
    assert not depthwise_conv(x, weight.detach(), backend=backend).requires_grad


@pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")
def test_the_kernel_computes_only_the_gradients_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(native.kernels(), "depthwise_conv_backward_cpu", lambda *args: calls.append(args))
    x, weight, *_ = tensors((1, 32, 5, 6), 3, torch.float32)
    for asking in (x, weight):
        asking.requires_grad_()
        depthwise_conv(x, weight, backend="native").sum().backward()
        asking.requires_grad_(False)
    assert [[address != 0 for address in args[3:5]] for args in calls] == [[True, False], [False, True]]


@on_each_gradient
def test_statistics_gradient_goes_through_the_result_alone(backend, device):
    x, weight, *_ = (t.to(device).requires_grad_() for t in tensors((2, 6, 7, 8), 3, torch.float32))
    y, mean, variance = depthwise_conv_statistics(x, weight, dilation=2, backend=backend)
    assert y.requires_grad and not mean.requires_grad and not variance.requires_grad
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected, *_ = depthwise_conv_statistics_reference(*exact, 1, 2)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(device)
    pairs = zip(torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(expected, exact, grad), strict=True)
    for a, e in pairs:
        assert_close(a, e)


def by_position(op: torch._ops.OpOverload, stride: int, dilation: int, activation: str, backend: str, *given: Tensor):
    return op(*given, stride, dilation, activation, backend)


def test_gradcheck():
    given = [t.double().requires_grad_() for t in tensors((1, 2, 4, 5), 3, torch.float32)]
    for stride, dilation in ((1, 2), (2, 1)):
        options = {"stride": stride, "dilation": dilation, "activation": "relu", "backend": "reference"}
        assert torch.autograd.gradcheck(functools.partial(depthwise_conv, **options), given)
        # The op's own formula, which compiled graphs take.
        op = torch.ops.deeplab_fast.depthwise_conv.default
        assert torch.autograd.gradcheck(functools.partial(by_position, op, *options.values()), given)


def test_what_has_no_gradient_raises():
    x, weight, scale, shift = tensors((1, 4, 5, 6), 3, torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="depthwise_conv_rates has no gradient: it is for inference"):
        depthwise_conv_rates(x, [weight], [scale], [shift], dilations=[2])
    with torch.no_grad():
        depthwise_conv_rates(x, [weight], [scale], [shift], dilations=[2])
    rates = torch.ops.deeplab_fast.depthwise_conv_rates.default(x, [weight], [scale], [shift], [2], "none", "auto")
    with pytest.raises(RuntimeError, match="depthwise_conv_rates has no gradient: it is for inference"):
        rates[0].sum().backward()
    y = torch.ops.deeplab_fast.depthwise_conv.default(x, weight, scale, shift, 1, 1, "none", "auto")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="depthwise_conv_backward has no second derivative"):
        grad.sum().backward()


@on_each_gradient
def test_opcheck(backend, device):
    x, weight, scale, shift = (t.to(device) for t in tensors((2, 5, 6, 7), 3, torch.float32))
    trained = [t.clone().requires_grad_() for t in (x, weight)]
    ops = torch.ops.deeplab_fast
    torch.library.opcheck(ops.depthwise_conv.default, (*trained, scale, shift, 2, 1, "relu", backend))
    torch.library.opcheck(
        ops.depthwise_conv.default, (x.bfloat16(), weight.bfloat16(), None, None, 1, 2, "none", backend)
    )
    rates = (x, [weight] * 2, [scale] * 2, [shift] * 2, [1, 3], "relu6", backend)
    torch.library.opcheck(ops.depthwise_conv_rates.default, rates)
    torch.library.opcheck(ops.depthwise_conv_statistics.default, (*trained, 2, 1, backend))


def test_compile_and_export_hold_one_op_and_name_no_backend():
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            y = depthwise_conv(x, weight, scale, shift, dilation=2, activation="relu")
            with torch.no_grad():
                rates = depthwise_conv_rates(x.detach(), [weight.detach()], [scale], [shift], dilations=[3])
            return y, *rates, *depthwise_conv_statistics(x, weight)

    given = tensors((2, 5, 9, 11), 3, torch.float32)
    for trained in (False, True):
        given[0].requires_grad_(trained)
        for a, e in zip(
            torch.compile(Layer(), backend="aot_eager", fullgraph=True)(*given), Layer()(*given), strict=True
        ):
            assert torch.equal(a, e) and a.stride() == e.stride()
    exported = torch.export.export(Layer(), tuple(t.detach() for t in given))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = [n for graph in graphs for n in graph.nodes if str(n.target).startswith("deeplab_fast.")]
    assert sorted(str(c.target).split(".")[1] for c in calls) == [OP, f"{OP}_rates", f"{OP}_statistics"]
    assert [c.args[-1] for c in calls] == ["auto"] * 3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, scale, shift = tensors((2, 70, 45, 46), 3, torch.float32)
        for call in (
            lambda: [depthwise_conv(x, weight, scale, shift, dilation=3, activation="relu")],
            lambda: depthwise_conv_statistics(x, weight, stride=2),
            lambda: depthwise_conv_rates(x, [weight] * 2, [scale] * 2, [shift] * 2, dilations=[1, 6]),
        ):
            assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))
        check([x, weight, scale, shift], "native" if native.load() else "reference", dilation=5)
        check_statistics(x, weight, "native" if native.load() else "reference", stride=2)
    finally:
        torch.set_num_threads(before)


def test_autocast():
    x, weight, scale, shift = tensors((1, 4, 5, 6), 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv(x, weight, scale, shift)
        raw, mean, _ = depthwise_conv_statistics(x, weight)
        (rate,) = depthwise_conv_rates(x, [weight], [scale], [shift], dilations=[1])
    assert y.dtype == raw.dtype == rate.dtype == torch.bfloat16 and mean.dtype == torch.float32
    assert_close(y, depthwise_conv_reference(*wide([x.bfloat16(), weight.bfloat16(), scale, shift])))


def test_other_types_take_the_reference():
    for dtype in (torch.float16, torch.float64):
        x, weight, scale, shift = tensors((1, 4, 5, 6), 3, torch.float32)
        affine = (v.double() if dtype == torch.float64 else v for v in (scale, shift))
        y = depthwise_conv(x.to(dtype), weight.to(dtype), *affine)
        assert dispatch.last_backend(OP) == "reference" and y.dtype == dtype
        with pytest.raises(UserError, match="depthwise_conv cannot run on the backend 'native': "):
            depthwise_conv(x.to(dtype), weight.to(dtype), backend="native")


def test_rejects_bad_input():
    x, weight, scale, shift = tensors((1, 4, 5, 6), 3, torch.float32)
    for match, call in {
        r"x is \(4, 5, 6\) of torch.float32; expected \(N, C, H, W\)": lambda: depthwise_conv(x[0], weight),
        r"x is .* of torch.int64": lambda: depthwise_conv(x.long(), weight),
        r"x is \(1, 4, 0, 6\); expected at least one": lambda: depthwise_conv(x[:, :, :0], weight),
        r"weight is \(3, 1, 3, 3\); expected \(4, 1, k, k\)": lambda: depthwise_conv(x, weight[:3]),
        r"weight is \(4, 1, 2, 2\); expected .* odd k": lambda: depthwise_conv(x, weight[..., :2, :2]),
        r"weight is torch.bfloat16 on cpu and x torch.float32": lambda: depthwise_conv(x, weight.bfloat16()),
        r"scale is \(3,\) on cpu; expected \(4,\)": lambda: depthwise_conv(x, weight, scale[:3]),
        r"shift is torch.bfloat16; expected torch.float32": lambda: depthwise_conv(x, weight, None, shift.bfloat16()),
        r"stride is 0; expected at least 1": lambda: depthwise_conv(x, weight, stride=0),
        r"dilation is -1; expected at least 1": lambda: depthwise_conv_statistics(x, weight, dilation=-1),
        r"activation is 'gelu'; expected one of none, relu": lambda: depthwise_conv(x, weight, activation="gelu"),
        r"are 1, 1, 1 and 2 in number": lambda: depthwise_conv_rates(x, [weight], [scale], [shift], dilations=[1, 2]),
        r"dilations\[1\] is 0": lambda: depthwise_conv_rates(
            x, [weight] * 2, [scale] * 2, [shift] * 2, dilations=[1, 0]
        ),
        r"weights\[0\] is \(2, 1, 3, 3\)": lambda: depthwise_conv_rates(
            x, [weight[:2]], [scale], [shift], dilations=[1]
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(UserError, match="depthwise_conv has no backend 'cudnn'; it has native, triton, reference"):
        depthwise_conv(x, weight, backend="cudnn")


# (N, C, H, W), stride, dilations, dtype, statistics; one dilation is depthwise_conv
LAUNCHES = [
    ((4, 2048, 32, 32), 1, [12], torch.bfloat16, False),
    ((4, 2048, 32, 32), 1, [12], torch.float16, False),
    ((4, 2048, 64, 128), 1, [6], torch.float32, False),
    ((4, 304, 128, 256), 1, [1], torch.bfloat16, False),
    ((2, 2048, 32, 32), 1, [6, 12, 18], torch.bfloat16, False),
    ((2, 2048, 32, 32), 1, [6, 12, 18], torch.float32, False),
    ((8, 96, 129, 129), 2, [1], torch.bfloat16, True),
    ((8, 24, 65, 65), 1, [2], torch.float16, True),  # 8 divides its channels, 16 does not
]


def launched(chip: int, shape: tuple[int, ...], stride: int, dilations: list[int], dtype: torch.dtype, statistics: bool,
             kernel: int = 3) -> list[Compiled]:  # fmt: skip
    from deeplab_fast.kernels import depthwise_conv as kernels

    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    weight, vector = torch.empty((shape[1], 1, kernel, kernel), dtype=dtype), torch.empty(shape[1])
    if statistics:
        return compile_launches(chip, lambda: kernels.depthwise_conv_statistics(x, weight, stride, *dilations))
    rates = [(weight, vector, vector, dilation) for dilation in dilations]
    return compile_launches(chip, lambda: kernels.depthwise_conv_rates(x, rates, stride, "relu"))


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip):
    for case in LAUNCHES:
        for kernel in launched(chip, *case):
            check_compiled(kernel)
    (gather,) = launched(chip, (2, 64, 65, 65), 1, [2], torch.bfloat16, False, kernel=5)
    assert gather.name == "gather"
    check_compiled(gather)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 8, 1, 37), (1, 5, 41, 1)], ids=str)
def test_compiles_for_sizes_of_one(shape):
    """Triton makes constants of them."""
    for stride, dilation, kernel in ((1, 1, 3), (2, 1, 3), (1, 6, 3), (2, 1, 1), (1, 1, 5)):
        for statistics in (False, True):
            launched(90, shape, stride, [dilation], torch.float32, statistics, kernel)


@needs_compiler
def test_offsets_of_images_have_64_bits():
    for case in (LAUNCHES[0], LAUNCHES[6]):
        check_image_index(launched(90, *case)[0])

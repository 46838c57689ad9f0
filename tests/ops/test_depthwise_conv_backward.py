from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import depthwise_conv_backward, dispatch, native
from deeplab_fast.ops.depthwise_conv_backward import depthwise_conv_backward_reference
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, Compiled, compile_launches, needs_compiler
from tests.depthwise_checks import check_compiled, check_image_index, several_tiles_and_pieces

OP = "depthwise_conv_backward"
CALL = torch.ops.deeplab_fast.depthwise_conv_backward.default
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
on_triton = pytest.mark.parametrize("backend, device", [case for case in backends(OP) if case.values[0] == "triton"])
on_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# (N, C, H, W), stride, dilation, kernel
CASES = [
    ((1, 1, 1, 1), 1, 1, 3),  # one pixel: the tap in the middle alone
    ((2, 16, 1, 7), 1, 1, 3),  # one row
    ((2, 16, 7, 1), 2, 1, 3),  # one column
    ((3, 3, 5, 6), 1, 1, 3),  # less than a vector of channels
    ((2, 17, 9, 11), 1, 1, 3),  # a vector and a rest
    ((2, 32, 33, 30), 1, 1, 3),  # rows in several blocks, which cross images
    ((1, 150, 8, 9), 1, 2, 3),  # several blocks of channels and a rest
    ((2, 32, 9, 12), 2, 1, 3),  # stride 2, odd height and even width
    ((1, 35, 10, 7), 2, 1, 3),  # even height and odd width
    ((1, 16, 2, 2), 2, 1, 3),
    ((1, 19, 11, 13), 1, 4, 3),  # phases of different lengths
    ((1, 16, 6, 6), 1, 6, 3),  # dilation = image
    ((1, 16, 5, 7), 1, 100, 3),  # dilation far above the image
    ((2, 17, 9, 8), 2, 2, 3),  # pixels of x that no tap reaches
    ((1, 18, 11, 9), 4, 6, 5),  # stride and dilation with a common divisor
    ((2, 16, 9, 7), 3, 2, 5),
    ((1, 16, 6, 9), 2, 1, 1),  # every other pixel
    ((1, 24, 12, 12), 1, 1, 7),
    ((1, 2048, 3, 3), 1, 6, 3),
    ((2, 304, 6, 5), 1, 1, 3),
]


def make(
    shape: tuple[int, ...], stride: int, kernel: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_y, x, weight; the first two channels-last."""
    generator = torch.Generator().manual_seed(seed)
    (n, c), size = shape[:2], [(s - 1) // stride + 1 for s in shape[2:]]
    grad_y, x = (torch.randn(s, generator=generator) for s in ((n, c, *size), shape))
    weight = torch.randn((c, 1, kernel, kernel), generator=generator)
    grad_y, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad_y, x))
    return tuple(t.to(device, dtype) for t in (grad_y, x, weight))


def autograd(grad_y: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """By torch, through the forward convolution, in the tensors' own dtype."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    padding = dilation * (weight.shape[-1] // 2)
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])
    return torch.autograd.grad(y, (x, weight), grad_y)


def check_sum(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """A long sum: at most twice the error of eager, and what rounding to the dtype costs any result."""
    tiny = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    error, bound = ((t.double() - exact).abs().max().item() for t in (actual, eager))
    assert error <= 2 * bound + tiny


def check(inputs: tuple[Tensor, Tensor, Tensor], stride: int, dilation: int, backend: str) -> None:
    grad_y, x, weight = inputs
    results = depthwise_conv_backward(grad_y, x, weight, stride=stride, dilation=dilation, backend=backend)
    assert dispatch.last_backend(OP) == backend
    exact = autograd(*(t.double().cpu() for t in inputs), stride, dilation)
    for result, like in zip(results, (x, weight), strict=True):
        assert result.dtype == like.dtype and result.shape == like.shape and result.device == like.device
    assert_close(results[0].cpu(), exact[0])
    check_sum(results[1].cpu(), exact[1], autograd(*(t.to("cpu", x.dtype) for t in inputs), stride, dilation)[1])
    n, c, h, w = x.shape
    assert results[0].stride() == (h * w * c, 1, w * c, c)


@on_each_backend
@on_both_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_autograd(backend, device, dtype, case):
    shape, stride, dilation, kernel = case
    check(make(shape, stride, kernel, dtype, device), stride, dilation, backend)


@on_both_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(instruction_set, dtype, case):
    shape, stride, dilation, kernel = case
    check(make(shape, stride, kernel, dtype), stride, dilation, "native")


@on_both_dtypes
@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_long_sums_keep_their_digits(instruction_set, dtype, stride, dilation):
    """Terms of one sign, 30 to 125 thousand of them."""
    grad_y, x, weight = make((2, 17, 250, 250), stride, 3, dtype)
    inputs = (grad_y.abs(), x.abs(), weight)
    result = depthwise_conv_backward(*inputs, stride=stride, dilation=dilation, backend="native")[1]
    exact = autograd(*(t.double() for t in inputs), stride, dilation)[1]
    check_sum(result, exact, autograd(*inputs, stride, dilation)[1])
    # fp32 gradients of bf16 activations show the error of the sum itself, without that of its rounding
    wide = depthwise_conv_backward(*inputs[:2], weight.float(), stride=stride, dilation=dilation, backend="native")
    assert wide[1].dtype == torch.float32
    assert_close(wide[1], exact)


@on_triton
@pytest.mark.parametrize("case", [((2, 17, 9, 11), 1, 2, 3), ((1, 24, 9, 8), 2, 1, 3), ((1, 9, 12, 12), 1, 1, 5)])
def test_fp16(backend, device, case):
    shape, stride, dilation, kernel = case
    grad_y, x, weight = make(shape, stride, kernel, torch.float16, device)
    check((grad_y, x, weight), stride, dilation, backend)
    check((grad_y, x, weight.float()), stride, dilation, backend)


@on_triton
@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 5), (2, 1), (2, 6), (3, 2)])
def test_programs_of_several_tiles_and_pieces(backend, device, stride, dilation):
    with several_tiles_and_pieces():
        for shape in ((1, 9, 23, 20), (1, 24, 5, 200)):
            check(make(shape, stride, 3, torch.float32, device), stride, dilation, backend)


@on_triton
def test_long_sums_of_one_sign(backend, device):
    grad_y, x, weight = make((2, 5, 120, 130), 1, 3, torch.bfloat16, device)
    inputs = grad_y.abs(), x.abs(), weight
    exact = autograd(*(t.double() for t in inputs), 1, 1)[1]
    found = depthwise_conv_backward(*inputs[:2], weight.float(), backend=backend)[1]
    assert found.dtype == torch.float32
    assert_close(found, exact)


@on_triton
def test_taps_outside_for_every_pixel_are_not_computed(backend, device):
    grad_y, x, weight = make((1, 9, 5, 6), 1, 3, torch.float32, device)
    weight[:, :, [0, 2]] = torch.inf
    weight[..., [0, 2]] = torch.inf
    grad_y[0, 3, 0, 0] = torch.inf
    grad_x, grad_weight = depthwise_conv_backward(grad_y, x, weight, dilation=7, backend=backend)
    assert_close(grad_x, grad_y * weight[None, :, 0, 1, 1, None, None])
    outside = torch.ones(3, 3, dtype=torch.bool)
    outside[1, 1] = False
    assert not grad_weight[:, 0, outside].any() and grad_weight[3, 0, 1, 1].isinf()


@on_triton
def test_too_many_images_are_a_reason(backend, device):
    x, weight = torch.zeros((1 << 16, 1, 1, 1), device=device), torch.zeros((1, 1, 1, 1), device=device)
    assert "at most 65535 images, and got 65536" in str(dispatch.explain(OP, x, x, weight)[backend])
    assert dispatch.explain(OP, x[1:], x[1:], weight)[backend] is None


@on_each_backend
@pytest.mark.parametrize("stride", [1, 2])
def test_two_runs_agree_bit_for_bit(backend, device, stride):
    inputs = make((2, 40, 20, 21), stride, 3, torch.float32, device)
    first, second = (depthwise_conv_backward(*inputs, stride=stride, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@on_each_backend
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")], ids=str)
def test_weight_of_another_dtype(backend, device, dtypes):
    activation, parameter = (getattr(torch, name) for name in dtypes)
    grad_y, x, weight = make((2, 35, 9, 7), 1, 3, activation, device)
    check((grad_y, x, weight.to(parameter)), 1, 1, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_take_the_reference(dtype):
    inputs = make((1, 16, 6, 5), 1, 3, dtype)
    check(inputs, 1, 2, "reference")
    depthwise_conv_backward(*inputs)
    assert dispatch.last_backend(OP) == "reference"
    with pytest.raises(UserError, match="the CPU kernels take float32 or bfloat16"):
        depthwise_conv_backward(*inputs, backend="native")


@on_each_backend
@on_both_dtypes
@pytest.mark.parametrize("case", [CASES[4], CASES[8], CASES[13]], ids=str)
def test_only_what_is_needed(backend, device, dtype, case):
    shape, stride, dilation, kernel = case
    inputs = make(shape, stride, kernel, dtype, device)

    def run(**needed: bool) -> tuple[Tensor, Tensor]:
        return depthwise_conv_backward(*inputs, stride=stride, dilation=dilation, backend=backend, **needed)

    both, x_alone, weight_alone, nothing = (
        run(),
        run(need_weight=False),
        run(need_x=False),
        run(need_x=False, need_weight=False),
    )
    assert_close(x_alone[0], both[0])
    assert_close(weight_alone[1], both[1])
    assert [t.shape for t in (x_alone[1], weight_alone[0], *nothing)] == [(0,)] * 4


@on_each_backend
def test_any_strides_and_alignment(backend, device):
    grad_y, x, weight = make((2, 40, 14, 12), 1, 3, torch.float32, device)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.contiguous(),
        lambda t: t[:, 3:30, 2:, 1:11],
        lambda t: t.transpose(2, 3),
        lambda t: t[:1].expand(3, -1, -1, -1),
        lambda t: t.flatten()[1 : 1 + 37 * 140].view(1, 14, 10, 37).permute(0, 3, 1, 2),  # not aligned to a vector
    ]
    for view in views:
        g, at = view(grad_y), view(x)
        check((g, at, weight[: at.shape[1]]), 1, 2, backend)
    check((grad_y.contiguous(), x, weight.expand_as(weight)[:1].expand_as(weight)), 1, 1, backend)


def test_conversions_are_counted():
    grad_y, x, weight = make((1, 16, 5, 6), 1, 3, torch.float32)
    before = native.conversions
    depthwise_conv_backward(grad_y, x, weight, backend="native")
    assert native.conversions == before
    depthwise_conv_backward(grad_y.contiguous(), x.contiguous(), weight, backend="native")
    assert native.conversions == before + 2


@on_each_backend
@on_both_dtypes
def test_empty_batch(backend, device, dtype):
    grad_y, x, weight = make((0, 19, 5, 6), 2, 3, dtype, device)
    grad_x, grad_weight = depthwise_conv_backward(grad_y, x, weight, stride=2, backend=backend)
    assert grad_x.shape == x.shape and grad_weight.shape == weight.shape
    assert not grad_weight.any()


@on_both_dtypes
@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_go_where_the_taps_do(instruction_set, dtype, stride, dilation, value):
    """In a corner, whose taps outside must not turn an Inf into NaN, and in a weight that no pixel reaches."""
    for place in range(3):
        inputs = make((1, 18, 4, 5), stride, 3, dtype)
        inputs[place].flatten()[0] = value
        inputs[place][0, 0, -1, -1] = value
        results = depthwise_conv_backward(*inputs, stride=stride, dilation=dilation, backend="native")
        for result, expected in zip(results, by_hand(*inputs, stride, dilation), strict=True):
            torch.testing.assert_close(result.isnan(), expected.isnan())
            torch.testing.assert_close(result.isinf(), expected.isinf())


def by_hand(grad_y: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The definition, for one image: torch's own kernels multiply zeros outside, and turn Inf into NaN there."""
    grad_x, grad_weight = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64)
    height, width = x.shape[2:]
    for i, j in ((i, j) for i in range(grad_y.shape[2]) for j in range(grad_y.shape[3])):
        for a, b in ((a, b) for a in range(3) for b in range(3)):
            h, w = i * stride + dilation * (a - 1), j * stride + dilation * (b - 1)
            if 0 <= h < height and 0 <= w < width:
                g = grad_y[0, :, i, j].double()
                grad_x[0, :, h, w] += g * weight[:, 0, a, b].double()
                grad_weight[:, 0, a, b] += g * x[0, :, h, w].double()
    return grad_x, grad_weight


@pytest.mark.parametrize("case", [((2, 96, 64, 40), 1, 1, 3), ((2, 35, 64, 40), 2, 1, 3), ((2, 35, 32, 40), 1, 1, 5)])
def test_repeatable_with_any_number_of_threads(case):
    if native.load() is None:
        pytest.skip("deeplab_fast._C is not built")
    shape, stride, dilation, kernel = case
    inputs = make(shape, stride, kernel, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(depthwise_conv_backward(*inputs, stride=stride, dilation=dilation, backend="native"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@on_each_backend
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck(backend, device, needed):
    for shape, stride in (((2, 19, 6, 7), 2), ((1, 16, 3, 1), 1), ((1, 1, 1, 3), 1)):
        inputs = make(shape, stride, 3, torch.float32, device)
        torch.library.opcheck(CALL, (*inputs, stride, 1, *needed, backend))


class Convolution(torch.autograd.Function):
    """A forward for the gradient under test."""

    @staticmethod
    def forward(ctx, x, weight, stride, dilation):
        ctx.save_for_backward(x, weight)
        ctx.window = stride, dilation
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad_y):
        return *CALL(grad_y, *ctx.saved_tensors, *ctx.window, True, True, "reference"), None, None


@pytest.mark.parametrize("case", [((2, 2, 5, 4), 1, 2, 3), ((1, 2, 5, 6), 2, 1, 3)])
def test_gradcheck_of_the_reference(case):
    shape, stride, dilation, kernel = case
    _, x, weight = make(shape, stride, kernel, torch.float64)
    assert torch.autograd.gradcheck(Convolution.apply, (x.requires_grad_(), weight.requires_grad_(), stride, dilation))


@on_each_backend
def test_a_second_derivative_raises(backend, device):
    inputs = make((1, 16, 5, 5), 1, 3, torch.float32, device)
    for i in range(3):
        asking = [t.detach().requires_grad_(i == place) for place, t in enumerate(inputs)]
        grad_x, grad_weight = depthwise_conv_backward(*asking, backend=backend)
        with pytest.raises(RuntimeError, match="depthwise_conv_backward has no second derivative"):
            (grad_x.sum() + grad_weight.sum()).backward()


def test_compile_and_export_hold_one_op_and_name_no_backend():
    class Gradients(torch.nn.Module):
        def forward(self, grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return depthwise_conv_backward(grad_y, x, weight, stride=2)

    inputs = make((2, 19, 6, 7), 2, 3, torch.float32)
    expected = Gradients()(*inputs)
    compiled = torch.compile(Gradients(), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*inputs), expected))
    exported = torch.export.export(Gradients(), inputs)
    calls = [n for n in exported.graph.nodes if n.op == "call_function" and "deeplab_fast" in str(n.target)]
    assert [(call.target, call.args[-1]) for call in calls] == [(CALL, "auto")]
    assert all(map(torch.equal, exported.module()(*inputs), expected))


def test_rejects_what_is_no_gradient_of_a_depthwise_convolution():
    grad_y, x, weight = make((2, 4, 6, 7), 2, 3, torch.float32)
    run = depthwise_conv_backward
    with pytest.raises(ValueError, match=r"x is \(4, 6, 7\); expected \(N, C, H, W\)"):
        run(grad_y, x[0], weight, stride=2)
    with pytest.raises(ValueError, match=r"x is \(2, 4, 0, 7\); expected .* at least one channel and pixel"):
        run(grad_y, x[:, :, :0], weight, stride=2)
    for wrong in (weight[:3], weight[..., :2], weight[..., :2, :2], weight[0], weight.expand(4, 2, 3, 3)):
        with pytest.raises(ValueError, match=rf"weight is \({wrong.shape[0]}, .*; expected \(4, 1, k, k\) with an odd"):
            run(grad_y, x, wrong, stride=2)
    with pytest.raises(ValueError, match="stride is 0 and dilation 1; expected at least 1"):
        run(grad_y, x, weight, stride=0)
    with pytest.raises(ValueError, match="stride is 2 and dilation -1; expected at least 1"):
        run(grad_y, x, weight, stride=2, dilation=-1)
    with pytest.raises(ValueError, match=r"grad_y is \(2, 4, 3, 4\); expected \(2, 4, 6, 7\) for the stride 1"):
        run(grad_y, x, weight)
    with pytest.raises(ValueError, match="grad_y is torch.bfloat16, x torch.float32 and weight torch.float32"):
        run(grad_y.bfloat16(), x, weight, stride=2)
    with pytest.raises(ValueError, match="weight torch.int64; expected floating types"):
        run(grad_y, x, weight.long(), stride=2)
    with pytest.raises(ValueError, match="grad_y is on cpu, x on cpu and weight on meta"):
        run(grad_y, x, weight.to("meta"), stride=2)
    with pytest.raises(UserError, match="has no backend 'cudnn'; it has native, triton, reference"):
        run(grad_y, x, weight, stride=2, backend="cudnn")


def test_the_reference_agrees_with_autograd_in_fp64():
    inputs = make((2, 3, 7, 8), 2, 3, torch.float64)
    for result, expected in zip(
        depthwise_conv_backward_reference(*inputs, 2, 1, True, True), autograd(*inputs, 2, 1), strict=True
    ):
        assert_close(result, expected)


# (N, C, H, W), stride, dilation, dtype of x, dtype of weight
LAUNCHES = [
    ((4, 2048, 32, 32), 1, 12, torch.bfloat16, torch.bfloat16),
    ((4, 2048, 32, 32), 1, 12, torch.float16, torch.float32),
    ((2, 960, 33, 33), 1, 2, torch.bfloat16, torch.bfloat16),
    ((2, 960, 33, 33), 1, 2, torch.float32, torch.float32),
    ((8, 96, 129, 129), 2, 1, torch.bfloat16, torch.bfloat16),
    ((8, 24, 65, 65), 1, 1, torch.bfloat16, torch.bfloat16),  # 8 divides its channels, 16 does not
]


def launched(
    chip: int,
    shape: tuple[int, ...],
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    of_weight: torch.dtype,
    k: int = 3,
) -> list[Compiled]:
    from deeplab_fast.kernels import depthwise_conv_backward as kernels

    out = (*shape[:2], *((size - 1) // stride + 1 for size in shape[2:]))
    layout = {"dtype": dtype, "memory_format": torch.channels_last}
    grad_y, x, grad_x = torch.empty(out, **layout), torch.empty(shape, **layout), torch.empty(shape, **layout)
    weight, grad_weight = (torch.empty((shape[1], 1, k, k), dtype=of_weight) for _ in range(2))
    given = grad_y, x, weight, grad_x, grad_weight, stride, dilation
    return compile_launches(chip, lambda: kernels.depthwise_conv_backward(*given))


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip):
    for case in LAUNCHES:
        (kernel,) = launched(chip, *case)
        assert kernel.name == "_chains"
        check_compiled(kernel)
    for kernel in launched(chip, (2, 64, 33, 33), 1, 1, torch.bfloat16, torch.bfloat16, k=5):
        assert kernel.name in ("gather", "_products")
        check_compiled(kernel)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 8, 1, 37), (1, 5, 41, 1)], ids=str)
def test_compiles_for_sizes_of_one(shape):
    """Triton makes constants of them."""
    for stride, dilation, k in ((1, 1, 3), (2, 1, 3), (1, 6, 3), (2, 1, 1), (1, 1, 5)):
        launched(90, shape, stride, dilation, torch.float32, torch.float32, k)


@needs_compiler
def test_offsets_of_images_have_64_bits():
    (kernel,) = launched(90, *LAUNCHES[0])
    check_image_index(kernel)

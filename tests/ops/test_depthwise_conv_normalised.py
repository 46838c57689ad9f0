from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from deeplab_fast import ops
from deeplab_fast.errors import UserError
from deeplab_fast.ops import depthwise_conv_normalised, dispatch, gpu, native
from deeplab_fast.ops.depthwise_conv_normalised import (
    depthwise_conv_normalised_backward_reference,
    depthwise_conv_normalised_reference,
)
from deeplab_fast.testing import assert_close, backends, tolerances
from tests.ahead_of_time import CHIPS, Compiled, compile_launches, needs_compiler
from tests.depthwise_checks import check_compiled, check_image_index, several_tiles_and_pieces

OP = "depthwise_conv_normalised"
CALL = torch.ops.deeplab_fast.depthwise_conv_normalised.default
BACKWARD = torch.ops.deeplab_fast.depthwise_conv_normalised_backward.default
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
on_triton = pytest.mark.parametrize("backend, device", [case for case in backends(OP) if case.values[0] == "triton"])
on_our_kernels = pytest.mark.parametrize("backend, device", [c for c in backends(OP) if c.values[0] != "reference"])
on_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
needs_native = pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")

# (N, C, H, W), stride, dilation, kernel
CASES = [
    ((2, 1, 1, 1), 1, 1, 3),  # one pixel: the tap in the middle alone
    ((2, 16, 1, 37), 1, 1, 3),  # one row of several chains
    ((2, 16, 7, 1), 2, 1, 3),  # one column
    ((3, 3, 5, 6), 1, 1, 3),  # less than a vector of channels
    ((2, 17, 9, 11), 1, 1, 3),  # a vector and a rest
    ((2, 32, 33, 30), 1, 1, 3),  # rows in several blocks, which cross images
    ((1, 150, 8, 9), 1, 2, 3),  # several blocks of channels and a rest
    ((2, 32, 9, 12), 2, 1, 3),
    ((1, 35, 10, 7), 2, 1, 3),
    ((1, 19, 11, 13), 1, 4, 3),  # phases of different lengths
    ((1, 16, 5, 7), 1, 100, 3),  # dilation far above the image
    ((2, 17, 9, 8), 2, 2, 3),  # pixels of x that no tap reaches
    ((1, 48, 9, 8), 3, 2, 5),
    ((1, 24, 6, 9), 2, 1, 1),
    ((1, 600, 6, 5), 1, 1, 3),
]


def make(
    shape: tuple[int, ...], kernel: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, conv_weight, the statistics of x, weight and bias: a third of z is below 0, and some of it above 6."""
    generator = torch.Generator().manual_seed(0)
    c, wide = shape[1], torch.promote_types(dtype, torch.float32)
    x = (2 * torch.randn(shape, generator=generator) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    conv_weight = (torch.randn((c, 1, kernel, kernel), generator=generator) / kernel).to(dtype)
    weight = (torch.rand(c, generator=generator) * 3 + 1).to(wide)
    bias = (torch.randn(c, generator=generator) + 1).to(wide)
    mean, var = x.to(wide).mean((0, 2, 3)), x.to(wide).var((0, 2, 3), correction=0)
    return tuple(t.to(device) for t in (x, conv_weight, mean, var, weight, bias))


def gradient_of(shape: tuple[int, ...], stride: int, like: Tensor) -> Tensor:
    size = (*shape[:2], *((s - 1) // stride + 1 for s in shape[2:]))
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


def close_in_norm(actual: Tensor, expected: Tensor) -> None:
    """Long sums, in which terms cancel: against their own size."""
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    assert error <= 2 * tolerances(actual.dtype)[0] * size + 1e-6, f"{error} of {size}"


def check(case: tuple, dtype: torch.dtype, activation: str, backend: str, device: str = "cpu") -> None:
    shape, stride, dilation, kernel = case
    given = make(shape, kernel, dtype, device)
    how = {"activation": activation, "stride": stride, "dilation": dilation}
    exact = [t.double() for t in given]
    y, mean, var = depthwise_conv_normalised(*given, backend=backend, **how)
    assert dispatch.last_backend(OP) == backend
    expected = depthwise_conv_normalised_reference(*exact, 1e-5, activation, stride, dilation)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected[0])
    assert_close(mean, y.double().mean((0, 2, 3)))
    assert_close(var, y.double().var((0, 2, 3), correction=0))

    grad = gradient_of(shape, stride, given[0])
    rest = (1e-5, activation, stride, dilation)
    found = BACKWARD(grad, *given, *rest, backend)
    expected = depthwise_conv_normalised_backward_reference(grad.double(), *exact, *rest)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(found[0], expected[0])
    for ours, theirs, like in zip(found, expected, (given[0], given[1], *given[4:]), strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        close_in_norm(ours, theirs)


@on_each_backend
@on_both_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(backend, device, dtype, case):
    check(case, dtype, "relu6", backend, device)


@on_each_backend
@on_both_dtypes
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_each_activation(backend, device, dtype, activation):
    check(((2, 35, 9, 10), 1, 1, 3), dtype, activation, backend, device)
    check(((2, 35, 9, 10), 2, 1, 3), dtype, activation, backend, device)


@on_triton
@pytest.mark.parametrize("case", [CASES[4], CASES[8], CASES[12]], ids=str)
def test_fp16(backend, device, case):
    check(case, torch.float16, "relu6", backend, device)


@on_triton
@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 5), (2, 1), (2, 6), (3, 2)])
def test_programs_of_several_tiles_and_pieces(backend, device, stride, dilation):
    with several_tiles_and_pieces():
        for shape in ((1, 9, 23, 20), (1, 24, 5, 200)):
            check((shape, stride, dilation, 3), torch.float32, "relu6", backend, device)


@on_both_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(instruction_set, dtype, case):
    check(case, dtype, "relu6", "native")


@on_both_dtypes
def test_result_larger_than_a_cache(instruction_set, dtype):
    """Written around the cache where lines of it are whole."""
    for channels in (128, 136):
        check(((1, channels, 130, 131), 1, 1, 3), dtype, "relu6", "native")


@on_each_backend
@on_both_dtypes
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_gradients_are_those_of_three_layers(backend, device, dtype, stride, dilation):
    """torch's batch norm in training, activation and convolution, in fp64: their statistics are differentiated."""
    shape = (3, 20, 9, 8)
    x, conv_weight, mean, var, weight, bias = make(shape, 3, dtype, device)
    leaves = [t.clone().requires_grad_() for t in (x, conv_weight, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, *_ = depthwise_conv_normalised(
        *(leaves[0], leaves[1], mean, var, leaves[2], leaves[3]),
        **{"activation": "relu6", "stride": stride, "dilation": dilation, "backend": backend},
    )
    z = torch.nn.functional.relu6(torch.nn.functional.batch_norm(exact[0], None, None, *exact[2:], training=True))
    plain = torch.nn.functional.conv2d(z, exact[1], None, stride, dilation, dilation, groups=20)
    grad = gradient_of(shape, stride, y)
    found = torch.autograd.grad(y, leaves, grad)
    for ours, theirs in zip(found, torch.autograd.grad(plain, exact, grad.double()), strict=True):
        close_in_norm(ours, theirs)


@on_our_kernels
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_padding_is_of_the_activated_input(backend, device, activation):
    """A bias of 5 would show at the border."""
    c = 16
    x, ones = torch.zeros(1, c, 4, 4, device=device), torch.ones(c, device=device)
    given = x, torch.ones(c, 1, 3, 3, device=device), 0 * ones, ones, ones, 5 * ones
    y, *_ = depthwise_conv_normalised(*given, activation=activation, backend=backend)
    torch.testing.assert_close(y[0, 0, 0].cpu(), torch.tensor([20.0, 30.0, 30.0, 20.0]))


@on_each_backend
def test_statistics_far_from_zero(backend, device):
    x, conv_weight, mean, var, weight, bias = make((2, 20, 9, 8), 3, torch.float32, device)
    given = (x + 100, conv_weight, mean + 100, var, weight, bias)
    y, *_ = depthwise_conv_normalised(*given, activation="relu6", backend=backend)
    exact = depthwise_conv_normalised_reference(*(t.double() for t in given), 1e-5, "relu6")[0]
    assert (y.double() - exact).abs().max() < 1e-3


@on_each_backend
def test_any_strides(backend, device):
    given = list(make((2, 40, 14, 12), 3, torch.float32, device))
    expected = depthwise_conv_normalised(*given, backend=backend)
    given[0] = given[0].contiguous()
    given[1] = torch.stack([given[1], given[1]], -1)[..., 0]
    given[2:] = [torch.stack([t, t], -1)[..., 0] for t in given[2:]]
    assert all(map(torch.equal, depthwise_conv_normalised(*given, backend=backend), expected))
    grad = gradient_of((2, 40, 14, 12), 1, given[0])
    rest = (1e-5, "relu", 1, 1, backend)
    packed = [t.contiguous(memory_format=torch.channels_last) for t in (grad, given[0])]
    expected = BACKWARD(*packed, *given[1:], *rest)
    assert all(map(torch.equal, BACKWARD(grad, *given, *rest), expected))


@on_each_backend
@on_both_dtypes
def test_empty_batch(backend, device, dtype):
    given = make((0, 19, 5, 6), 3, dtype, device)
    assert given[3].isnan().all()  # as an empty batch's statistics are
    y, mean, var = depthwise_conv_normalised(*given, stride=2, backend=backend)
    assert y.shape == (0, 19, 3, 3) and mean.isnan().all() and var.isnan().all()
    grad_z, grad_weight, *sums = BACKWARD(y, *given, 1e-5, "relu6", 2, 1, backend)
    assert grad_z.shape == given[0].shape and not any(t.any() for t in (grad_weight, *sums))


@needs_native
@on_both_dtypes
def test_two_runs_agree_bit_for_bit_and_gradients_with_any_number_of_threads(dtype):
    given = make((2, 96, 40, 41), 3, dtype)
    grad = gradient_of((2, 96, 40, 41), 1, given[0])
    before, gradients = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            first, second = (depthwise_conv_normalised(*given, activation="relu", backend="native") for _ in range(2))
            assert all(map(torch.equal, first, second))
            gradients.append(BACKWARD(grad, *given, 1e-5, "relu", 1, 1, "native"))
    finally:
        torch.set_num_threads(before)
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


@on_triton
def test_two_runs_agree_bit_for_bit(backend, device):
    for stride, kernel in ((1, 3), (2, 3), (1, 5)):
        given = make((2, 40, 20, 21), kernel, torch.float32, device)
        grad = gradient_of((2, 40, 20, 21), stride, given[0])
        rest = (1e-5, "relu6", stride, 1, backend)
        first, second = ((*CALL(*given, *rest), *BACKWARD(grad, *given, *rest)) for _ in range(2))
        assert all(map(torch.equal, first, second))


@on_our_kernels
def test_not_a_number_stays(backend, device):
    x, *rest = make((1, 18, 6, 7), 3, torch.float32, device)
    x[0, 3, 2, 2] = torch.nan
    y, mean, _ = depthwise_conv_normalised(x, *rest, activation="relu6", backend=backend)
    assert y[0, 3].isnan().sum() == 9 and not y[0, :3].isnan().any() and mean.isnan().sum() == 1
    sums = BACKWARD(torch.ones_like(x), x, *rest, 1e-5, "relu6", 1, 1, backend)[1:]
    assert sums[0][3].isnan().any() and sums[2][3].isnan() and not sums[2][:3].isnan().any()


@needs_native
def test_keeps_x_alone():
    x, conv_weight, mean, var, weight, bias = make((2, 32, 12, 12), 3, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        depthwise_conv_normalised(
            x.requires_grad_(), conv_weight.requires_grad_(), mean, var, weight.requires_grad_(), bias, backend="native"
        )
    assert set(kept) == {t.data_ptr() for t in (x, conv_weight, mean, var, weight, bias)}


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("stride, dilation", [(1, 2), (2, 1)])
def test_gradcheck(activation, stride, dilation):
    x, conv_weight, _, _, weight, bias = make((2, 2, 4, 5), 3, torch.float64)

    def run(*given: Tensor) -> Tensor:
        z, convolution, gamma, beta = given
        mean, var = ops.batch_norm_statistics(z)
        window = {"stride": stride, "dilation": dilation}
        # The op itself, whose gradient is written by hand: the public function would record the reference's steps.
        channels = (mean.detach(), var.detach(), gamma, beta)
        return CALL(z, convolution, *channels, 1e-5, activation, *window.values(), "reference")[0]

    inputs = [t.requires_grad_() for t in (x, conv_weight, weight, bias)]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


@on_each_backend
def test_opcheck(backend, device):
    for shape, stride in (((2, 19, 6, 7), 2), ((1, 16, 3, 1), 1), ((2, 1, 1, 3), 1)):
        given = make(shape, 3, torch.float32, device)
        rest = (1e-5, "relu6", stride, 1, backend)
        grad = gradient_of(shape, stride, given[0])
        torch.library.opcheck(BACKWARD, (grad, *given, *rest))
        for i in (0, 1, 4, 5):
            given[i].requires_grad_()
        torch.library.opcheck(CALL, (*given, *rest))


def test_a_second_derivative_raises():
    given = make((1, 16, 5, 5), 3, torch.float32)
    grad = gradient_of((1, 16, 5, 5), 1, given[0]).requires_grad_()
    found = BACKWARD(grad, *given, 1e-5, "relu", 1, 1, "auto")
    with pytest.raises(RuntimeError, match="depthwise_conv_normalised_backward has no second derivative"):
        found[0].sum().backward()


@needs_native
def test_autocast_casts_x_and_not_the_statistics():
    given = make((2, 16, 5, 6), 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, _ = depthwise_conv_normalised(*given, activation="relu6")
    half = [t.bfloat16() for t in given[:2]]
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32
    assert torch.equal(y, depthwise_conv_normalised(*half, *given[2:], activation="relu6")[0])


def test_other_dtypes_take_the_reference():
    given = make((2, 16, 5, 6), 3, torch.float64)
    assert depthwise_conv_normalised(*given)[1].dtype == torch.float64
    assert dispatch.last_backend(OP) == "reference"
    with pytest.raises(UserError, match="the CPU kernels take float32 or bfloat16"):
        depthwise_conv_normalised(*given, backend="native")


def test_rejects_wrong_inputs():
    x, conv_weight, *channels = make((2, 4, 6, 7), 3, torch.float32)
    run = depthwise_conv_normalised
    with pytest.raises(ValueError, match=r"x is \(4, 6, 7\) of torch.float32; expected a floating \(N, C, H, W\)"):
        run(x[0], conv_weight, *channels)
    for wrong in (conv_weight[:3], conv_weight[..., :2], conv_weight[0], conv_weight.double()):
        with pytest.raises(ValueError, match=r"conv_weight is .*; expected torch.float32 \(4, 1, k, k\) with an odd k"):
            run(x, wrong, *channels)
    with pytest.raises(ValueError, match="stride is 0 and dilation 1; expected at least 1"):
        run(x, conv_weight, *channels, stride=0)
    with pytest.raises(ValueError, match="activation is 'swish'; expected one of none, relu, relu6"):
        run(x, conv_weight, *channels, activation="swish")
    for place, name in enumerate(("mean", "var", "weight", "bias")):
        for wrong in (channels[place][:3], channels[place].double()):
            mixed = [*channels[:place], wrong, *channels[place + 1 :]]
            with pytest.raises(ValueError, match=rf"{name} is .*; expected torch.float32 \(4,\)"):
                run(x, conv_weight, *mixed)
    with pytest.raises(ValueError, match="bias is on meta and x on cpu"):
        run(x, conv_weight, *channels[:3], channels[3].to("meta"))


@pytest.mark.parametrize("name", [OP, f"{OP}_backward"])
def test_auto_on_a_gpu_is_the_reference_until_one_has_timed_more(name, monkeypatch):
    monkeypatch.setattr(gpu, "device_why_not", lambda device: None)
    with dispatch.requesting(""), FakeTensorMode():
        given = dispatch.OPS[name].example(torch.device("cuda"))
        assert dispatch.explain(name, *given)["triton"] is None
        assert not ops.has_kernel(name, given[0]) and dispatch.choose(name, list(given)) == "reference"
    with dispatch.requesting("triton"), FakeTensorMode():
        assert ops.has_kernel(name, given[0]) and dispatch.choose(name, list(given)) == "triton"


@on_triton
def test_too_many_images_are_a_reason(backend, device):
    x = torch.zeros((1 << 16, 1, 1, 1), device=device)
    given = x, torch.zeros((1, 1, 1, 1), device=device)
    for name, images in ((OP, (x,)), (f"{OP}_backward", (x, x))):
        assert "at most 65535 images, and got 65536" in str(dispatch.explain(name, *images, given[1])[backend])
        assert dispatch.explain(name, *(t[1:] for t in images), given[1])[backend] is None


# (N, C, H, W), stride, dilation, dtype: MobileNetV2's blocks, crops of 769 x 769, output stride 16, at most 200 MB
LAUNCHES = [
    ((6, 96, 385, 385), 2, 1, torch.bfloat16),
    ((8, 144, 193, 193), 1, 1, torch.bfloat16),
    ((8, 960, 49, 49), 1, 2, torch.float32),
    ((8, 144, 193, 193), 2, 1, torch.float32),
    ((8, 192, 97, 97), 2, 1, torch.float16),
    ((8, 384, 49, 49), 1, 1, torch.bfloat16),
    ((8, 576, 49, 49), 1, 1, torch.float16),
    ((8, 960, 49, 49), 1, 2, torch.bfloat16),
]
MOST_REGISTERS = 2  # of them, at the front: for chips on which the others would take minutes to show no more


def launched(chip: int, shape: tuple[int, ...], stride: int, dilation: int, dtype: torch.dtype,
             kernel: int = 3, activation: str = "relu6") -> list[Compiled]:  # fmt: skip
    from deeplab_fast.kernels import depthwise_conv, depthwise_conv_backward

    out = (*shape[:2], *((size - 1) // stride + 1 for size in shape[2:]))
    layout = {"dtype": dtype, "memory_format": torch.channels_last}
    grad_y, x, grad_z = torch.empty(out, **layout), torch.empty(shape, **layout), torch.empty(shape, **layout)
    weight, grad_weight = (torch.empty((shape[1], 1, kernel, kernel), dtype=dtype) for _ in range(2))
    norm = depthwise_conv.Norm(*(torch.empty(shape[1]) for _ in range(4)), 1e-5, activation)
    window = stride, dilation

    def run() -> None:
        depthwise_conv.depthwise_conv_statistics(x, weight, *window, norm)
        given = grad_y, x, weight, norm, grad_z, grad_weight
        depthwise_conv_backward.depthwise_conv_normalised_backward(*given, *window)

    return compile_launches(chip, run)


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip):
    for case in LAUNCHES if chip == 90 else LAUNCHES[:MOST_REGISTERS]:
        found = launched(chip, *case)
        assert {kernel.name for kernel in found} == {"_rows", "_merge", "_chains"}
        for kernel in found:
            check_compiled(kernel)
    found = launched(chip, (2, 64, 33, 33), 1, 1, torch.bfloat16, 5)
    assert {kernel.name for kernel in found} == {"gather", "_merge", "_products"}
    for kernel in found:
        check_compiled(kernel)


@needs_compiler
@pytest.mark.parametrize(
    "activation, shape", [("none", (1, 1, 1, 1)), ("relu", (2, 8, 1, 37)), ("relu6", (1, 5, 41, 1))]
)
def test_compiles_for_sizes_of_one(activation, shape):
    """Triton makes constants of them."""
    for stride, dilation, kernel in ((1, 1, 3), (2, 1, 3), (1, 6, 3), (2, 1, 1), (1, 1, 5)):
        launched(90, shape, stride, dilation, torch.float32, kernel, activation)


@needs_compiler
def test_offsets_of_images_have_64_bits():
    for case in (LAUNCHES[0], LAUNCHES[1]):
        for kernel in launched(90, *case):
            if kernel.name != "_merge":
                check_image_index(kernel)

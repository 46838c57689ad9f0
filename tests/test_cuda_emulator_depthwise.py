"""csrc/cuda/depthwise_conv.cu on the host: see test_cuda_emulator.py. The reference is the op's, in fp64."""

from __future__ import annotations

import ctypes
import importlib
import itertools

import pytest
import torch
from torch import Tensor

from deeplab_fast.ops import native
from deeplab_fast.ops.depthwise_conv import depthwise_conv_reference
from deeplab_fast.ops.native import ACTIVATIONS, CUDA_FLOAT_DTYPES
from deeplab_fast.testing import assert_close
from tests.ops.test_depthwise_conv import tensors, wide
from tests.test_cuda_emulator import STREAM, call, configure, emulate, launch_of, pointer
from tests.test_cuda_emulator import pytestmark as needs_compiler

pytestmark = needs_compiler
OP = "depthwise_conv"
op = importlib.import_module("deeplab_fast.ops.depthwise_conv")  # the function has its name
GUARD = 32  # elements on both sides of a result that nobody may write
in_each_dtype = pytest.mark.parametrize("dtype", CUDA_FLOAT_DTYPES, ids=str)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulate(tmp_path_factory.mktemp("emulated"), OP)


def addresses(*tensors: Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def planned(library: ctypes.CDLL, x: Tensor, kernel: int, stride: int, dilations: list[int]) -> dict[str, int]:
    values = (ctypes.c_int64 * 6)()
    rates = addresses(*[None] * 4 * len(dilations))
    library.planned(*arguments(x, kernel, stride), len(dilations), rates, integers(dilations), values)
    return dict(zip(("parts", "tiled", "blocks", "vectors", "columns", "rows"), values, strict=True))


def integers(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def arguments(x: Tensor, kernel: int, stride: int) -> tuple[object, ...]:
    n, c, h, w = x.shape
    return pointer(x), CUDA_FLOAT_DTYPES.index(x.dtype), integers([n, h, w, c, kernel, stride])


def convolve(
    library: ctypes.CDLL,
    x: Tensor,
    rates: list[tuple[Tensor, Tensor | None, Tensor | None, int]],
    stride: int = 1,
    activation: str = "none",
    statistics: bool = False,
    multiprocessors: int = 2,
) -> list[Tensor]:
    """One result for each of (weight, scale, shift, dilation), or the result, mean and variance of the only one.

    Runs with the threads in both orders, with guards around each result and in memory that holds NaN.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    size = (n, -(-h // stride), -(-w // stride), c)
    kernel, dilations = rates[0][0].shape[-1], [rate[3] for rate in rates]
    weights = [rate[0].contiguous() for rate in rates]
    runs = []
    for descending in (0, 1):
        configure(library, multiprocessors=multiprocessors, descending=descending)
        count = torch.Size(size).numel()
        memory = [torch.full((count + 2 * GUARD,), torch.nan, dtype=x.dtype) for _ in rates]
        inner = [m[GUARD : GUARD + count] for m in memory]
        given = [(weight, *rate[1:3], y) for weight, rate, y in zip(weights, rates, inner, strict=True)]
        parts = planned(library, x, kernel, stride, dilations)["parts"]
        moments = [torch.full(s, torch.nan) for s in ((c,), (c,), (parts,), (parts, c), (parts, c))]
        call(
            library, OP, *arguments(x, kernel, stride), ACTIVATIONS.index(activation), len(rates),
            addresses(*(t for rate in given for t in rate)), integers(dilations),
            addresses(*moments) if statistics else None,
        )  # fmt: skip
        assert all(m[:GUARD].isnan().all() and m[GUARD + count :].isnan().all() for m in memory)
        runs.append([y.view(size).permute(0, 3, 1, 2) for y in inner] + (moments[:2] if statistics else []))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    return runs[0]


def check(library: ctypes.CDLL, given: list[Tensor], stride: int, dilation: int, activation: str = "relu") -> None:
    x, *rest = given
    (y,) = convolve(library, x, [(*rest, dilation)], stride, activation)
    assert_close(y, depthwise_conv_reference(*wide(given), stride, dilation, activation))
    y, mean, variance = convolve(library, x, [(rest[0], None, None, dilation)], stride, statistics=True)
    assert_close(y, depthwise_conv_reference(x.double(), rest[0].double(), None, None, stride, dilation))
    assert_close(mean, y.double().mean((0, 2, 3)))
    assert_close(variance, y.double().var((0, 2, 3), correction=0))


SHAPES = [
    (1, 8, 1, 1),
    (2, 16, 1, 37),
    (1, 24, 41, 1),
    (2, 40, 13, 9),  # 5 vectors of 8: the groups of 4 channels and of 8 differ
    (1, 152, 9, 35),
    (1, 16, 40, 50),
]


@in_each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles(library, shape, stride, dtype):
    """Chains of every kind: one, whole ones, parts of one, of one row alone."""
    dilations = (1, 6, 60) if dtype == torch.float16 else (1, 2, 3, 5, 6, 12, 18, 60)
    for dilation in dilations:
        given = tensors(shape, 3, dtype)
        check(library, given, stride, dilation)
        least = min(shape[2:]) > dilation
        if stride == 1 or (stride == 2 and dilation in (1, 2, 6, 12) and least):
            assert planned(library, given[0], 3, stride, [dilation])["tiled"]


@in_each_dtype
@pytest.mark.parametrize(
    "shape, kernel, stride, dilation",
    [
        ((2, 17, 9, 11), 3, 1, 2),  # channels that no vector divides
        ((1, 24, 12, 13), 3, 2, 3),
        ((1, 24, 12, 13), 3, 3, 1),
        ((1, 16, 9, 11), 5, 1, 2),
        ((1, 40, 20, 17), 1, 2, 1),
        ((2, 3, 40, 30), 7, 2, 9),
    ],
    ids=str,
)  # fmt: skip
def test_any_other_geometry(library, shape, kernel, stride, dilation, dtype):
    given = tensors(shape, kernel, dtype)
    assert not planned(library, given[0], kernel, stride, [dilation])["tiled"]
    for activation in ACTIVATIONS:
        check(library, given, stride, dilation, activation)


@in_each_dtype
def test_affine_and_activation(library, dtype):
    x, weight, scale, shift = tensors((1, 24, 9, 11), 3, dtype)
    for activation, affine in itertools.product(ACTIVATIONS, ((None, None), (3 * scale, 3 * shift), (scale, None))):
        (y,) = convolve(library, x, [(weight, *affine, 2)], 1, activation)
        assert_close(y, depthwise_conv_reference(x.double(), weight.double(), *affine, 1, 2, activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dilations", [[6, 12, 18], [1, 40], [3, 3, 2]], ids=str)
def test_rates(library, dilations, dtype):
    given = [tensors((2, 72, 20, 33), 3, dtype, seed) for seed in range(len(dilations))]
    rates = [(*g[1:], d) for g, d in zip(given, dilations, strict=True)]
    x = given[0][0]
    results = convolve(library, x, rates, activation="relu6")
    assert launch_of(library)["launches"] == 1
    for y, (weight, scale, shift, dilation) in zip(results, rates, strict=True):
        assert_close(y, depthwise_conv_reference(*wide([x, weight, scale, shift]), 1, dilation, "relu6"))


@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 3), (1, 8), (2, 1), (2, 4)])
def test_results_do_not_depend_on_the_cut(library, stride, dilation):
    """Few blocks of many rows and many of few; the columns of a chain end in two tiles."""
    x, *rest = tensors((1, 64, 70, 70), 3, torch.bfloat16)
    results = []
    for multiprocessors in (1, 20):
        configure(library, multiprocessors=multiprocessors)
        results.append(convolve(library, x, [(*rest, dilation)], stride, "relu", multiprocessors=multiprocessors)[0])
        plan = planned(library, x, 3, stride, [dilation])
        assert plan["columns"] < -(-70 // stride)
        results.append(torch.tensor(plan["rows"]))
    assert results[1] > results[3] and torch.equal(results[0], results[2])


def test_blocks_of_the_networks_shapes(library):
    """Threads without a result, and rows that are read twice, are few."""
    shapes = [(16, 2048, 32, 32), (1, 2048, 64, 128), (8, 2048, 64, 128), (1, 2048, 33, 33), (8, 304, 128, 256)]
    configure(library, multiprocessors=132)
    for (n, c, h, w), dilation in itertools.product(shapes, (1, 6, 12, 18)):
        x = torch.empty((n, 1, h, w), dtype=torch.bfloat16).expand(-1, c, -1, -1)
        plan = planned(library, x, 3, 1, [dilation])
        threads = plan["blocks"] * plan["vectors"] * plan["columns"] * plan["rows"]
        assert plan["tiled"] and n * c * h * w // 8 > 0.75 * threads
        assert plan["vectors"] * plan["columns"] > 0.9 * 128 and plan["blocks"] >= 132 * 2


@pytest.mark.parametrize("shape, dilation", [((1, 16, 5, 30), 5), ((1, 16, 30, 5), 5), ((1, 16, 5, 6), 60)], ids=str)
def test_taps_outside_for_every_pixel_are_not_computed(library, shape, dilation):
    """Infinite weights there would make NaN of the zeros outside."""
    x, weight, scale, shift = tensors(shape, 3, torch.float32)
    inside = weight.clone()
    if shape[2] <= dilation:
        weight[:, :, [0, 2]], inside[:, :, [0, 2]] = torch.inf, 0
    if shape[3] <= dilation:
        weight[..., [0, 2]], inside[..., [0, 2]] = torch.inf, 0
    (y,) = convolve(library, x, [(weight, scale, shift, dilation)])
    assert_close(y, depthwise_conv_reference(*wide([x, inside, scale, shift]), 1, dilation))


@in_each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_reach_their_neighbours_only(library, activation, dtype):
    x, weight, scale, shift = tensors((1, 40, 9, 40), 3, dtype)
    x[0, 3, 4, 20] = torch.nan
    x[0, 7, 0, 0] = torch.inf
    x[0, 34, 8, 39], x[0, 34, 8, 38] = -torch.inf, torch.inf
    (y,) = convolve(library, x, [(weight, scale, shift, 2)], activation=activation)
    expected = depthwise_conv_reference(*wide([x, weight, scale, shift]), 1, 2, activation)
    assert torch.equal(y.isnan(), expected.isnan()) and expected.isnan().sum() >= 9
    assert torch.equal(y.isinf(), expected.isinf())
    assert_close(y[expected.isfinite()], expected[expected.isfinite()])


def test_statistics_where_the_mean_is_large(library):
    for channels in (24, 17):
        x, weight, *_ = tensors((2, channels, 40, 41), 3, torch.float32)
        y, mean, variance = convolve(library, x + 1000, [(weight.abs(), None, None, 2)], statistics=True)
        assert_close(mean, y.double().mean((0, 2, 3)))
        assert_close(variance, y.double().var((0, 2, 3), correction=0))


def test_what_is_not_aligned_takes_the_other_kernel(library):
    x, weight, scale, shift = tensors((1, 16, 9, 10), 3, torch.float32)
    memory = torch.empty(x.numel() + 1)
    moved = torch.as_strided(memory, x.shape, (x.numel(), 1, 160, 16), 1).copy_(x)
    assert not planned(library, moved, 3, 1, [1])["tiled"]
    assert planned(library, memory[:-1].view_as(x), 3, 1, [1])["tiled"]
    configure(library)
    y = torch.empty_like(moved)
    rate = addresses(weight, scale, shift, y)
    call(library, OP, *arguments(moved, 3, 1), 0, 1, rate, integers([2]), None)
    assert_close(y, depthwise_conv_reference(*wide([x, weight, scale, shift]), 1, 2))


def test_offsets_beyond_32_bits(library):
    """The last block, all rows of which lie beyond 2^32 bytes, in memory of which only its pages are touched."""
    size = (1, 8, (1 << 14) + (1 << 8), 1 << 14)
    x = torch.empty(size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    _, weight, scale, shift = tensors((1, 8, 1, 1), 3, torch.bfloat16)
    configure(library)
    plan = planned(library, x, 3, 1, [1])
    rows, columns = plan["rows"], plan["columns"]
    assert (size[2] - rows - 1) * x.stride(2) * x.element_size() >= 1 << 32
    corner = tensors((1, 8, rows + 1, columns + 1), 1, torch.bfloat16)[0]
    x[..., -rows - 1 :, -columns - 1 :] = corner
    library.begin_at(plan["blocks"] - 1)
    rate = addresses(weight, scale, shift, y)
    call(library, OP, *arguments(x, 3, 1), 0, 1, rate, integers([1]), None)
    expected = depthwise_conv_reference(*wide([corner, weight, scale, shift]))
    assert_close(y[..., -rows:, -columns:], expected[..., 1:, 1:])


class Module:
    """deeplab_fast._C with this library behind it, for tensors of the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def depthwise_conv_cuda_parts(self, x, dtype, shape, kernel, stride, activation, rates, device) -> int:
        n, c, h, w = shape
        sizes, values = integers([n, h, w, c, kernel, stride]), (ctypes.c_int64 * 6)()
        tensors = (ctypes.c_void_p * (4 * len(rates)))(*(t for rate in rates for t in rate[:4]))
        dilations = integers([rate[4] for rate in rates])
        self.library.planned(ctypes.c_void_p(x), dtype, sizes, len(rates), tensors, dilations, values)
        return values[0]

    def depthwise_conv_cuda(
        self, x, dtype, shape, kernel, stride, activation, rates, statistics, device, stream
    ) -> None:
        n, c, h, w = shape
        tensors = (ctypes.c_void_p * (4 * len(rates)))(*(t for rate in rates for t in rate[:4]))
        moments = (ctypes.c_void_p * 5)(*statistics) if statistics[0] else None
        sizes = integers([n, h, w, c, kernel, stride])
        dilations = integers([rate[4] for rate in rates])
        arguments = (ctypes.c_void_p(x), dtype, sizes, activation, len(rates), tensors, dilations, moments)
        assert (device, stream) == (3, STREAM)
        call(self.library, OP, *arguments)


@pytest.mark.parametrize("channels", [24, 17])
def test_the_op_launches_it(library, monkeypatch, channels):
    """What deeplab_fast.ops hands over: any strides, more rates than a launch has, statistics, no image at all."""
    monkeypatch.setattr(native, "kernels", lambda: Module(library))
    monkeypatch.setattr(native, "device_and_stream", lambda x: (3, STREAM))
    configure(library)
    given = tensors((3, channels, 12, 14), 3, torch.float16)
    x, weight, scale, shift = given[0].transpose(2, 3), given[1].mT, given[2].flip(0), given[3]
    rates = [(weight, scale, shift, 1), (weight, None, shift, 5), (given[1], scale, None, 30)]
    for (*affine, dilation), y in zip(rates, op._cuda(x, rates, 2, "relu6"), strict=True):
        expected = depthwise_conv_reference(x.double(), affine[0].double(), *affine[1:], 2, dilation, "relu6")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, expected)
    for images in (x, x[:0]):
        moments = torch.zeros(channels), torch.zeros(channels)
        (y,) = op._cuda(images, [(weight, None, None, 2)], 1, "none", moments)
        assert_close(y, depthwise_conv_reference(images.double(), weight.double(), None, None, 1, 2))
        if len(images) == 0:
            assert moments[0].isnan().all() and moments[1].isnan().all()
        else:
            assert_close(moments[0], y.double().mean((0, 2, 3)))
            assert_close(moments[1], y.double().var((0, 2, 3), correction=0))


def test_the_launch(library):
    x, *rest = tensors((1, 16, 20, 20), 3, torch.float32)
    convolve(library, x, [(*rest, 3)])
    launch = launch_of(library)
    assert (launch["launches"], launch["device"], launch["device_afterwards"]) == (1, launch["wanted"], 7)
    assert launch["stream"] == STREAM and launch["threads"] == 128 and launch["shared"] <= 48 << 10
    convolve(library, x, [(rest[0], None, None, 3)], statistics=True)
    assert launch_of(library)["launches"] == 2
    x = x[:0]
    configure(library)
    call(library, OP, *arguments(x, 3, 1), 0, 1, addresses(*rest, x), integers([1]), None)
    assert launch_of(library)["launches"] == 0


def test_the_driver_is_asked_once_for_each_device(library):
    x, *rest = tensors((1, 16, 20, 20), 3, torch.float32)
    asked, y = [], torch.empty_like(x)
    for multiprocessors in (11, 12, 11):  # devices that no other test has
        configure(library, multiprocessors=multiprocessors)
        convolution = (*arguments(x, 3, 1), 0, 1, addresses(*rest, y), integers([1]), None)
        for _ in range(2):
            call(library, OP, *convolution)
            asked.append(launch_of(library)["questions"])
    assert asked == [1, 0, 1, 0, 0, 0]

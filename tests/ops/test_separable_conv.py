from __future__ import annotations

import importlib
import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, gpu, native, separable_conv, separable_conv_concat
from deeplab_fast.ops.separable_conv import separable_conv_reference
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, compile_launches, needs_compiler
from tests.interpreted import INTERPRET, crossed

OP = "separable_conv"
DTYPES = [torch.float32, torch.bfloat16]
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))

# (N, C, H, W), M, dilation, stride
SHAPES = [
    ((1, 1, 1, 1), 1, 1, 1),  # one of everything
    ((1, 3, 1, 9), 19, 2, 1),  # one line; odd channels: the last bf16 pair is half
    ((1, 17, 7, 1), 3, 3, 1),  # one column
    ((2, 32, 5, 6), 16, 1, 1),  # one step of channels, one vector of columns, exactly
    ((3, 33, 13, 11), 17, 1, 2),  # one more; lines of several images in one tile
    ((1, 40, 9, 8), 150, 12, 1),  # only the middle tap inside; panels of unequal width
    ((2, 64, 33, 33), 48, 6, 3),  # an odd feature map; three vectors of columns
    ((1, 150, 17, 19), 304, 18, 1),
    ((0, 8, 4, 4), 8, 1, 1),  # an empty batch
]
# Channels of more than one round, and of two thin ones.
MANY_CHANNELS = [((1, 2048, 6, 11), 70, 2, 1), ((1, 2053, 2, 3), 5, 1, 1), ((1, 5000, 3, 5), 33, 1, 1)]
if INTERPRET:  # whose kernel has one loop over all channels
    MANY_CHANNELS[0] = ((1, 512, 6, 11), 70, 2, 1)


def arguments(
    shape: tuple[int, ...], out_channels: int, dtype: torch.dtype, *, dilation: int = 1, stride: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Inputs with outputs of about unit size, every option in use."""
    random = torch.Generator().manual_seed(seed)
    channels = shape[1]
    return {
        "x": torch.randn(shape, generator=random).to(dtype),
        "depthwise_weight": (torch.randn(channels, 1, 3, 3, generator=random) / 3).to(dtype),
        "pointwise_weight": (torch.randn(out_channels, channels, 1, 1, generator=random) / channels**0.5).to(dtype),
        "depthwise_scale": torch.rand(channels, generator=random) + 0.5,
        "depthwise_shift": torch.randn(channels, generator=random) / 4,
        "depthwise_activation": "relu6",
        "scale": torch.rand(out_channels, generator=random) + 0.5,
        "shift": torch.randn(out_channels, generator=random) / 4,
        "activation": "relu",
        "dilation": dilation,
        "stride": stride,
    }


def moved(options: dict[str, Any], to: Any) -> dict[str, Any]:
    return {name: value.to(to) if isinstance(value, Tensor) else value for name, value in options.items()}


def positional(options: dict[str, Any]) -> list[Any]:
    """As the registered op takes them, without the backend."""
    return list((options | {"pointwise_weight": options["pointwise_weight"].flatten(1)}).values())


def expected_of(options: dict[str, Any]) -> Tensor:
    """The definition in fp64, written as layers."""
    o = moved(options, torch.float64)
    acts = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}

    def affine(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        y = y if scale is None else y * scale.reshape(1, -1, 1, 1)
        return y if shift is None else y + shift.reshape(1, -1, 1, 1)

    x, d = o["x"], o["dilation"]
    y = F.conv2d(F.pad(x, (d, d, d, d)), o["depthwise_weight"], None, o["stride"], 0, d, x.shape[1])
    y = acts[o["depthwise_activation"]](affine(y, o["depthwise_scale"], o["depthwise_shift"]))
    y = torch.einsum("nchw,mc->nmhw", y, o["pointwise_weight"].flatten(1))
    return acts[o["activation"]](affine(y, o["scale"], o["shift"]))


def skip_where_not(options: dict[str, Any], backend: str) -> None:
    if reason := dispatch.explain(OP, *positional(options))[backend]:
        pytest.skip(reason)


def check(options: dict[str, Any], backend: str) -> Tensor:
    skip_where_not(options, backend)
    y = separable_conv(**options, backend=backend)
    assert dispatch.last_backend(OP) == backend
    n, m, h, w = y.shape
    assert y.dtype == options["x"].dtype and y.stride() == (h * w * m, 1, w * m, m)
    assert_close(y, expected_of(moved(options, "cpu")))
    return y


@on_each_backend
@pytest.mark.parametrize("shapes, dtype", crossed(SHAPES[:7] + MANY_CHANNELS[:1] + SHAPES[7:], DTYPES), ids=str)
def test_matches_definition(backend, device, shapes, dtype):
    shape, out_channels, dilation, stride = shapes
    options = arguments(shape, out_channels, dtype, dilation=dilation, stride=stride)
    check(moved(options, device), backend)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(backend, device, dtype):
    options = moved(arguments((2, 5, 6, 7), 4, dtype), device)
    refusal = "the CPU kernels take float32 or bfloat16" if backend == "native" else "the Triton kernels take float32"
    if backend == "native" or (backend == "triton" and dtype == torch.float64):
        with pytest.raises(UserError, match=refusal):
            separable_conv(**options, backend=backend)
        assert separable_conv(**options).dtype == dtype
        assert dispatch.last_backend(OP) == "reference"
    else:
        check(options, backend)


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_and_absent_vectors(backend, device, dtype):
    options = moved(arguments((1, 37, 6, 7), 21, dtype), device)
    # Both activations see values below 0 and above 6, and the outputs stay of unit size.
    options["x"] = options["x"] * 8
    options["pointwise_weight"] = options["pointwise_weight"] / 8
    options["shift"][::2] += 5.5
    for inner, outer in itertools.product(native.ACTIVATIONS, repeat=2):
        check(options | {"depthwise_activation": inner, "activation": outer}, backend)
    for absent in ("depthwise_scale", "depthwise_shift", "scale", "shift"):
        check(options | {absent: None}, backend)
    check(options | {"pointwise_weight": options["pointwise_weight"].flatten(1)}, backend)


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(backend, device, dtype):
    options = moved(arguments((4, 24, 10, 12), 18, dtype), device)
    x = options["x"]
    wide = torch.randn(4, 50, 10, 13, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x[:, :, 1:, 3:],
        x.transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
        wide.contiguous(memory_format=torch.channels_last)[:, 7:31, :, 1:],  # pixels are not packed
        x.flatten()[3 : 3 + 2 * 24 * 60].as_strided((2, 24, 6, 10), (1440, 1, 240, 24)),  # packed, not aligned
    ):
        check(options | {"x": view}, backend)
    weight = options["pointwise_weight"].flatten(1).t().contiguous().t()
    check(options | {"pointwise_weight": weight, "scale": torch.rand(36, device=device)[::2]}, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converts_once_and_only_what_is_not_channels_last(dtype):
    options = arguments((2, 8, 5, 6), 4, dtype)
    skip_where_not(options, "native")
    before = native.conversions
    separable_conv(**options, backend="native")
    assert native.conversions == before + 1
    options["x"] = options["x"].contiguous(memory_format=torch.channels_last)
    separable_conv(**options, backend="native")
    assert native.conversions == before + 1


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(backend, device, dtype):
    options = moved(arguments((1, 19, 9, 9), 7, dtype, dilation=2), device)
    options["x"][0, 3, 4, 4] = float("nan")
    y = check_not_finite(options, backend)
    touched = torch.zeros(9, 9, dtype=torch.bool)
    touched[2:7:2, 2:7:2] = True
    assert torch.equal(y.isnan().any(1)[0].cpu(), touched)
    options["x"][0, 3, 4, 4] = float("inf")
    check_not_finite(options | {"depthwise_activation": "relu"}, backend)


def check_not_finite(options: dict[str, Any], backend: str) -> Tensor:
    skip_where_not(options, backend)
    y = separable_conv(**options, backend=backend)
    expected = expected_of(moved(options, "cpu"))
    actual = y.cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert_close(actual[finite], expected[finite])
    return y


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, device, dtype):
    options = moved(arguments((2, 5, 4, 6), 3, dtype), device)
    skip_where_not(options, backend)
    op = torch.ops.deeplab_fast.separable_conv.default
    torch.library.opcheck(op, (*positional(options), backend))
    torch.library.opcheck(op, (*positional(options | {"scale": None, "depthwise_shift": None, "stride": 2}), backend))


def instruction_sets() -> list[str]:
    module = native.load()
    return module.instruction_sets() if module else []


@pytest.fixture
def instruction_set(request):
    if request.param not in instruction_sets():
        pytest.skip(f"{request.param} is not among the kernels built for this processor")
    module = native.load()
    before = module.instruction_set()
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(before)


on_each_instruction_set = pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "portable"], indirect=True)


@on_each_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(instruction_set, dtype):
    for shape, out_channels, dilation, stride in SHAPES[:-2] + MANY_CHANNELS:
        check(arguments(shape, out_channels, dtype, dilation=dilation, stride=stride), "native")
    assert native.load().instruction_set() == instruction_set


@on_each_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_of_columns_and_of_channels(instruction_set, dtype):
    for size in range(1, 70, 3):
        check(arguments((1, size, 3, 3), 70 - size, dtype), "native")


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for shape, columns in (
                ((1, 64, 31, 33), 96),  # tiles of pixels
                ((1, 1500, 2, 2), 400),  # few pixels, so that threads share the columns
                ((1, 1500, 3, 4), 400),  # fewer parts than three threads
                ((1, 1500, 9, 9), 130),  # more channels than one round takes
            ):
                # Other values each time: memory that nobody wrote may hold those of the last result.
                options = arguments(shape, columns, dtype, seed=threads)
                y = check(options, "native")
                assert torch.equal(y, separable_conv(**options, backend="native"))
    finally:
        torch.set_num_threads(before)


@on_each_backend
def test_inputs_stay_as_they_are(backend, device):
    options = moved(arguments((1, 6, 5, 5), 4, torch.float32), device)
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
    separable_conv(**options, backend=backend)
    for name, value in copies.items():
        assert torch.equal(options[name], value) if isinstance(value, Tensor) else options[name] == value


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal(backend, device, dtype):
    options = moved(arguments((2, 70, 9, 11), 40, dtype, dilation=2), device)
    assert torch.equal(check(options, backend), check(options, backend))


@on_each_backend
def test_more_channels_than_a_tile_and_outer_taps_in_one_direction(backend, device):
    for shape, out_channels, dilation in (((1, 20, 4, 5), 270, 1), ((1, 16, 2, 9), 16, 3), ((1, 16, 9, 2), 16, 3)):
        check(moved(arguments(shape, out_channels, torch.bfloat16, dilation=dilation), device), backend)


on_triton = pytest.mark.parametrize("backend, device", [case for case in backends(OP) if case.values[0] == "triton"])


@on_triton
def test_launcher_writes_a_slice_of_a_wider_result(backend, device):
    from deeplab_fast.kernels import separable_conv as kernels

    options = moved(arguments((2, 24, 5, 6), 18, torch.float32), device)
    wide = torch.full((2, 40, 5, 6), 7.0, device=device).contiguous(memory_format=torch.channels_last)
    x = options["x"].contiguous(memory_format=torch.channels_last)
    kernels.separable_conv(*positional(options | {"x": x}), wide[:, 5:23])
    assert_close(wide[:, 5:23], expected_of(moved(options, "cpu")))
    assert (wide[:, :5] == 7).all() and (wide[:, 23:] == 7).all()


@on_triton
@pytest.mark.parametrize("classes, strip", [(1, 8), (1, 16), (3, 2), (5, 8), (12, 16)])
def test_tiles_take_every_pixel_once_and_neighbours_together(backend, device, classes, strip):
    from deeplab_fast.kernels import common
    from deeplab_fast.kernels import separable_conv as kernels

    n, height, width, channels = 2, 11, 38, 40
    weight = torch.randn(channels, 1, 3, 3, device=device)
    packed = torch.empty(9, channels, device=device)
    order = torch.full((n * height * width,), -1, dtype=torch.int32, device=device)
    grid = (common.cdiv(order.numel(), kernels.BLOCK.value),)
    sizes = (channels, order.numel(), height, width)
    common.launch(kernels._prepare, grid, weight, None, packed, order, *sizes, CLASSES=classes, STRIP=strip)
    assert torch.equal(packed, weight.reshape(channels, 9).t())
    assert torch.equal(order.sort().values, torch.arange(order.numel(), dtype=torch.int32, device=device))
    image, line = order // (height * width), order // width % height
    column = order % width
    keys = (image, line % classes, column % classes, column // classes // strip, line, column)
    pixels = list(zip(*(key.tolist() for key in keys), strict=True))
    assert pixels == sorted(pixels)


# (N, C, H, W), M, dilation: ASPP with many and with few pixels, the decoder, and sizes that no vector divides
LAUNCHES = {
    torch.bfloat16: [
        ((2, 2048, 64, 128), 256, 12),
        ((1, 2048, 33, 33), 256, 24),
        ((1, 304, 128, 256), 256, 1),
        ((1, 37, 16, 16), 19, 2),
    ],
    torch.float16: [((2, 2048, 64, 128), 256, 12)],
    torch.float32: [((2, 2048, 64, 128), 256, 12), ((1, 304, 33, 33), 256, 1)],
}


@needs_compiler
@pytest.mark.parametrize("dtype", LAUNCHES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip, dtype):
    from deeplab_fast.kernels import separable_conv as kernels

    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype)
    for shape, m, dilation in LAUNCHES[dtype]:
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        y = torch.empty((shape[0], m, *shape[2:]), dtype=dtype, memory_format=torch.channels_last)
        c = shape[1]
        weights = torch.empty(c, 1, 3, 3, dtype=dtype), torch.empty(m, c, dtype=dtype)
        norms = torch.empty(c), torch.empty(c), "relu", torch.empty(m), torch.empty(m), "relu"
        prepare, main = compile_launches(
            chip,
            lambda x=x, weights=weights, norms=norms, d=dilation, y=y: kernels.separable_conv(
                x, *weights, *norms, d, 1, y
            ),
        )
        for kernel in (prepare, main):
            assert kernel.stack == 0, kernel
            assert not re.search(r"\b(atom|red)\.", kernel.ptx)
        assert re.search(r"(mul|mad)\.(lo\.s64|wide\.s32)", main.ptx)  # the image's offset
        if c % 16 == 0:  # the taps of x, each in vectors of 16 bytes
            assert len(re.findall(r"@%p\d+ ld\.global\.v4\.b32", main.ptx)) >= 9
            assert "ld.global.v2" not in main.ptx and "ld.global.b16" not in main.ptx
        if kind is None:
            assert "mma" not in main.ptx
            continue
        instruction = {
            90: rf"wgmma\.mma_async\.\S*\.{kind}\.{kind}",
            100: r"tcgen05\.mma\.\S*kind::f16",
        }.get(chip, rf"mma\.sync\.\S*\.{kind}\.{kind}")
        assert re.search(instruction, main.ptx) and "tf32" not in main.ptx


def test_autocast_casts_x_and_the_weights_only():
    options = arguments((1, 16, 6, 7), 8, torch.float32)
    low = {name: options[name].bfloat16() for name in ("x", "depthwise_weight", "pointwise_weight")}
    for backend in dispatch.OPS[OP].backends:
        if dispatch.explain(OP, *positional(options | low))[backend]:
            continue
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = separable_conv(**options, backend=backend)
            double = separable_conv(**moved(options, torch.float64))
        assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
        assert torch.equal(y, separable_conv(**(options | low), backend=backend))
        assert_close(double, expected_of(options))


def test_a_gradient_is_refused():
    options = arguments((1, 4, 5, 5), 3, torch.float32)
    for name in ("x", "depthwise_weight", "pointwise_weight", "depthwise_scale", "shift"):
        asking = options | {name: options[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match="the training form is built from depthwise_conv and batch_norm_act"):
            separable_conv(**asking)
        with torch.no_grad():
            assert not separable_conv(**asking).requires_grad
    x = options["x"].clone().requires_grad_()
    y = torch.ops.deeplab_fast.separable_conv(*positional(options | {"x": x}), "auto")
    with pytest.raises(RuntimeError, match="deeplab_fast.separable_conv has no gradient"):
        y.sum().backward()


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.options = arguments((2, 9, 8, 7), 5, torch.float32, dilation=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return separable_conv(**(self.options | {"x": x}))


def test_compile_and_export_hold_one_op_and_name_no_backend(tmp_path):
    layer = Layer()
    x = layer.options["x"]
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    exported = torch.export.export(layer, (x,))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.separable_conv.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    torch.export.save(exported, tmp_path / "layer.pt2")
    assert torch.equal(torch.export.load(tmp_path / "layer.pt2").module()(x), expected)


def test_reference_equals_the_definition_in_double():
    options = moved(arguments((2, 6, 7, 8), 5, torch.float32, dilation=3, stride=2), torch.float64)
    assert_close(separable_conv_reference(*positional(options)), expected_of(options))


def test_pixels_beyond_32_bits_are_a_reason(monkeypatch):
    options = arguments((1, 4, 5, 5), 3, torch.bfloat16)
    monkeypatch.setattr(gpu, "triton_why_not", lambda *_: None)
    assert dispatch.explain(OP, *positional(options))["triton"] is None
    options["x"] = options["x"][:, :, :1, :1].expand(8, 4, 2**14, 2**14)
    assert "pixels" in dispatch.explain(OP, *positional(options))["triton"]
    assert dispatch.explain(OP, *positional(options | {"stride": 2}))["triton"] is None


def test_amx_is_a_reason(monkeypatch):
    options = arguments((1, 4, 5, 5), 3, torch.bfloat16)
    monkeypatch.setattr(native, "cpu_why_not", lambda *_: None)
    monkeypatch.setattr(importlib.import_module("deeplab_fast.ops.separable_conv"), "_has_amx", lambda: True)
    assert "AMX" in dispatch.explain(OP, *positional(options))["native"]
    assert dispatch.explain(OP, *positional(moved(options, torch.float32)))["native"] is None


def test_rejects_bad_input():
    good = arguments((1, 4, 5, 6), 3, torch.float32)
    cases = [
        ({"x": good["x"][0]}, r"x is \(4, 5, 6\); expected \(N, C, H, W\)"),
        ({"x": good["x"][:, :, :0]}, r"x is \(1, 4, 0, 6\)"),
        ({"x": good["x"].int()}, "x is torch.int32; expected a floating-point type"),
        ({"depthwise_weight": torch.zeros(4, 1, 5, 5)}, r"depthwise_weight is \(4, 1, 5, 5\); expected \(4, 1, 3, 3\)"),
        ({"pointwise_weight": torch.zeros(3, 5)}, r"pointwise_weight is \(3, 5\); expected \(M, 4, 1, 1\) or \(M, 4\)"),
        ({"pointwise_weight": torch.zeros(0, 4)}, r"pointwise_weight is \(0, 4\)"),
        ({"pointwise_weight": torch.zeros(3, 4).bfloat16()}, "pointwise_weight is torch.bfloat16 on cpu and x"),
        ({"depthwise_scale": torch.zeros(3)}, r"depthwise_scale is \(3,\); expected \(4,\)"),
        ({"shift": torch.zeros(4)}, r"shift is \(4,\); expected \(3,\)"),
        ({"scale": torch.zeros(3).bfloat16()}, "scale is torch.bfloat16; expected torch.float32"),
        ({"scale": torch.zeros(3, device="meta")}, "scale is on meta and x on cpu"),
        ({"dilation": 0}, "dilation is 0; expected at least 1"),
        ({"stride": -1}, "stride is -1; expected at least 1"),
        ({"activation": "gelu"}, "activation is 'gelu'; expected none, relu, relu6"),
        ({"depthwise_activation": "silu"}, "depthwise_activation is 'silu'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            separable_conv(**(good | change))
    with pytest.raises(UserError, match="separable_conv has no backend 'cudnn'; it has native, triton"):
        separable_conv(**good, backend="cudnn")


# --- separable_conv_concat ---

CONCAT = "separable_conv_concat"


def concat_arguments(
    dtype: torch.dtype, *, shape: tuple[int, ...] = (2, 24, 9, 7), norm_each: bool = True, last: bool = True
) -> dict[str, Any]:
    """x and three branches of 18, 5 and 32 channels between 7 and 3 others, which are no multiples of a vector."""
    random = torch.Generator().manual_seed(7)
    branches = [arguments(shape, m, dtype, dilation=d, seed=d) for m, d in ((18, 1), (5, 4), (32, 9))]
    result = {
        "x": branches[0]["x"],
        "first": torch.randn(shape[0], 7, *shape[2:], generator=random).to(dtype),
        "last": torch.randn(shape[0], 3, 1, 1, generator=random).to(dtype) if last else None,
    }
    for name in ("depthwise_weight", "pointwise_weight", "depthwise_scale", "depthwise_shift", "scale", "shift"):
        result[f"{name}s"] = [branch[name] for branch in branches]
    if not norm_each:
        result |= {"depthwise_scales": [], "depthwise_shifts": []}
    activations = {"depthwise_activation": "relu6" if norm_each else "none", "activation": "relu"}
    return result | activations | {"dilations": [1, 4, 9]}


def moved_lists(options: dict[str, Any], to: Any) -> dict[str, Any]:
    lists = {name: [t.to(to) for t in v] for name, v in options.items() if isinstance(v, list) and name != "dilations"}
    return moved(options, to) | lists


def concat_positional(options: dict[str, Any]) -> list[Any]:
    order = ("x", "first", "last", "depthwise_weights", "pointwise_weights", "depthwise_scales", "depthwise_shifts")
    order += ("depthwise_activation", "scales", "shifts", "activation", "dilations")
    return [options[name] for name in order]


def one_by_one(options: dict[str, Any], backend: str) -> Tensor:
    parts = [options["first"]]
    for i, dilation in enumerate(options["dilations"]):
        names = ("depthwise_weight", "pointwise_weight", "depthwise_scale", "depthwise_shift", "scale", "shift")
        own = {name: options[f"{name}s"][i] if options[f"{name}s"] else None for name in names}
        own |= {name: options[name] for name in ("depthwise_activation", "activation")}
        parts.append(separable_conv(options["x"], **own, dilation=dilation, backend=backend))
    if options["last"] is not None:
        parts.append(options["last"].expand(-1, -1, *options["x"].shape[2:]))
    return torch.cat(parts, dim=1)


on_each_concat = pytest.mark.parametrize("backend, device", backends(CONCAT))


@on_each_concat
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_each, last", [(True, True), (False, False)])
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (1, 33, 4, 1), (0, 8, 3, 3)], ids=str)
def test_concat_is_the_branches_side_by_side(backend, device, dtype, norm_each, last, shape):
    """Bit for bit: the same kernels, which write elsewhere."""
    options = moved_lists(concat_arguments(dtype, shape=shape, norm_each=norm_each, last=last), device)
    y = separable_conv_concat(**options, backend=backend)
    assert dispatch.last_backend(CONCAT) == backend
    _, m, h, w = y.shape
    assert y.dtype == dtype and y.stride() == (h * w * m, 1, w * m, m)
    assert torch.equal(y, one_by_one(options, backend))


@on_each_concat
def test_concat_opcheck(backend, device):
    options = moved_lists(concat_arguments(torch.float32), device)
    options["pointwise_weights"] = [w.flatten(1) for w in options["pointwise_weights"]]
    torch.library.opcheck(torch.ops.deeplab_fast.separable_conv_concat.default, (*concat_positional(options), backend))


@on_each_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concat_on_every_instruction_set(instruction_set, dtype):
    options = concat_arguments(dtype)
    if reason := dispatch.explain(CONCAT, *concat_positional(options))["native"]:
        pytest.skip(reason)
    y = separable_conv_concat(**options, backend="native")
    assert torch.equal(y, one_by_one(options, "native"))


def test_concat_rejects_bad_input():
    options = concat_arguments(torch.float32)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            separable_conv_concat(**(options | changes))

    refused("scales are 2 and dilations 3; expected as many", scales=options["scales"][:2])
    refused("depthwise_shifts are 0 and dilations 3", depthwise_shifts=[])
    refused(r"first is \(2, 7, 9, 6\); expected \(2, 'M', 9, 7\)", first=options["first"][..., 1:])
    refused(r"last is \(2, 7, 9, 7\); expected \(2, 'M', 1, 1\)", last=options["first"])
    refused("first is torch.float64 on cpu and x torch.float32", first=options["first"].double())
    refused("dilation is 0; expected at least 1", dilations=[1, 0, 2])
    for name in ("first", "last"):
        with pytest.raises(RuntimeError, match="separable_conv_concat has no gradient"):
            separable_conv_concat(**(options | {name: options[name].clone().requires_grad_()}))


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_concat_compiles_with_wide_stores(chip):
    """A slice of ASPP's 1280 channels that begins at the 256th: stores are as wide as those of a result of its own."""
    from deeplab_fast.kernels import separable_conv as kernels

    x = torch.empty((2, 2048, 32, 64), dtype=torch.bfloat16, memory_format=torch.channels_last)
    y = torch.empty((2, 1280, 32, 64), dtype=torch.bfloat16, memory_format=torch.channels_last)
    weights = torch.empty(2048, 1, 3, 3, dtype=x.dtype), torch.empty(256, 2048, dtype=x.dtype)
    norms = torch.empty(2048), torch.empty(2048), "relu", torch.empty(256), torch.empty(256), "relu"
    _, main = compile_launches(chip, lambda: kernels.separable_conv(x, *weights, *norms, 12, 1, y[:, 256:512]))
    assert main.stack == 0
    stores = re.findall(r"st\.global\.(\S+)", main.ptx)
    assert stores and set(stores) == {"v4.b32"}

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, native, upsample_concat
from deeplab_fast.ops.upsample_concat import upsample_concat_reference
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, compile_launches, needs_compiler
from tests.interpreted import INTERPRET, crossed

OP, BACKWARD = "upsample_concat", "upsample_concat_backward"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
DTYPES = [torch.float32, torch.bfloat16]
on_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_each_alignment = pytest.mark.parametrize("align_corners", [False, True])

# N, C, C', (h, w), (H, W)
SHAPES = [
    (1, 256, 48, (8, 16), (32, 64)),  # the decoder's, smaller
    (2, 19, 3, (5, 7), (20, 28)),  # channels that fill no vector
    (2, 17, 0, (5, 7), (10, 21)),  # no low-level channels
    (1, 1, 1, (6, 5), (13, 11)),  # one channel, a ratio that is not whole
    (3, 304, 1, (3, 3), (4, 5)),  # less than twice as large
    (1, 150, 17, (9, 1), (33, 1)),  # one column
    (2, 16, 5, (1, 1), (9, 13)),  # image pooling: one pixel everywhere
    (1, 33, 2, (7, 6), (1, 1)),  # one pixel remains
    (1, 3, 20, (37, 29), (5, 4)),  # much smaller: rows and columns that nothing reads
    (2, 24, 8, (9, 9), (8, 17)),  # down and up
    (1, 40, 8, (6, 7), (6, 7)),  # the same size
    (1, 2048, 16, (2, 3), (5, 6)),
    (2, 96, 32, (33, 21), (65, 43)),  # above 65536 bytes a thread
    (1, 1000, 3, (3, 45), (5, 60)),  # the gradient takes its channels in two blocks
    (0, 8, 4, (3, 4), (6, 8)),  # nothing
]
RATIOS = [(3, 11), (11, 3), (22, 88), (33, 129), (1, 7), (64, 65), (513, 129)]
if INTERPRET:  # where the sizes of CPU caches do not matter, and every program costs 20 ms
    RATIOS[3:] = [(9, 33), (1, 7), (16, 17), (65, 17)]
    SHAPES[0] = (1, 256, 48, (2, 17), (8, 68))
    SHAPES[12:14] = [(2, 96, 32, (5, 21), (9, 43)), (1, 1000, 3, (3, 9), (5, 12))]


@pytest.fixture(autouse=True)
def larger_programs(monkeypatch):
    """In the interpreter: it pays by the program."""
    if INTERPRET:
        from deeplab_fast.kernels import common

        def configuration(*args, _original=common.configuration):
            config = _original(*args)
            return {**config, "BLOCK_ELEMENTS": 4 * config["BLOCK_ELEMENTS"]}

        monkeypatch.setattr(common, "configuration", configuration)


def make(shape: tuple, dtype: torch.dtype, device: str = "cpu", *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and low_level, channels-last."""
    n, channels, low_channels, size, out = shape
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(n, c, *hw, generator=generator) for c, hw in ((channels, size), (low_channels, out))]
    return tuple(t.to(device, dtype, memory_format=torch.channels_last) for t in pair)


def check(x: Tensor, low_level: Tensor, align_corners: bool, backend: str, oracle: torch.dtype = torch.float64) -> None:
    result = upsample_concat(x, low_level, align_corners=align_corners, backend=backend)
    assert dispatch.last_backend(OP) == backend
    assert result.dtype == x.dtype and result.device == x.device
    assert result.is_contiguous(memory_format=torch.channels_last)
    resized, copied = result.split([x.shape[1], low_level.shape[1]], 1)
    expected = upsample_concat_reference(x.double(), low_level.double(), align_corners)
    assert_close(resized, expected[:, : x.shape[1]])
    assert torch.equal(copied, low_level)


def check_gradients(x: Tensor, low_level: Tensor, align_corners: bool, backend: str) -> None:
    """Sums of many terms: within twice the error of torch's own gradient in that dtype."""
    wanted = [t.detach().clone().requires_grad_() for t in (x, low_level)]
    eager = [t.detach().clone().requires_grad_() for t in (x, low_level)]
    exact = [t.detach().double().requires_grad_() for t in (x, low_level)]
    result = upsample_concat(*wanted, align_corners=align_corners, backend=backend)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(result.shape, generator=generator).to(result)
    ours = torch.autograd.grad(result, wanted, grad)
    if backend != "reference":
        assert dispatch.last_backend(BACKWARD) == backend
    expected = torch.autograd.grad(upsample_concat_reference(*exact, align_corners), exact, grad.double())
    resized = F.interpolate(eager[0], low_level.shape[2:], mode="bilinear", align_corners=align_corners)
    theirs = torch.autograd.grad(torch.cat((resized, eager[1]), 1), eager, grad)
    for mine, plain, true in zip(ours, theirs, expected, strict=True):
        assert mine.dtype == x.dtype and mine.shape == true.shape
        if mine.numel() == 0:
            continue
        scale = true.abs().max()
        error, allowed = ((t.double() - true).abs().max() for t in (mine, plain))
        assert error <= 2 * allowed + torch.finfo(x.dtype).eps * scale
    assert torch.equal(ours[1], grad[:, x.shape[1] :])


def aligned(first: int) -> list[tuple[tuple, torch.dtype, bool]]:
    """Every shape with aligned corners and without; in the interpreter in turn, so that two tests share them."""
    turns = [(s, d, SHAPES.index(s) + DTYPES.index(d) + first) for s, d in crossed(SHAPES, DTYPES)]
    return [(s, d, corners) for s, d, i in turns for corners in (False, True) if not INTERPRET or i % 2 == corners]


@on_each_backend
@pytest.mark.parametrize("shape, dtype, align_corners", aligned(0), ids=str)
def test_matches_reference(backend, device, dtype, align_corners, shape):
    check(*make(shape, dtype, device), align_corners, backend)


@on_each_backend
@pytest.mark.parametrize("shape, dtype, align_corners", aligned(1), ids=str)
def test_gradient(backend, device, dtype, align_corners, shape):
    check_gradients(*make(shape, dtype, device), align_corners, backend)


@on_each_backend
@on_each_alignment
@pytest.mark.parametrize("source, output", RATIOS)
def test_taps_are_those_of_torch(backend, device, align_corners, source, output):
    """Ramps along either axis: their result is the position in the source, to a few ulp."""
    ramp = torch.arange(source, dtype=torch.float32, device=device)
    x = torch.stack((ramp.expand(source, source), ramp[:, None].expand(source, source)))[None]
    x = x[..., : min(source, 40)]  # the other axis has another ratio
    low_level = x.new_zeros((1, 1, output, 23))
    result = upsample_concat(x, low_level, align_corners=align_corners, backend=backend)[:, :2]
    expected = F.interpolate(x, (output, 23), mode="bilinear", align_corners=align_corners)
    assert (result - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * source


@on_each_backend
@on_each_dtype
def test_any_strides_and_alignment(backend, device, dtype):
    x, low_level = make((2, 24, 20, (5, 6), (9, 11)), dtype, device)
    flat = x.flatten()
    unaligned = flat[1 : 1 + 4 * 3 * 24].view(1, 4, 3, 24).permute(0, 3, 1, 2)
    views = [
        (x.contiguous(), low_level.contiguous()),
        (x[:1, 3:20, 1:, ::2], low_level[1:, ::3, 2:, 1:9]),
        (x.transpose(2, 3), low_level[:1].expand(2, -1, -1, -1)),
        (unaligned, low_level[:1, 1:]),
        (x[:, :1], low_level[:, :1]),
    ]
    if INTERPRET and dtype != torch.float32:  # what a dtype changes is how many values are aligned
        views = views[1:4:2]
    for a, b in views:
        check(a, b, False, backend)
        check_gradients(a, b, False, backend)


def test_packed_channels_last_input_is_not_converted():
    x, low_level = make((2, 24, 20, (9, 8), (17, 18)), torch.float32)
    before = native.conversions
    upsample_concat(x, low_level)
    assert native.conversions == before


@on_each_backend
def test_gradient_of_any_strides(backend, device):
    x, low_level = make((2, 5, 4, (3, 4), (6, 9)), torch.float32, device)
    x.requires_grad_()
    result = upsample_concat(x, low_level.requires_grad_(), backend=backend)
    expected = torch.autograd.grad(upsample_concat_reference(x, low_level, False).sum(), (x, low_level))
    for ours, theirs in zip(torch.autograd.grad(result.sum(), (x, low_level)), expected, strict=True):  # expanded
        assert_close(ours, theirs)


@on_each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_what_they_reach_in_torch(backend, device, value):
    x, low_level = make((1, 20, 3, (5, 6), (17, 20)), torch.float32, device)
    x[0, 3, 2, 4] = x[0, 17, 4, 0] = x[0, 17, 4, 1] = value
    low_level[0, 1, 0, 0] = value
    x.requires_grad_(), low_level.requires_grad_()
    result = upsample_concat(x, low_level, backend=backend)
    expected = upsample_concat_reference(x, low_level, False)
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
    grad = torch.ones_like(expected)
    grad[0, 3, 7, 9] = grad[0, 22, 3, 3] = float("nan")
    ours, theirs = (torch.autograd.grad(y, (x, low_level), grad) for y in (result, expected))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, theirs, strict=True))


@on_each_backend
@pytest.mark.parametrize("size", [(6, 14), (12, 7)])
def test_an_axis_that_keeps_its_size_does_not_mix(backend, device, size):
    """A tap of 0 on the next row or column would make NaN of its infinity."""
    if backend == "reference":
        pytest.skip("torch multiplies it by 0")
    x, low_level = make((1, 16, 1, (6, 7), size), torch.float32, device)
    kept = 2 if size[0] == 6 else 3
    x.select(kept, 3).fill_(float("inf"))
    result = upsample_concat(x.requires_grad_(), low_level, backend=backend)
    others = [i for i in range(result.shape[kept]) if i != 3]
    assert result.index_select(kept, torch.tensor(others, device=device)).isfinite().all()
    grad = torch.ones_like(result)
    grad.select(kept, 3).fill_(float("nan"))
    (grad_x,) = torch.autograd.grad(result, x, grad)
    assert grad_x.index_select(kept, torch.tensor(others, device=device)).isfinite().all()


def instruction_sets() -> list[str]:
    module = native.load()
    return module.instruction_sets() if module else []


@on_each_dtype
def test_every_instruction_set(instruction_set, dtype):
    for shape in SHAPES[:10]:
        check(*make(shape, dtype), False, "native")
        check_gradients(*make(shape, dtype), False, "native")


@on_each_dtype
def test_stores_past_the_caches(instruction_set, dtype):
    """Above 16 MiB, where channels fill whole pairs of vectors; and above it, where they do not."""
    check(*make((1, 64, 64, (9, 8), (257, 261)), dtype), False, "native")
    check(*make((1, 65, 64, (9, 8), (257, 261)), dtype), False, "native")
    check(*make((1, 64, 66, (9, 8), (257, 261)), dtype), False, "native")


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
@on_each_dtype
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[12], (1, 256, 8, (1, 3), (40, 41))], ids=str)
def test_equal_for_any_number_of_threads(dtype, shape):
    x, low_level = (t.requires_grad_() for t in make(shape, dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = upsample_concat(x, low_level, backend="native")
            results.append((y, *torch.autograd.grad(y, (x, low_level), y.detach())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@on_each_backend
def test_only_the_gradients_asked_for(backend, device):
    x, low_level = make((2, 5, 4, (3, 4), (6, 9)), torch.float32, device)
    for index, asking in enumerate((x, low_level)):
        asking.requires_grad_()
        result = upsample_concat(x, low_level, backend=backend)
        (alone,) = torch.autograd.grad(result, asking, result.detach())
        asking.requires_grad_(False)
        needs = (index == 0, index == 1)
        both = torch.ops.deeplab_fast.upsample_concat_backward(result.detach(), 3, 4, 5, False, *needs, backend)
        assert both[1 - index].numel() == 0
        assert_close(both[index], alone)
    assert not upsample_concat(x, low_level, backend=backend).requires_grad


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
def test_the_kernel_computes_only_the_gradients_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(native.kernels(), f"{BACKWARD}_cpu", lambda *args: calls.append(args))
    x, low_level = make((2, 5, 4, (3, 4), (6, 9)), torch.float32)
    for asking in (x, low_level):
        asking.requires_grad_()
        upsample_concat(x, low_level, backend="native").sum().backward()
        asking.requires_grad_(False)
    assert [[address != 0 for address in args[4:6]] for args in calls] == [[True, False], [False, True]]


@on_each_alignment
def test_gradcheck(align_corners):
    x, low_level = (t.requires_grad_() for t in make((2, 3, 2, (3, 4), (5, 7)), torch.float64))
    run = lambda x, low_level: upsample_concat(x, low_level, align_corners=align_corners)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, low_level))
    assert dispatch.last_backend(OP) == "reference"


@on_each_backend
def test_second_derivative_raises(backend, device):
    if backend == "reference":
        pytest.skip("torch differentiates the reference itself")
    x, low_level = make((1, 3, 2, (3, 4), (5, 7)), torch.float32, device)
    result = upsample_concat(x.requires_grad_(), low_level, backend=backend)
    grad = torch.ones_like(result).requires_grad_()
    (grad_x,) = torch.autograd.grad(result, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{BACKWARD} has no second derivative"):
        grad_x.sum().backward()


@on_each_backend
def test_opcheck(backend, device):
    x, low_level = make((2, 3, 2, (3, 4), (5, 7)), torch.float32, device)
    op = torch.ops.deeplab_fast.upsample_concat.default
    for align_corners in (False, True):
        inputs = (x.clone().requires_grad_(), low_level.clone().requires_grad_(), align_corners, backend)
        torch.library.opcheck(op, inputs)
    torch.library.opcheck(op, (*make((1, 1, 0, (1, 1), (1, 1)), torch.float32, device), False, backend))
    backward = torch.ops.deeplab_fast.upsample_concat_backward.default
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (torch.randn(2, 5, 5, 7, device=device), 3, 4, 3, False, *needs, backend))


def test_autocast_keeps_its_dtype():
    x, low_level = make((2, 24, 20, (5, 4), (10, 12)), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = upsample_concat(x.bfloat16(), low_level)
        from_reference = upsample_concat(x, low_level, backend="reference")
    assert result.dtype == from_reference.dtype == torch.bfloat16
    expected = upsample_concat_reference(x.bfloat16().double(), low_level.bfloat16().double(), False)
    assert_close(result, expected)
    assert_close(from_reference, expected)


def test_two_dtypes_are_promoted():
    x, low_level = make((2, 4, 3, (5, 4), (10, 12)), torch.float32)
    for a, b in ((x.bfloat16(), low_level), (x, low_level.bfloat16()), (x.half(), low_level.bfloat16())):
        result = upsample_concat(a, b)
        assert result.dtype == torch.float32
        assert_close(result, upsample_concat_reference(a.double(), b.double(), False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_take_the_reference(dtype):
    x, low_level = (t.requires_grad_() for t in make((1, 4, 3, (5, 4), (10, 12)), dtype))
    check(x, low_level, False, "reference")
    upsample_concat(x, low_level).sum().backward()
    assert x.grad.dtype == dtype
    if instruction_sets():
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(UserError, match=f"take float32 or bfloat16, one for all, and got {name}"):
            upsample_concat(x, low_level, backend="native")


@on_each_backend
def test_two_runs_are_equal(backend, device):
    x, low_level = make((2, 19, 3, (2, 7), (8, 28)) if INTERPRET else SHAPES[1], torch.float32, device)
    runs = []
    for _ in range(2):
        y = upsample_concat(x.requires_grad_(), low_level.requires_grad_(), backend=backend)
        runs.append((y, *torch.autograd.grad(y, (x, low_level), y.detach())))
    assert all(map(torch.equal, *runs))


@on_each_backend
@on_each_alignment
def test_half(backend, device, align_corners):
    if backend == "native":
        pytest.skip("the CPU kernels do not take float16")
    check(*make(SHAPES[4], torch.float16, device), align_corners, backend)
    check_gradients(*make(SHAPES[1], torch.float16, device), align_corners, backend)


def launch_all(x: Tensor, low_level: Tensor, out: Tensor, align_corners: bool) -> None:
    from deeplab_fast.kernels import upsample_concat as kernels

    kernels.forward(x, low_level, out, align_corners)
    kernels.backward(out, x, low_level, align_corners)


def buffers(shape: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, low_channels, size, out = shape
    shapes = ((channels, *size), (low_channels, *out), (channels + low_channels, *out))
    return tuple(torch.empty((n, *s), dtype=dtype).to(memory_format=torch.channels_last) for s in shapes)


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiles_ahead_of_time(chip, dtype):
    """The decoder's shape at 1024 x 2048: every access is of 16 bytes, nothing spills, nothing is atomic."""
    found = compile_launches(chip, lambda: launch_all(*buffers((1, 256, 48, (64, 128), (256, 512)), dtype), False))
    assert [kernel.name for kernel in found] == ["forward_kernel", "backward_kernel"]
    for kernel in found:
        assert kernel.stack == 0 and kernel.registers <= 168
        assert not re.search(r"\b(atom|red)\.", kernel.ptx)
        for access in re.findall(r"(?:ld|st)\.global\S*", kernel.ptx):
            assert ".v4" in access, f"{kernel.name}: {access}"


@needs_compiler
@pytest.mark.parametrize("channels, low_channels, widest", [(256, 44, 8), (256, 46, 4), (19, 3, 2)])
def test_rows_that_are_not_aligned_are_written_in_narrower_vectors(channels, low_channels, widest):
    """Of bf16: rows of 600 bytes take 8 at once, of 604 bytes 4, and of 44 bytes with 38 before low_level's 2."""
    tensors = buffers((1, channels, low_channels, (8, 16), (32, 64)), torch.bfloat16)
    for kernel in compile_launches(90, lambda: launch_all(*tensors, False)):
        # Of the pixels, that is; x and its gradient have rows of their own.
        pixels = "st" if kernel.name == "forward_kernel" else "ld"
        sizes = set()
        for access in re.findall(rf"{pixels}\.global\S*", kernel.ptx):
            count, bits = re.search(r"(?:\.v(\d))?\.b(\d+)", access).groups()
            sizes.add(int(count or 1) * int(bits) // 8)
        assert max(sizes) == widest, (kernel.name, sizes)


@needs_compiler
def test_offsets_of_rows_are_multiplied_in_64_bits():
    """8 images of 304 x 1024 x 1024 hold more elements than 32 bits count."""
    tensors = buffers((1, 256, 48, (8, 16), (32, 64)), torch.bfloat16)
    for kernel in compile_launches(90, lambda: launch_all(*tensors, False)):
        assert re.search(r"\b(mul|mad)\.lo\.s64", kernel.ptx), kernel.name


def test_compile_and_export_hold_one_op_and_name_no_backend():
    class Join(torch.nn.Module):
        def forward(self, x: Tensor, low_level: Tensor) -> Tensor:
            return upsample_concat(x, low_level, align_corners=True)

    x, low_level = (t.requires_grad_() for t in make((2, 5, 4, (3, 4), (6, 9)), torch.float32))
    expected = Join()(x, low_level)
    compiled = torch.compile(Join(), backend="aot_eager", fullgraph=True)(x, low_level)
    assert torch.equal(compiled, expected)
    gradients = [torch.autograd.grad(y, (x, low_level), expected.detach()) for y in (compiled, expected)]
    assert all(map(torch.equal, *gradients))
    exported = torch.export.export(Join(), (x, low_level))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.upsample_concat.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    assert torch.equal(exported.module()(x, low_level), expected)


def test_rejects_what_is_not_a_pair_of_activations():
    x, low_level = make((2, 3, 2, (3, 4), (5, 7)), torch.float32)
    with pytest.raises(ValueError, match=r"x is \(3, 3, 4\); expected 4 dimensions"):
        upsample_concat(x[0], low_level)
    with pytest.raises(ValueError, match="low_level is torch.int64; expected a floating-point dtype"):
        upsample_concat(x, low_level.long())
    with pytest.raises(ValueError, match=r"low_level is \(2, 2, 0, 7\); expected a height and a width"):
        upsample_concat(x, low_level[:, :, :0])
    with pytest.raises(ValueError, match=r"x is \(2, 0, 3, 4\); expected at least 1 channel"):
        upsample_concat(x[:, :0], low_level)
    with pytest.raises(ValueError, match=r"x is \(1, 3, 3, 4\) and low_level \(2, 2, 5, 7\); expected one batch"):
        upsample_concat(x[:1], low_level)
    with pytest.raises(ValueError, match="x is on cpu and low_level on meta"):
        upsample_concat(x, low_level.to("meta"))
    with pytest.raises(UserError, match="upsample_concat has no backend 'cudnn'; it has native, triton, reference"):
        upsample_concat(x, low_level, backend="cudnn")

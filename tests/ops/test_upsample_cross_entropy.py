from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, native, upsample_cross_entropy
from deeplab_fast.ops.upsample_cross_entropy import upsample_cross_entropy_reference
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, compile_launches, needs_compiler
from tests.interpreted import INTERPRET, crossed

OP = "upsample_cross_entropy"
BACKWARD = f"{OP}_backward"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
needs_native = pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")

# (N, K, h, w), (H, W)
SHAPES = [
    ((1, 1, 1, 1), (1, 1)),  # one pixel of the only class
    ((1, 3, 1, 1), (5, 37)),  # one cell, more output rows than labels are held of
    ((2, 19, 9, 17), (36, 68)),  # x4: the real ratio, two blocks of cells
    ((1, 21, 33, 33), (129, 129)),  # odd crops
    ((1, 150, 5, 6), (20, 24)),  # many classes
    ((1, 304, 2, 3), (7, 5)),
    ((3, 5, 40, 7), (40, 7)),  # the same size; several rows in a strip
    ((1, 4, 23, 50), (9, 13)),  # smaller: most columns and rows are never read
    ((1, 4, 16, 31), (17, 33)),  # nearly the same size
    ((1, 2, 1, 40), (19, 3)),  # one row; larger one way, smaller the other
    ((0, 3, 4, 4), (8, 8)),  # an empty batch
]
if INTERPRET:  # where every program costs 40 ms; rows of 31 columns and 8 rows are one
    SHAPES[2:4] = [((2, 19, 2, 17), (8, 68)), ((1, 21, 3, 33), (9, 129))]
    SHAPES[4:7] = [((1, 150, 2, 6), (8, 24)), ((1, 304, 1, 3), (4, 5)), ((2, 5, 9, 7), (9, 7))]
    SHAPES[7:9] = [((1, 4, 13, 50), (5, 13)), ((1, 4, 8, 31), (9, 33))]


@pytest.fixture(autouse=True)
def larger_programs(monkeypatch):
    """In the interpreter: it pays by the program and the block of classes."""
    if INTERPRET:
        from deeplab_fast.kernels import common

        def configuration(*args, _original=common.configuration):
            config = _original(*args)
            return {**config, "BLOCK_K": 32} if "BLOCK_K" in config else config

        monkeypatch.setattr(common, "configuration", configuration)


def make(
    shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, *, wide: bool = False, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits as rounded to `dtype`, and labels of which some are ignored or wrong."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype, memory_format=torch.channels_last)
    target = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    draw = torch.rand(target.shape, generator=generator)
    target[draw < 0.2] = 255
    target[(draw > 0.2) & (draw < 0.25)] = 254 if shape[1] < 254 else 1
    if wide:
        target[(draw > 0.25) & (draw < 0.3)] = -1
        target[(draw > 0.3) & (draw < 0.33)] = 2**32  # 0, were it cut to 32 bits
    return logits, target if wide else target.byte()


def class_weights(classes: int) -> Tensor:
    return torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.1


def graded(logits: Tensor, target: Tensor, **options) -> tuple[Tensor, ...]:
    """loss, weight_sum, out_of_range and the gradient; "none" under a gradient that differs from pixel to pixel."""
    logits = logits.detach().requires_grad_()
    loss, weight_sum, out_of_range = upsample_cross_entropy(logits, target, **options)
    upstream = torch.ones_like(loss)
    if loss.ndim:
        upstream = torch.linspace(-1, 2, loss.numel(), device=loss.device).reshape(loss.shape).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    return loss.detach(), weight_sum, out_of_range, grad


def check(logits: Tensor, target: Tensor, backend: str, **options) -> None:
    loss, weight_sum, out_of_range, grad = graded(logits, target, backend=backend, **options)
    assert dispatch.last_backend(OP) == backend
    if backend != "reference" and options.get("reduction") == "none":
        assert dispatch.last_backend(BACKWARD) == backend
    expected = graded(logits.double().cpu(), target.cpu(), backend="reference", **options)
    assert loss.dtype == weight_sum.dtype == torch.float32 and out_of_range.dtype == torch.int64
    assert not weight_sum.requires_grad
    assert grad.dtype == logits.dtype and loss.device == logits.device
    assert_close(loss, expected[0])
    assert_close(weight_sum, expected[1])
    assert torch.equal(out_of_range.cpu(), expected[2])
    assert_close(grad, expected[3])


def test_definition_by_hand():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64).T.reshape(1, 3, 1, 2)
    target = torch.tensor([[[2, 0, 255, 7]]])
    weight = torch.tensor([0.5, 1.0, 2.0])
    # between the columns, a quarter of the way
    points = [logits[0, :, 0, 0], 0.75 * logits[0, :, 0, 0] + 0.25 * logits[0, :, 0, 1]]
    total = 0.0
    for x, y in zip(points, (2, 0), strict=True):
        nll = x.exp().sum().log() - x
        total += 0.9 * weight[y] * nll[y] + 0.1 / 3 * (weight * nll).sum()
    for backend in ("reference", "auto"):
        result = upsample_cross_entropy(
            *(logits, target), weight=weight, label_smoothing=0.1, reduction="sum", backend=backend
        )
        assert_close(result[0], total)
        assert result[1] == 2.5 and result[2] == 1


@on_each_backend
@pytest.mark.parametrize("shapes, dtype", crossed(SHAPES, [torch.float32, torch.bfloat16]), ids=str)
def test_matches_reference_with_gradient(backend, device, shapes, dtype):
    logits, target = (x.to(device) for x in make(*shapes, dtype))
    options = list(itertools.product(("mean", "none", "sum"), (False, True)))
    if INTERPRET:  # each reduction once, aligned for every second shape
        options = [options[i] for i in ((0, 3), (1, 2))[SHAPES.index(shapes) % 2]]
    for reduction, align_corners in options:
        check(logits, target, backend, reduction=reduction, align_corners=align_corners)


@on_each_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_smoothing(backend, device, weighted, label_smoothing):
    shape, size = ((2, 7, 2, 19), (8, 76)) if INTERPRET else ((2, 7, 6, 19), (24, 76))
    logits, target = (x.to(device) for x in make(shape, size, torch.float32, wide=True))
    weight = class_weights(7).to(device) if weighted else None
    for reduction in ("mean", "sum", "none"):
        check(logits, target, backend, weight=weight, label_smoothing=label_smoothing, reduction=reduction)


@needs_native
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set(name):
    module = native.load()
    if name not in module.instruction_sets():
        pytest.skip(f"this processor has no kernels for {name}")
    before = module.instruction_set()
    module.use_instruction_set(name)
    try:
        for dtype, (shape, size) in itertools.product((torch.float32, torch.bfloat16), SHAPES):
            logits, target = make(shape, size, dtype, wide=True)
            check(logits, target, "native", weight=class_weights(shape[1]), label_smoothing=0.1)
            check(logits, target, "native", reduction="none")
        logits, target = make((1, 5, 8, 8), (32, 32), torch.float32, scale=300.0)
        check(logits, target, "native", reduction="none")  # most exponentials underflow
    finally:
        module.use_instruction_set(before)


def test_equals_cross_entropy_of_torch():
    logits, target = make((2, 6, 5, 7), (20, 28), torch.float32)
    target = torch.where(target == 254, 255, target)
    full = F.interpolate(logits, size=(20, 28), mode="bilinear")
    for options in ({}, {"weight": class_weights(6), "label_smoothing": 0.2}):
        expected = F.cross_entropy(full, target.long(), ignore_index=255, **options)
        assert_close(upsample_cross_entropy(logits, target, **options)[0], expected)


@on_each_backend
@pytest.mark.parametrize("ignore", [0, 3, -100, 255, 2**40])
def test_ignore_index(backend, device, ignore):
    logits, target = make((1, 5, 6, 7), (12, 14), torch.float32, wide=True)
    target[0, ::3, 0] = 2**40
    check(logits.to(device), target.to(device), backend, ignore_index=ignore)
    if ignore < 0:
        check(logits.to(device), target.to(device).clamp(0, 255).byte(), backend, ignore_index=ignore)


@on_each_backend
def test_narrow_integer_targets(backend, device):
    logits, target = make((1, 5, 6, 7), (12, 14), torch.float32)
    for dtype in (torch.int8, torch.int16, torch.int32):
        check(logits.to(device), target.to(device, dtype), backend)


@on_each_backend
def test_any_layout_and_alignment(backend, device):
    logits, target = (x.to(device) for x in make((2, 9, 7, 12), (18, 24), torch.float32))
    check(logits.contiguous(), target, backend, weight=class_weights(18).to(device)[::2])
    check(logits[:, 1:8, ::2, 3:], target[:, 3:, ::2], backend)
    check(logits[:1].expand(2, -1, -1, -1), target.transpose(1, 2), backend)
    flat = torch.zeros(logits[1:2].numel() + 1, device=device)
    flat[1:] = logits[1:2].permute(0, 2, 3, 1).flatten()
    check(flat[1:].reshape(1, 7, 12, 9).permute(0, 3, 1, 2), target.flatten()[3:435].reshape(1, 18, 24), backend)


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(backend, device, reduction):
    logits, target = (x.to(device) for x in make((2, 4, 5, 6), (10, 12), torch.float32))
    loss, weight_sum, out_of_range, grad = graded(
        logits, torch.full_like(target, 255), reduction=reduction, backend=backend
    )
    assert loss.eq(0).all() and weight_sum == 0 and out_of_range == 0 and grad.eq(0).all()


@on_each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(backend, device, value):
    logits, target = (x.to(device) for x in make((1, 4, 9, 23), (18, 46), torch.float32))
    target = target.remainder(4)
    logits[0, 2, 4, 11] = value
    loss, _, _, grad = graded(logits, target, reduction="none", backend=backend)
    expected, _, _, expected_grad = graded(logits.double(), target, reduction="none", backend="reference")
    torch.testing.assert_close(loss.isnan(), expected.isnan())
    torch.testing.assert_close(grad.isnan(), expected_grad.isnan())
    assert upsample_cross_entropy(logits, target, backend=backend)[0].isfinite() == expected.sum().isfinite()


@on_each_backend
@pytest.mark.parametrize("width", [23, 46])
def test_rows_that_are_not_resized_do_not_mix(backend, device, width):
    """A tap of 0 on the row below would make NaN of its infinity."""
    logits, target = (x.to(device) for x in make((1, 4, 9, 23), (9, width), torch.float32))
    target = target.remainder(4)
    logits[0, :, 4] = -float("inf")
    loss, _, _, grad = graded(logits, target, reduction="none", backend=backend)
    others = [row for row in range(9) if row != 4]
    assert loss[:, others].isfinite().all() and grad[:, :, others].isfinite().all()
    assert loss[:, 4].isnan().all()


@on_each_backend
def test_class_masked_with_minus_infinity(backend, device):
    logits, target = (x.to(device) for x in make((1, 4, 6, 7), (12, 14), torch.float32))
    logits[:, 1] = -float("inf")
    target[target == 1] = 255
    loss, _, _ = upsample_cross_entropy(logits, target, reduction="none", backend=backend)
    expected, _, _ = upsample_cross_entropy_reference(logits.double(), target, per_pixel=True)
    finite = expected.isfinite()  # not where torch multiplies infinity by a tap of 0
    assert finite.float().mean() > 0.5
    assert_close(loss[finite], expected[finite])


@on_each_backend
def test_many_classes_masked_with_minus_infinity(backend, device):
    """A block of classes that starts the running maximum and sum with nothing."""
    logits, target = (x.to(device) for x in make((1, 36, 6, 7), (12, 14), torch.float32))
    logits[:, :32] = -float("inf")
    target = 32 + target.remainder(4)
    loss, _, _ = upsample_cross_entropy(logits, target, reduction="none", backend=backend)
    expected, _, _ = upsample_cross_entropy_reference(logits[:, 32:].double(), target - 32, per_pixel=True)
    assert_close(loss[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1])  # at the edge torch multiplies infinity by a tap of 0


@on_each_backend
def test_opcheck(backend, device):
    op = torch.ops.deeplab_fast.upsample_cross_entropy.default
    logits, target = (x.to(device) for x in make((1, 3, 4, 5), (8, 10), torch.float32))
    for per_pixel in (False, True):
        args = (target, class_weights(3).to(device), 255, 0.1, per_pixel, False, True, backend)
        torch.library.opcheck(op, (logits.detach().requires_grad_(), *args))
    torch.library.opcheck(op, (logits, target, None, 255, 0.0, False, True, False, backend))
    op = torch.ops.deeplab_fast.upsample_cross_entropy_backward.default
    grad_loss = torch.rand(1, 8, 10, device=device)
    torch.library.opcheck(op, (grad_loss, logits, target, None, 255, 0.1, False, backend))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    logits, target = make((1, 3, 3, 4), (7, 9), torch.float64)
    weight = class_weights(3)

    def loss(x: Tensor) -> Tensor:
        return upsample_cross_entropy(x, target, weight=weight, label_smoothing=0.1, reduction=reduction)[0]

    def loss_of_op(x: Tensor) -> Tensor:
        args = (target, weight, 255, 0.1, reduction == "none", False, True, "reference")
        return torch.ops.deeplab_fast.upsample_cross_entropy(x, *args)[0]

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradcheck(loss_of_op, logits)


@needs_native
def test_gradient_only_where_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(native.kernels(), "upsample_cross_entropy_cpu", lambda *args: calls.append(args))
    logits, target = make((1, 3, 4, 5), (8, 10), torch.float32)
    upsample_cross_entropy(logits, target, backend="native")
    with torch.no_grad():
        upsample_cross_entropy(logits.requires_grad_(), target, backend="native")
    assert [args[16] for args in calls] == [0, 0]  # the address of the gradient
    upsample_cross_entropy(logits, target, backend="native")
    assert calls[2][16] != 0
    loss = upsample_cross_entropy(logits, target, reduction="none", backend="native")[0]
    assert calls[3][16] == 0 and len(calls) == 4
    loss.sum().backward()
    assert calls[4][16] != 0 and dispatch.last_backend(BACKWARD) == "native"
    raw = torch.ops.deeplab_fast.upsample_cross_entropy(logits, target, None, 255, 0.0, False, False, False, "native")
    with pytest.raises(RuntimeError, match="needs_grad=False"):
        raw[0].backward()


@on_each_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_runs_are_equal(backend, device, reduction):
    logits, target = (x.to(device) for x in make((2, 19, 3, 9), (12, 36), torch.float32))
    runs = [graded(logits, target, reduction=reduction, backend=backend) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half(backend, device, reduction):
    if backend == "native":
        pytest.skip("the CPU kernels do not take float16")
    logits, target = (x.to(device) for x in make((2, 19, 3, 9), (12, 36), torch.float16))
    check(logits, target, backend, reduction=reduction)


@on_each_backend
def test_logits_far_apart(backend, device):
    """Most exponentials underflow, and no bound but the pixel's own maximum keeps the sum."""
    logits, target = (x.to(device) for x in make((1, 21, 3, 4), (12, 16), torch.float32, scale=300.0))
    check(logits, target, backend, reduction="none")


def launch_all(classes: int, size: tuple[int, int], out: tuple[int, int], dtype: torch.dtype, **options) -> None:
    """Every kernel, on one image that nobody looks at."""
    from deeplab_fast.kernels import upsample_cross_entropy as kernels

    logits, grad = (
        torch.empty((1, classes, *size), dtype=dt).to(memory_format=torch.channels_last)
        for dt in (dtype, torch.float32)
    )
    target = torch.empty((1, *out), dtype=options.get("labels", torch.uint8))
    weight = torch.ones(classes) if options.get("weighted") else None
    rest = (255, options.get("smoothing", 0.0), options.get("align_corners", False))
    kernels.forward(logits, target, weight, None, grad, *rest)
    if options.get("per_pixel"):
        losses = torch.empty((1, *out))
        kernels.forward(logits, target, weight, losses, None, *rest)
        kernels.backward(losses, logits, target, weight, logits, *rest)


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [19, 150])
def test_compiles_ahead_of_time(chip, dtype, classes):
    """Cityscapes' and ADE20K's classes: nothing spills, nothing is atomic, and no exponential is computed twice.

    Loads are not of 16 bytes: a pixel's 19 classes start anywhere, and arithmetic binds.
    """
    found = compile_launches(chip, lambda: launch_all(classes, (128, 256), (512, 1024), dtype))
    assert [kernel.name for kernel in found] == ["losses_kernel", "finish_kernel", "gradient_kernel"]
    for kernel in found:
        assert kernel.stack == 0 and kernel.registers <= 168
        assert not re.search(r"\b(atom|red)\.", kernel.ptx)
    # A lane holds one pixel of each of BLOCK_ROWS rows: of each class one exponential, and one of each block.
    padded = 12 if classes == 19 else 16  # in the code: one block of 8, which a loop or a grid repeats, and the rest
    rows = 4 if chip >= 90 else 2
    assert rows * (padded - 2) <= found[0].ptx.count("ex2.approx") <= rows * (padded + 2)
    assert 2 * (padded - 2) <= found[2].ptx.count("ex2.approx") <= 2 * padded
    assert re.search(r"\b(mul|mad)\.lo\.s64", found[0].ptx) and re.search(r"\b(mul|mad)\.lo\.s64", found[2].ptx)


@needs_compiler
@pytest.mark.parametrize("chip", [80, 90, 120])
def test_every_option_compiles_ahead_of_time(chip):
    cases = [
        (21, (65, 65), (513, 513), torch.bfloat16, {"per_pixel": True, "smoothing": 0.1, "weighted": True}),
        (21, (65, 65), (513, 513), torch.float32, {"align_corners": True, "labels": torch.int64}),
        (11, (90, 120), (360, 480), torch.float16, {"smoothing": 0.1}),
    ]
    for *case, options in cases:
        assert all(kernel.stack == 0 for kernel in compile_launches(chip, lambda: launch_all(*case, **options)))  # noqa: B023
    # A cell of more positions than a program takes is nobody's ratio: 8 bytes may spill.
    options = {"weighted": True, "per_pixel": True}
    found = compile_launches(chip, lambda: launch_all(2, (5, 3), (40, 100), torch.bfloat16, **options))
    assert all(kernel.stack <= 8 for kernel in found)


@needs_native
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_repeatable_for_any_number_of_threads(reduction):
    logits, target = make((2, 19, 40, 33), (160, 132), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(graded(logits, target, reduction=reduction, backend="native"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_under_autocast_the_loss_stays_in_fp32():
    logits, target = make((1, 5, 6, 7), (24, 28), torch.float32)
    for backend in ("auto", "reference"):
        expected = graded(logits, target, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = graded(logits, target, backend=backend)
        assert all(map(torch.equal, result, expected))


@needs_native
def test_no_second_derivative():
    logits, target = make((1, 3, 4, 5), (8, 10), torch.float32)
    logits.requires_grad_()
    loss = upsample_cross_entropy(logits, target, reduction="none", backend="native")[0]
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
    for reduction in ("mean", "sum"):  # beside another loss, too, where the term could be lost unnoticed
        loss = upsample_cross_entropy(logits, target, reduction=reduction, backend="native")[0]
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            (grad.square().sum() + logits.square().sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # fp64 takes the reference inside the op
def test_compile_and_export_hold_one_op_and_name_no_backend(dtype):
    class Loss(torch.nn.Module):
        def __init__(self, reduction: str) -> None:
            super().__init__()
            self.reduction = reduction

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return upsample_cross_entropy(logits, target, label_smoothing=0.1, reduction=self.reduction)[0]

    logits, target = make((2, 5, 9, 11), (36, 44), dtype)
    for reduction in ("mean", "none"):
        module = Loss(reduction)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        results = []
        for run in (module, compiled):
            x = logits.clone().requires_grad_()
            loss = run(x, target)
            loss.sum().backward()
            results.append((loss.detach(), x.grad))
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs)
        exported = torch.export.export(module, (logits, target))
        calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.upsample_cross_entropy.default]
        assert [call.args[-1] for call in calls] == ["auto"]


def test_rejects_bad_input():
    logits, target = make((2, 3, 4, 5), (8, 10), torch.float32)
    for bad, options, message in [
        ((logits[0], target), {}, r"logits are \(3, 4, 5\) torch.float32; expected \(N, K, h, w\) floats"),
        ((logits.long(), target), {}, "logits are .* torch.int64; expected"),
        ((logits[:, :0], target), {}, r"logits are \(2, 0, 4, 5\)"),
        ((logits, target[:1]), {}, r"target is \(1, 8, 10\); expected \(N, H, W\) with N = 2"),
        ((logits, target[:, :0]), {}, r"target is \(2, 0, 10\)"),
        ((logits, target.bool()), {}, "target is torch.bool; expected integers"),
        ((logits, target.float()), {}, "target is torch.float32; expected integers"),
        ((logits, target), {"weight": torch.ones(4)}, r"weight is \(4,\) torch.float32; expected \(3,\)"),
        ((logits, target), {"weight": torch.ones(3, requires_grad=True)}, "weight requires a gradient"),
        ((logits, target.to("meta")), {}, "target is on meta and logits on cpu"),
        ((logits, target), {"label_smoothing": 1.5}, "label_smoothing is 1.5; expected 0 to 1"),
        ((logits, target), {"reduction": "max"}, "reduction is 'max'; expected mean, sum or none"),
    ]:
        with pytest.raises(ValueError, match=message):
            upsample_cross_entropy(*bad, **options)
    with pytest.raises(UserError, match="has no backend 'cudnn'"):
        upsample_cross_entropy(logits, target, backend="cudnn")
    with pytest.raises(UserError, match="the CPU kernels take float32 or bfloat16"):
        upsample_cross_entropy(logits.half(), target, backend="native")


def test_reference_of_fp16_computes_in_fp32():
    logits, target = make((1, 3, 4, 5), (8, 10), torch.float16)
    assert_close(
        graded(logits, target)[0],
        upsample_cross_entropy_reference(logits.double(), target)[0]
        / (upsample_cross_entropy_reference(logits, target)[1]),
    )
    assert graded(logits, target)[3].dtype == torch.float16

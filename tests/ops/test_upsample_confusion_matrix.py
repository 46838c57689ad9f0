from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import confusion_matrix, dispatch, native, upsample_argmax, upsample_confusion_matrix
from deeplab_fast.ops.native import LABEL_DTYPES
from deeplab_fast.ops.upsample_confusion_matrix import LARGEST_NATIVE_CLASSES, upsample_confusion_matrix_reference
from deeplab_fast.testing import assert_close, backends

OP = "upsample_confusion_matrix"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))

SHAPES = [
    ((1, 1, 1, 1), (1, 1)),  # one class, one pixel
    ((2, 3, 1, 1), (5, 37)),  # one source pixel
    ((0, 19, 4, 5), (8, 10)),  # no image
    ((2, 19, 16, 32), (64, 128)),  # the usual factor 4
    ((1, 21, 13, 17), (97, 129)),  # odd everywhere
    ((3, 90, 7, 9), (28, 36)),  # one table of counts a thread: four leave the cache
    ((1, 4, 40, 90), (11, 16)),  # shrinks
    ((1, 300, 5, 6), (21, 70)),  # more classes than a byte holds
]


def random_logits(shape: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float32, coarse: int = 1) -> Tensor:
    """coarse: this many columns are alike, so that groups of pixels are decided at their corners."""
    columns = torch.randn((*shape[:3], -(-shape[3] // coarse)), generator=torch.Generator().manual_seed(seed))
    return columns.repeat_interleave(coarse, 3)[..., : shape[3]].to(dtype)


def random_target(
    shape: tuple[int, ...], classes: int, *, seed: int, dtype: torch.dtype = torch.uint8, run: int = 20
) -> Tensor:
    """Labels in runs of up to `run` pixels, among them 255, -1 and K where the type can hold them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    values = torch.randint(0, classes, (size,), generator=generator)
    for wrong in (255, -1, classes, -100):
        if torch.iinfo(dtype).min <= wrong <= torch.iinfo(dtype).max:
            values[torch.rand(size, generator=generator) < 0.05] = wrong
    lengths = torch.randint(1, run + 1, (size,), generator=generator)
    return values.repeat_interleave(lengths)[:size].reshape(shape).to(dtype)


def check(
    logits: Tensor, target: Tensor, backend: str, *, ignore_index: int | None = 255, align_corners: bool = False
) -> None:
    """The count of the labels that the same backend of upsample_argmax gives; those have their own oracle."""
    counts, out_of_range = upsample_confusion_matrix(
        logits, target, ignore_index=ignore_index, align_corners=align_corners, backend=backend
    )
    assert dispatch.last_backend(OP) == backend
    assert counts.dtype == out_of_range.dtype == torch.int64
    classes = logits.shape[1]
    if classes <= 256:
        labels = upsample_argmax(logits, tuple(target.shape[1:]), align_corners=align_corners, backend=backend)
        expected = confusion_matrix(labels, target, classes, ignore_index=ignore_index, backend="reference")
        assert_close(counts, expected[0])
        assert_close(out_of_range, expected[1])
    else:
        expected = upsample_confusion_matrix_reference(logits, target, ignore_index, align_corners)
        assert_close(out_of_range, expected[1])
        assert_close(counts.sum(1), expected[0].sum(1))
        assert (counts - expected[0]).abs().sum() <= 2 * (target.numel() // 10_000)


@on_each_backend
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_counts_the_upsampled_labels(backend, device, shape, size, dtype, align_corners):
    if backend == "native" and shape[1] > (most := LARGEST_NATIVE_CLASSES[device]):
        pytest.skip(f"the kernel takes at most {most} classes")
    for coarse, run in ((1, 1), (1, 400), (9, 30), (100, 4000)):
        logits = random_logits(shape, seed=0, dtype=dtype, coarse=coarse).to(device)
        target = random_target((shape[0], *size), shape[1], seed=1, run=run, dtype=torch.int16).to(device)
        check(logits, target, backend, align_corners=align_corners)


def test_definition_by_hand():
    logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 3.0]]]])
    target = torch.tensor([[[0, 1, 1, 1, 0, 255, 2, -1]]])
    for backend in ("reference", "auto"):
        counts, out_of_range = upsample_confusion_matrix(logits, target, backend=backend)
        assert counts.tolist() == [[1, 1], [3, 0]] and out_of_range.item() == 2
        counts, out_of_range = upsample_confusion_matrix(logits, target, ignore_index=None, backend=backend)
        assert counts.tolist() == [[1, 1], [3, 0]] and out_of_range.item() == 3


@on_each_backend
@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_every_integer_type(backend, device, dtype):
    logits = random_logits((2, 7, 5, 33), seed=2).to(device)
    target = random_target((2, 20, 131), 7, seed=3, dtype=dtype).to(device)
    for ignore_index in (255, -1, 3, 2**40, None):
        check(logits, target, backend, ignore_index=ignore_index)


@on_each_backend
def test_labels_beyond_32_bits(backend, device):
    target = random_target((1, 20, 131), 7, seed=3, dtype=torch.int64).to(device)
    target[..., ::7] = 2**40
    target[..., 1::7] = 2**32 + 1  # 1, were it cut to 32 bits
    for ignore_index in (255, 2**40):
        check(random_logits((1, 7, 5, 33), seed=2).to(device), target, backend, ignore_index=ignore_index)


@on_each_backend
def test_any_strides(backend, device):
    logits = random_logits((2, 7, 15, 33), seed=4).to(device)
    target = random_target((2, 40, 100), 7, seed=5).to(device)
    for view in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, 2:, 3:],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand_as(x),
    ):
        check(view(logits), target, backend)
    for view in (lambda x: x[:, 3:, 5:61], lambda x: x.transpose(1, 2), lambda x: x[:1].expand_as(x)):
        check(logits, view(target), backend)


@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_every_instruction_set(instruction_set, shape, size):
    for dtype in (torch.float32, torch.bfloat16):
        for coarse, run in ((1, 1), (9, 300)):
            logits = random_logits(shape, seed=6, dtype=dtype, coarse=coarse)
            check(logits, random_target((shape[0], *size), shape[1], seed=7, run=run), "native")
            assert native.load().instruction_set() == instruction_set


def test_nan_is_above_every_number():
    logits = random_logits((1, 5, 6, 40), seed=8)
    logits[:, 3, 2] = float("nan")
    target = torch.zeros(1, 6, 40, dtype=torch.uint8)
    for backend in ("reference", "auto"):
        assert upsample_confusion_matrix(logits, target, backend=backend)[0][0, 3] >= 40


def test_threads_and_runs_do_not_change_the_counts():
    logits = random_logits((2, 19, 40, 50), seed=9)
    target = random_target((2, 160, 201), 19, seed=10)
    expected = upsample_confusion_matrix(logits, target, backend="native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, upsample_confusion_matrix(logits, target, backend="native"), expected))
    finally:
        torch.set_num_threads(before)


def test_what_takes_the_reference():
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    for logits, why in (
        (random_logits((1, 3, 4, 4), seed=0).double(), "the CPU kernels take float32 or bfloat16"),
        (random_logits((1, 1025, 4, 4), seed=0), "the CPU kernel takes at most 1024 classes, and got 1025"),
    ):
        assert upsample_confusion_matrix(logits, target)[0].sum() == 64
        assert dispatch.last_backend(OP) == "reference"
        with pytest.raises(UserError, match=why):
            upsample_confusion_matrix(logits, target, backend="native")


@on_each_backend
def test_opcheck(backend, device):
    logits = random_logits((2, 5, 6, 7), seed=11).to(device)
    target = random_target((2, 12, 13), 5, seed=12).to(device)
    for ignore_index in (255, None):
        arguments = (logits, target, ignore_index, False, backend)
        torch.library.opcheck(torch.ops.deeplab_fast.upsample_confusion_matrix.default, arguments)


@on_each_backend
def test_has_no_gradient(backend, device):
    logits = random_logits((1, 5, 6, 7), seed=13).to(device).requires_grad_()
    target = random_target((1, 12, 13), 5, seed=14).to(device)
    assert not any(x.requires_grad for x in upsample_confusion_matrix(logits, target, backend=backend))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", list(dispatch.OPS[OP].backends))
def test_captured_in_a_cuda_graph(backend):
    logits = random_logits((2, 19, 32, 64), seed=17).cuda()
    target = random_target((2, 128, 256), 19, seed=18).cuda()
    if reason := dispatch.explain(OP, logits, target, 255, False)[backend]:
        pytest.skip(reason)
    upsample_confusion_matrix(logits, target, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counted = upsample_confusion_matrix(logits, target, backend=backend)
    target.copy_(target.flip(0))
    graph.replay()
    assert all(map(torch.equal, counted, upsample_confusion_matrix(logits, target, backend=backend)))


def test_compile_and_export_hold_one_op_and_name_no_backend(tmp_path):
    class Count(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return upsample_confusion_matrix(2 * logits, target)

    inputs = random_logits((2, 5, 6, 7), seed=15), random_target((2, 24, 28), 5, seed=16)
    expected = Count()(*inputs)
    compiled = torch.compile(Count(), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*inputs), expected))
    exported = torch.export.export(Count(), inputs)
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.upsample_confusion_matrix.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    torch.export.save(exported, tmp_path / "count.pt2")
    loaded = torch.export.load(tmp_path / "count.pt2").module()
    assert all(map(torch.equal, loaded(*inputs), expected))


def test_rejects_bad_input():
    logits, target = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"logits are torch.int64 \(2, 3, 4, 5\); expected floating \(N, K, h, w\)"):
        upsample_confusion_matrix(logits.long(), target)
    with pytest.raises(ValueError, match="target is torch.bool; expected uint8"):
        upsample_confusion_matrix(logits, target.bool())
    for wrong in (target[:1], target[0]):
        with pytest.raises(ValueError, match=r"target is \(.*\); expected \(2, H, W\)"):
            upsample_confusion_matrix(logits, wrong)
    with pytest.raises(ValueError, match="logits are on cpu and target on meta"):
        upsample_confusion_matrix(logits, target.to("meta"))
    for classes in (0, 32_769):
        with pytest.raises(ValueError, match=f"logits have {classes} classes; expected 1 to 32768"):
            upsample_confusion_matrix(torch.zeros(2, classes, 1, 1), target)
    with pytest.raises(ValueError, match=r"cannot upsample \(4, 5\) to \(0, 10\)"):
        upsample_confusion_matrix(logits, target[:, :0])

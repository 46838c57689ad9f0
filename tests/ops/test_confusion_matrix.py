from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import confusion_matrix, dispatch, native
from deeplab_fast.ops.native import LABEL_DTYPES
from deeplab_fast.testing import assert_close, backends

OP = "confusion_matrix"
ROOT = Path(__file__).resolve().parents[2]
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))

SHAPES = [
    (0,),  # nothing
    (2, 0, 5),
    (),  # one pixel
    (1, 1),
    (63,),  # one less than a block of the CPU kernel
    (64,),
    (3, 65, 67),  # no multiple of anything
    (2, 256, 300),  # above 32768 pixels, so that several threads work
]


def counted(prediction: Tensor, target: Tensor, classes: int, ignore: int | None) -> tuple[Tensor, Tensor]:
    """The definition, one pair of labels after another."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    out_of_range = torch.tensor(0)
    pairs = Counter(zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    for (p, t), pixels in pairs.items():
        if ignore is not None and t == ignore:
            continue
        if 0 <= p < classes and 0 <= t < classes:
            counts[t, p] += pixels
        else:
            out_of_range += pixels
    return counts, out_of_range


def label_map(shape: tuple[int, ...], dtype: torch.dtype, classes: int, *, seed: int, run: int) -> Tensor:
    """Labels in runs of up to `run` pixels, among them 255, -1 and K where the type can hold them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    values = torch.randint(0, classes, (size,), generator=generator)
    for wrong in (255, -1, classes, -100):
        if torch.iinfo(dtype).min <= wrong <= torch.iinfo(dtype).max:
            values[torch.rand(size, generator=generator) < 0.02] = wrong
    lengths = torch.randint(1, run + 1, (size,), generator=generator)
    return values.repeat_interleave(lengths)[:size].reshape(shape).to(dtype)


def check(prediction: Tensor, target: Tensor, classes: int, ignore: int | None, backend: str) -> None:
    counts, out_of_range = confusion_matrix(prediction, target, classes, ignore_index=ignore, backend=backend)
    assert dispatch.last_backend(OP) == backend
    assert counts.dtype == out_of_range.dtype == torch.int64
    assert counts.device == out_of_range.device == target.device
    expected_counts, expected_out_of_range = counted(prediction, target, classes, ignore)
    assert_close(counts.cpu(), expected_counts)
    assert_close(out_of_range.cpu(), expected_out_of_range)


def test_definition_by_hand():
    target = torch.tensor([0, 0, 1, 2, 255, 255, 3, 1], dtype=torch.uint8)
    prediction = torch.tensor([0, 1, 1, 2, 0, 200, 0, 7])
    for backend in ("reference", "auto"):
        counts, out_of_range = confusion_matrix(prediction, target, 3, backend=backend)
        assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
        assert out_of_range.item() == 2  # target 3, and prediction 7 at target 1; under 255 anything goes


@on_each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", [1, 12, 500])
def test_matches_definition(backend, device, shape, run):
    prediction = label_map(shape, torch.int64, 19, seed=1, run=run).to(device)
    target = label_map(shape, torch.uint8, 19, seed=2, run=run).to(device)
    check(prediction, target, 19, 255, backend)


@on_each_backend
@pytest.mark.parametrize("types", list(itertools.product(LABEL_DTYPES, repeat=2)), ids=str)
def test_every_pair_of_integer_types(backend, device, types):
    prediction = label_map((5, 517), types[0], 7, seed=3, run=9).to(device)
    target = label_map((5, 517), types[1], 7, seed=4, run=9).to(device)
    for ignore in (255, -1, None):
        check(prediction, target, 7, ignore, backend)


@on_each_backend
# 90: one table a thread; 255: the last with bins of 16 bits; 300: no shared memory
@pytest.mark.parametrize("classes", [1, 2, 19, 90, 150, 255, 256, 300])
def test_number_of_classes(backend, device, classes):
    prediction = label_map((40_000,), torch.int32, classes, seed=5, run=3).to(device)
    target = label_map((40_000,), torch.int32, classes, seed=6, run=3).to(device)
    check(prediction, target, classes, 255, backend)


@on_each_backend
@pytest.mark.parametrize("ignore", [0, 3, -100, 255, 2**16 - 2, 2**16 - 1, 2**40, None])
def test_ignore_index(backend, device, ignore):
    target = label_map((3000,), torch.int64, 5, seed=7, run=4).to(device)
    target[::7] = 2**40
    target[1::7] = 2**32 + 1  # 1, were it cut to 32 bits
    target[2::7] = 2**16 + 1  # the same to 16
    target[3::14] = 2**16 - 1
    target[10::14] = 2**16 - 2
    prediction = label_map((3000,), torch.int64, 5, seed=8, run=4).to(device)
    prediction[::11] = 2**16 + 2
    prediction[1::11] = 2**16 - 1
    check(prediction, target, 5, ignore, backend)
    if ignore is None or ignore < 2**31:
        check(prediction.int(), target.clamp(max=2**31 - 1).int(), 5, ignore, backend)


@on_each_backend
def test_any_strides_and_alignment(backend, device):
    prediction = label_map((6, 50, 70), torch.int64, 5, seed=9, run=8).to(device)
    target = label_map((6, 50, 70), torch.uint8, 5, seed=10, run=8).to(device)
    for view in (
        lambda x: x[:, 3:, 5:61],
        lambda x: x.transpose(0, 2),
        lambda x: x[::2, ::3, 1],
        lambda x: x[:1].expand(4, 50, 70),
        lambda x: x.flatten()[3:],  # not aligned to a vector
    ):
        check(view(prediction), view(target), 5, 255, backend)
    check(prediction.transpose(1, 2), target.transpose(1, 2).contiguous(), 5, 255, backend)


@on_each_backend
def test_all_ignored(backend, device):
    target = torch.full((3, 70), 255, dtype=torch.uint8, device=device)
    counts, out_of_range = confusion_matrix(torch.full_like(target, 99), target, 4, backend=backend)
    assert counts.sum() == 0 and out_of_range == 0


@on_each_backend
def test_opcheck(backend, device):
    prediction = label_map((4, 33), torch.int64, 3, seed=11, run=5).to(device)
    target = label_map((4, 33), torch.uint8, 3, seed=12, run=5).to(device)
    torch.library.opcheck(torch.ops.deeplab_fast.confusion_matrix.default, (prediction, target, 3, 255, backend))
    torch.library.opcheck(torch.ops.deeplab_fast.confusion_matrix.default, (prediction, target, 3, None, backend))


def instruction_sets() -> list[str]:
    module = native.load()
    return module.instruction_sets() if module else []


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("run", [1, 3, 40, 400])  # single pixels, few runs a block, uniform blocks
def test_every_instruction_set(name, run):
    if name not in instruction_sets():
        pytest.skip(f"this processor has no kernels for {name}")
    module = native.load()
    before = module.instruction_set()
    module.use_instruction_set(name)
    try:
        assert module.instruction_set() == name
        for types in itertools.product((torch.uint8, torch.int32, torch.int64), repeat=2):
            prediction = label_map((9001,), types[0], 19, seed=13, run=run)
            target = label_map((9001,), types[1], 19, seed=14, run=run)
            check(prediction, target, 19, 255, "native")
    finally:
        module.use_instruction_set(before)


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="no kernels for the instruction set mmx"):
        native.load().use_instruction_set("mmx")


def test_threads_do_not_change_the_counts():
    prediction = label_map((400, 401), torch.int64, 19, seed=15, run=6)
    target = label_map((400, 401), torch.uint8, 19, seed=16, run=6)
    expected = confusion_matrix(prediction, target, 19, backend="reference")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, confusion_matrix(prediction, target, 19), expected))
    finally:
        torch.set_num_threads(before)


# 1024: fewer tables than threads; 4096: none at all
LARGE_K = """
import resource
import torch
from deeplab_fast.ops import confusion_matrix, dispatch
torch.set_num_threads(16)
labels = torch.randint(-3, {classes} + 3, (2, 16 * 32_768 + 77), generator=torch.Generator().manual_seed(0)).int()
labels[1, ::9] = 255
prediction, target = labels
bins = target.long() * {classes} + prediction
within = ((labels >= 0) & (labels < {classes})).all(0)
places, pixels = bins[within & (target != 255)].unique(return_counts=True)
confusion_matrix(prediction, target, 5, backend="native")  # the threads are there now
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + {classes} ** 2 * 8 + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
counts, out_of_range = confusion_matrix(prediction, target, {classes}, backend="native")
assert dispatch.last_backend("confusion_matrix") == "native"
assert torch.equal(counts.flatten()[places], pixels) and counts.sum() == pixels.sum()
assert out_of_range == (~within & (target != 255)).sum()
"""


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
@pytest.mark.parametrize("classes", [1024, 4096])
def test_private_tables_of_many_threads_stay_small(classes):
    command = [sys.executable, "-c", LARGE_K.format(classes=classes)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not instruction_sets(), reason="deeplab_fast._C is not built")
@pytest.mark.parametrize("types", list(itertools.product(LABEL_DTYPES, repeat=2)), ids=str)
def test_straight_into_large_counts(types):
    prediction = label_map((70, 65), types[0], 2100, seed=20, run=5)
    target = label_map((70, 65), types[1], 2100, seed=21, run=5)
    for ignore in (255, None):
        check(prediction, target, 2100, ignore, "native")


def test_compile_and_export_hold_one_op_and_name_no_backend(tmp_path):
    class Count(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return confusion_matrix(logits.argmax(1), target, 5)

    logits = torch.randn(2, 5, 9, 11, generator=torch.Generator().manual_seed(0))
    target = label_map((2, 9, 11), torch.uint8, 5, seed=17, run=3)
    expected = Count()(logits, target)
    compiled = torch.compile(Count(), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(logits, target), expected))
    exported = torch.export.export(Count(), (logits, target))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.confusion_matrix.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    torch.export.save(exported, tmp_path / "counter.pt2")
    loaded = torch.export.load(tmp_path / "counter.pt2").module()
    assert all(map(torch.equal, loaded(logits, target), expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", list(dispatch.OPS[OP].backends))
def test_captured_in_a_cuda_graph(backend):
    prediction = label_map((2, 300, 301), torch.int64, 19, seed=18, run=6).cuda()
    target = label_map((2, 300, 301), torch.uint8, 19, seed=19, run=6).cuda()
    if reason := dispatch.explain(OP, prediction, target, 19, 255)[backend]:
        pytest.skip(reason)
    confusion_matrix(prediction, target, 19, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = confusion_matrix(prediction, target, 19, backend=backend)
    prediction.copy_(target.flip(0))
    graph.replay()
    expected = confusion_matrix(prediction.cpu(), target.cpu(), 19, backend="reference")
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(result, expected, strict=True))


def test_rejects_what_is_not_a_pair_of_label_maps():
    labels = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"prediction is torch.float32; expected uint8, int8"):
        confusion_matrix(labels.float(), labels, 2)
    with pytest.raises(ValueError, match=r"target is torch.bool; expected uint8"):
        confusion_matrix(labels, labels.bool(), 2)
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\) and target \(3, 2\)"):
        confusion_matrix(labels, labels.T, 2)
    with pytest.raises(ValueError, match="prediction is on cpu and target on meta"):
        confusion_matrix(labels, labels.to("meta"), 2)
    for classes in (0, -1, 32_769):
        with pytest.raises(ValueError, match=f"num_classes is {classes}; expected 1 to 32768"):
            confusion_matrix(labels, labels, classes)


def test_rejects_an_unknown_backend():
    labels = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(UserError, match="confusion_matrix has no backend 'triton'; it has native, reference"):
        confusion_matrix(labels, labels, 2, backend="triton")

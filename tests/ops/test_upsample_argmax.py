from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, native, upsample_argmax
from deeplab_fast.ops.upsample_argmax import upsample_argmax_reference
from deeplab_fast.testing import assert_close, backends

OP = "upsample_argmax"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
on_each_corner = pytest.mark.parametrize("align_corners", [False, True])
EPSILON = torch.finfo(torch.float32).eps

SHAPES = [
    ((1, 1, 1, 1), (1, 1)),  # one class, one pixel
    ((2, 3, 1, 1), (5, 37)),  # one source pixel
    ((1, 17, 1, 9), (1, 70)),  # one row, one class more than a vector of them
    ((1, 19, 9, 1), (33, 3)),  # one source column
    ((0, 19, 4, 5), (8, 10)),  # no image
    ((2, 19, 16, 32), (64, 128)),  # the usual factor 4
    ((1, 21, 13, 17), (97, 129)),  # odd everywhere
    ((1, 150, 16, 33), (65, 64)),  # hardly upsampled: a vector of pixels reads more than one of source columns
    ((1, 4, 40, 90), (11, 16)),  # shrinks
    ((1, 5, 31, 33), (31, 33)),  # the same size
    ((1, 256, 5, 6), (21, 22)),  # the most classes
    ((3, 11, 12, 15), (48, 60)),  # several images, and rows of them in one thread
]
LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nchw": lambda x: x.contiguous(),
    "crop": lambda x: F.pad(x, (3, 2, 1, 4))[:, :, 1 : 1 + x.shape[2], 3 : 3 + x.shape[3]],
    "last_crop": lambda x: F.pad(x, (1, 0, 2, 0, 1, 0)).contiguous(memory_format=torch.channels_last)[:, 1:, 2:, 1:],
    "every_other_column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # not aligned to a vector
}


def random_logits(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def smooth_logits(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """As a network's: regions of one class, so that most groups of pixels are decided at their corners."""
    coarse = random_logits((shape[0], shape[1], shape[2] // 8 + 2, shape[3] // 8 + 2), seed=seed)
    return (4 * F.interpolate(coarse, size=shape[2:], mode="bicubic")).to(dtype)


def assert_labels(labels: Tensor, logits: Tensor, size: tuple[int, int], align_corners: bool) -> None:
    """Equal to the oracle in fp64, except for a few pixels whose two logits differ by no more than rounding."""
    assert labels.dtype == torch.uint8 and labels.shape == (logits.shape[0], *size) and labels.is_contiguous()
    upsampled = F.interpolate(logits.cpu().double(), size=size, mode="bilinear", align_corners=align_corners)
    labels, expected = labels.cpu().long()[:, None], upsampled.argmax(1, keepdim=True)
    differing = labels != expected
    assert differing.sum() <= 1 + labels.numel() // 2000
    gap = (upsampled.gather(1, expected) - upsampled.gather(1, labels))[differing]
    # fp32 has the position, and so the weights, to within the source's size in ulps.
    bound = 4 * EPSILON * max(logits.shape[2:]) * logits.double().abs().max().cpu() if differing.any() else 0.0
    assert (gap <= bound).all()


@on_each_backend
@on_each_corner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_matches_reference(backend, device, shape, size, dtype, align_corners):
    for make in (random_logits, smooth_logits):
        logits = make(shape, dtype=dtype).to(device)
        labels = upsample_argmax(logits, size, align_corners=align_corners, backend=backend)
        assert dispatch.last_backend(OP) == backend
        assert_labels(labels, logits, size, align_corners)


@on_each_corner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_every_instruction_set(instruction_set, shape, size, dtype, align_corners):
    for make in (random_logits, smooth_logits):
        for layout in ("channels_last", "nchw"):
            logits = LAYOUTS[layout](make(shape, seed=1, dtype=dtype))
            labels = upsample_argmax(logits, size, align_corners=align_corners, backend="native")
            assert native.load().instruction_set() == instruction_set
            assert_labels(labels, logits, size, align_corners)


@on_each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_alignment(backend, device, layout, dtype):
    for shape in ((2, 19, 9, 21), (1, 1, 5, 7), (2, 3, 1, 1)):
        logits = LAYOUTS[layout](random_logits(shape, seed=2, dtype=dtype)).to(device)
        before = native.conversions
        labels = upsample_argmax(logits, (30, 50), backend=backend)
        copied = backend == "native" and logits.stride(1) != 1 and logits.stride(3) != 1
        assert native.conversions - before == copied
        assert_labels(labels, logits, (30, 50), False)
    expanded = random_logits((1, 5, 6, 7), dtype=dtype).to(device).expand(3, 5, 6, 7)
    assert_labels(upsample_argmax(expanded, (12, 13), backend=backend), expanded, (12, 13), False)


@on_each_backend
@on_each_corner
def test_fp16(backend, device, align_corners):
    if (backend, device) == ("native", "cpu"):
        pytest.skip("the CPU kernels take no float16")
    for shape, size in SHAPES:
        logits = smooth_logits(shape, seed=7, dtype=torch.float16).to(device)
        labels = upsample_argmax(logits, size, align_corners=align_corners, backend=backend)
        assert dispatch.last_backend(OP) == backend
        assert_labels(labels, logits, size, align_corners)


@on_each_corner
def test_ties_go_to_the_lowest_class(instruction_set, align_corners):
    """Few values, so that most pixels have several largest logits; the weights are exact in fp32."""
    logits = random_logits((2, 19, 17, 33), seed=3).round().clamp(-1, 1)
    for values in (torch.zeros_like(logits), logits, logits.repeat_interleave(3, 2).repeat_interleave(3, 3)):
        size = (2 * values.shape[2], 2 * values.shape[3])
        if align_corners:
            size = (2 * values.shape[2] - 1, 2 * values.shape[3] - 1)
        labels = upsample_argmax(values, size, align_corners=align_corners, backend="native")
        assert_close(labels, upsample_argmax_reference(values.double(), list(size), align_corners))


# Weights that are exact in fp32: beside Inf it matters whether a weight is 0 or rounded away from it.
EXACT = {
    False: [
        ((2, 19, 16, 32), (64, 128)),
        ((1, 21, 9, 40), (18, 80)),
        ((1, 4, 40, 80), (10, 20)),
        ((1, 3, 1, 1), (4, 32)),
    ],
    True: [
        ((2, 19, 17, 33), (65, 129)),
        ((1, 21, 9, 40), (17, 79)),
        ((1, 4, 41, 81), (11, 21)),
        ((1, 3, 1, 1), (4, 32)),
    ],
}


@on_each_corner
@pytest.mark.parametrize("share", [0.001, 0.3])
def test_nan_and_infinities_as_torch_has_them(instruction_set, share, align_corners):
    for shape, size in [*EXACT[align_corners], ((1, 5, 31, 33), (31, 33))]:
        for make in (random_logits, smooth_logits):
            logits = make(shape, seed=4)
            for seed, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38, -3e38)):
                chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
                logits[chosen] = value
            labels = upsample_argmax(logits, size, align_corners=align_corners, backend="native")
            expected = upsample_argmax_reference(logits, list(size), align_corners)
            assert (labels != expected).sum() <= expected.numel() // 2000


def test_masked_class_is_never_chosen():
    logits = smooth_logits((1, 7, 9, 40), seed=5)
    logits[:, 2:4] = -1e30
    assert not torch.isin(upsample_argmax(logits, (36, 160)), torch.tensor([2, 3])).any()


def test_threads_and_runs_do_not_change_the_labels():
    logits = random_logits((2, 19, 40, 50), seed=6).contiguous(memory_format=torch.channels_last)
    expected = upsample_argmax(logits, (160, 201), backend="native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(upsample_argmax(logits, (160, 201), backend="native"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_take_the_reference(dtype):
    logits = random_logits((1, 5, 6, 7), dtype=dtype)
    labels = upsample_argmax(logits, (24, 28))
    assert dispatch.last_backend(OP) == "reference"
    assert_labels(labels, logits, (24, 28), False)
    with pytest.raises(UserError, match="the CPU kernels take float32 or bfloat16"):
        upsample_argmax(logits, (24, 28), backend="native")


def test_what_the_cuda_kernels_take(monkeypatch):
    """Asked of stand-ins for tensors, so that no GPU is needed."""
    monkeypatch.setattr(native, "why_not", lambda device: None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert native.float_why_not(SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)) is None
    double = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float64)
    assert native.float_why_not(double) == (
        "the CUDA kernels take float32, bfloat16 or float16, one for all, and got float64"
    )
    assert "no native kernel of it for the device cuda:0" in native.cpu_why_not(double)


@on_each_backend
def test_opcheck(backend, device):
    logits = random_logits((2, 5, 6, 7)).to(device)
    torch.library.opcheck(torch.ops.deeplab_fast.upsample_argmax.default, (logits, [12, 13], False, backend))


@on_each_backend
def test_has_no_gradient(backend, device):
    logits = random_logits((1, 5, 6, 7)).to(device).requires_grad_()
    assert not upsample_argmax(logits, (12, 13), backend=backend).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", list(dispatch.OPS[OP].backends))
def test_captured_in_a_cuda_graph(backend):
    logits = random_logits((2, 19, 32, 64)).cuda()
    if reason := dispatch.explain(OP, logits, [128, 256], False)[backend]:
        pytest.skip(reason)
    upsample_argmax(logits, (128, 256), backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = upsample_argmax(logits, (128, 256), backend=backend)
    logits.copy_(logits.flip(0))
    graph.replay()
    assert_labels(labels, logits, (128, 256), False)


def test_compile_and_export_hold_one_op_and_name_no_backend(tmp_path):
    class Predict(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return upsample_argmax(2 * logits, (24, 28))

    logits = random_logits((2, 5, 6, 7))
    expected = Predict()(logits)
    assert torch.equal(torch.compile(Predict(), backend="aot_eager", fullgraph=True)(logits), expected)
    exported = torch.export.export(Predict(), (logits,))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.upsample_argmax.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    torch.export.save(exported, tmp_path / "predict.pt2")
    assert torch.equal(torch.export.load(tmp_path / "predict.pt2").module()(logits), expected)


def test_rejects_bad_input():
    logits = torch.zeros(1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"logits are torch.int64 \(1, 3, 4, 5\); expected floating \(N, K, h, w\)"):
        upsample_argmax(logits.long(), (8, 10))
    with pytest.raises(ValueError, match=r"logits are torch.float32 \(3, 4, 5\); expected floating"):
        upsample_argmax(logits[0], (8, 10))
    for classes in (0, 257):
        with pytest.raises(ValueError, match=f"logits have {classes} classes; expected 1 to 256"):
            upsample_argmax(torch.zeros(1, classes, 2, 2), (8, 10))
    for size in ((8,), (0, 10), (8, -1)):
        with pytest.raises(ValueError, match=r"cannot upsample \(4, 5\) to"):
            upsample_argmax(logits, size)
    with pytest.raises(ValueError, match=r"cannot upsample \(0, 5\) to \(8, 10\)"):
        upsample_argmax(logits[:, :, :0], (8, 10))

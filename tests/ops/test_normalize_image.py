from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, gpu, native, normalize_image
from deeplab_fast.ops.normalize_image import GREY, MEAN, STD, normalize_image_reference
from deeplab_fast.testing import assert_close, backends
from tests.ahead_of_time import CHIPS, compile_launches, needs_compiler
from tests.interpreted import INTERPRET, crossed

OP = "normalize_image"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
built = native.load() is not None
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SHAPES = [
    (0, 3, 4),
    (2, 0, 4),
    (1, 1, 1),
    (2, 1, 50),  # one row, wider than all vectors
    (1, 50, 1),
    (2, 5, 16),  # whole vectors
    (3, 17, 23),  # no multiple of anything
    (2, 150, 131),  # above 16384 pixels, so that several threads work
]
if INTERPRET:  # which has no threads
    SHAPES[-1] = (2, 41, 131)
# brightness, contrast, saturation, sigma
COLOURS = {
    "none": None,
    "neutral": [(1, 1, 1, 0)],
    "jitter": [(1.3, 0.8, 1.2, 0), (0.7, 1.3, 0.6, 0), (1, 1, 1, 0)],
    "no mean": [(1.3, 1, 1.2, 0), (1, 1, 0, 0), (0, 1, 1, 0)],  # contrast is what asks for it
    "blur": [(1, 1, 1, 1.5), (1, 1, 1, 0), (1, 1, 1, 0.01)],  # from wide to none at all
    "all": [(1.3, 0.8, 1.2, 0.7), (0.7, 1.3, 0.6, 0), (1.1, 1, 0.9, 2.5)],
}


def images_of(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed)).byte()


def colour_of(name: str, n: int) -> Tensor | None:
    rows = COLOURS[name]
    return (
        None if rows is None else torch.tensor([rows[i % len(rows)] for i in range(n)], dtype=torch.float32).view(n, 4)
    )


def exact(images: Tensor, colour: Tensor | None) -> Tensor:
    return normalize_image_reference(images, colour, torch.float64)


def check(images: Tensor, colour: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    x = normalize_image(images, colour, dtype=dtype, backend=backend)
    assert dispatch.last_backend(OP) == backend
    n, height, width, _ = images.shape
    assert x.shape == (n, 3, height, width) and x.dtype == dtype and x.device == images.device
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = exact(images, colour)
    assert_close(x, expected)
    if x.numel() and dtype == torch.float32:  # 1/255 of a pixel's range, with much to spare
        std = torch.tensor(STD, dtype=torch.float64, device=x.device).view(3, 1, 1)
        assert ((x.double() - expected) * std).abs().max() <= 1 / 255 / 100
    return x


def test_definition_by_hand():
    images = images_of((2, 4, 5))
    factors = [(1.3, 0.8, 1.2, 0.0), (0.7, 1.3, 0.6, 0.0)]
    pixels = images.double()
    for row, (brightness, contrast, saturation, _) in enumerate(factors):
        step = pixels[row] * brightness
        grey = torch.tensor(GREY, dtype=torch.float64)
        step = contrast * step + (1 - contrast) * (step @ grey).mean()
        step = saturation * step + (1 - saturation) * (step @ grey)[:, :, None]
        pixels[row] = step.clip(0, 255)
    expected = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for backend in ("reference", "auto"):
        assert_close(normalize_image(images, torch.tensor(factors), backend=backend), expected.permute(0, 3, 1, 2))


@on_each_backend
@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("shape, dtype", crossed(SHAPES, DTYPES), ids=str)
def test_matches_reference(backend, device, shape, name, dtype):
    check(images_of(shape).to(device), colour_of(name, shape[0]), dtype, backend)


@on_each_backend
@pytest.mark.parametrize("sigma", [0.05, 0.34, 1.0, 4.0, 12.0])  # radius from 1 to more than the image
def test_any_blur(backend, device, sigma):
    images = images_of((2, 19, 29)).to(device)
    check(images, torch.tensor([(1.2, 0.9, 1.1, sigma), (1, 1, 1, sigma / 2)]), torch.float32, backend)


@on_each_backend
@each_dtype
def test_contiguous_output(backend, device, dtype):
    images, colour = images_of((3, 17, 23)).to(device), colour_of("all", 3)
    x = normalize_image(images, colour, dtype=dtype, channels_last=False, backend=backend)
    assert x.is_contiguous() and x.dtype == dtype
    assert torch.equal(x, normalize_image(images, colour, dtype=dtype, backend=backend))


@on_each_backend
def test_any_strides_and_alignment(backend, device):
    images, colour = images_of((2, 13, 37) if INTERPRET else (2, 31, 37)).to(device), colour_of("all", 2)
    for view in (
        lambda x: x[:, 3:, 5:31],
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2, ::3],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.flip(3),
        lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    ):
        check(view(images), colour, torch.float32, backend)
    x = normalize_image(images, colour.double().float().T.contiguous().T, backend=backend)  # colour's strides
    assert torch.equal(x, normalize_image(images, colour, backend=backend))


@pytest.mark.skipif(not built, reason="deeplab_fast._C is not built")
@each_dtype
@pytest.mark.parametrize("name", COLOURS)
def test_every_instruction_set(name, dtype):
    module = native.load()
    before = module.instruction_set()
    try:
        for instruction_set in module.instruction_sets():
            module.use_instruction_set(instruction_set)
            assert module.instruction_set() == instruction_set
            for shape in SHAPES:
                check(images_of(shape), colour_of(name, shape[0]), dtype, "native")
    finally:
        module.use_instruction_set(before)


@pytest.mark.skipif(not built, reason="deeplab_fast._C is not built")
@pytest.mark.parametrize("name", COLOURS)
def test_threads_and_repetition_change_no_bit(name):
    images, colour = images_of((2, 150, 131)), colour_of(name, 2)  # three threads meet inside a blurred image
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(check(images, colour, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, results[0]) for x in results)


def test_other_dtypes_take_the_reference():
    images, colour = images_of((2, 5, 6)), colour_of("all", 2)
    for dtype in (torch.float16, torch.float64):
        x = normalize_image(images, colour, dtype=dtype)
        assert dispatch.last_backend(OP) == "reference"
        assert_close(x, exact(images, colour))
        with pytest.raises(UserError, match="float32 or bfloat16, not float|deeplab_fast._C is not built"):
            normalize_image(images, colour, dtype=dtype, backend="native")
    with pytest.raises(UserError, match="Triton kernels (write float32, bfloat16 or float16, not float64|run on CUDA)"):
        normalize_image(images, colour, dtype=torch.float64, backend="triton")


@on_each_backend
@pytest.mark.parametrize("name", COLOURS)
def test_float16(backend, device, name):
    """Which the CPU's native kernels do not write."""
    if backend == "native":
        with pytest.raises(UserError, match="not float16"):
            normalize_image(images_of((1, 2, 3)).to(device), dtype=torch.float16, backend=backend)
    else:
        check(images_of((3, 17, 23)).to(device), colour_of(name, 3), torch.float16, backend)


@on_each_backend
@pytest.mark.parametrize("name", COLOURS)
def test_repetition_changes_no_bit(backend, device, name):
    images, colour = images_of((2, 60, 71)).to(device), colour_of(name, 2)
    results = [normalize_image(images, colour, backend=backend) for _ in range(2)]
    assert torch.equal(*results)


@on_each_backend
def test_autocast_changes_nothing_and_the_input_stays(backend, device):
    images, colour = images_of((3, 17, 23)).to(device), colour_of("all", 3)
    before = images.clone()
    x = normalize_image(images, colour, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(normalize_image(images, colour, backend=backend), x)
    assert torch.equal(images, before)


@on_each_backend
@pytest.mark.parametrize("name", ["none", "all"])
def test_opcheck(backend, device, name):
    op = torch.ops.deeplab_fast.normalize_image.default
    for channels_last in (True, False):
        for shape in ((2, 5, 6), (1, 1, 1)):
            arguments = (images_of(shape).to(device), colour_of(name, shape[0]), torch.bfloat16, channels_last, backend)
            torch.library.opcheck(op, arguments)


@on_each_backend
def test_has_no_gradient(backend, device):
    colour = colour_of("all", 2).requires_grad_()
    x = normalize_image(images_of((2, 5, 6)).to(device), colour, backend=backend)
    with pytest.raises(RuntimeError, match="deeplab_fast.normalize_image has no gradient"):
        x.sum().backward()
    assert not normalize_image(images_of((2, 5, 6)).to(device), colour.detach(), backend=backend).requires_grad


def test_compile_and_export_hold_one_op_and_name_no_backend():
    class Prepare(torch.nn.Module):
        def forward(self, images: Tensor, colour: Tensor) -> Tensor:
            return normalize_image(images, colour, dtype=torch.bfloat16)

    inputs = images_of((2, 5, 6)), colour_of("all", 2)
    expected = Prepare()(*inputs)
    compiled = torch.compile(Prepare(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), expected)
    exported = torch.export.export(Prepare(), inputs)
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.normalize_image.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    assert torch.equal(exported.module()(*inputs), expected)


def test_rejects_what_is_no_batch_of_images():
    images = images_of((2, 5, 6))
    with pytest.raises(ValueError, match=r"images are torch.float32 \(2, 5, 6, 3\); expected uint8 \(N, H, W, 3\)"):
        normalize_image(images.float())
    with pytest.raises(ValueError, match=r"images are torch.uint8 \(5, 6, 3\); expected uint8 \(N, H, W, 3\)"):
        normalize_image(images[0])
    with pytest.raises(ValueError, match="dtype is torch.int32; expected a floating one"):
        normalize_image(images, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"colour is torch.float32 \(3, 4\) for 2 images; expected float32 \(N, 4\)"):
        normalize_image(images, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"colour is torch.float64 \(2, 4\) for 2 images; expected float32"):
        normalize_image(images, torch.ones(2, 4).double())
    with pytest.raises(ValueError, match="colour is on meta; expected it on the CPU, where it is read"):
        normalize_image(images, torch.ones(2, 4, device="meta"))
    with pytest.raises(UserError, match="normalize_image has no backend 'metal'; it has native, triton, reference"):
        normalize_image(images, backend="metal")


def test_images_too_large_for_32_bits_are_declined():
    images = torch.empty((1, 1, 1, 3), dtype=torch.uint8).expand(1, 2**15, 2**15, 3)
    with mock.patch.object(gpu, "device_why_not", lambda device: None):
        reason = dispatch.explain(OP, images, None, torch.float32, True)["triton"]
    assert reason == "an image has 3221225472 elements, and its offsets are 32-bit"


FACTORS = ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


def launches(shape: tuple[int, int, int], dtype: torch.dtype, kind: str, device: str = "cpu"):
    """Of one kind of batch, on tensors of which only the size is looked at."""
    from deeplab_fast.kernels import normalize_image as kernels

    images = torch.empty((*shape, 3), dtype=torch.uint8, device=device)
    if kind == "plain":
        return kernels.normalize(images, dtype, *FACTORS)
    radius = 4 if kind == "blur" else 0
    parameters = torch.empty((shape[0], 4 + 2 * radius + 1), device=device)
    return kernels.jitter_blur_normalize(images, parameters, radius, kind != "no mean", GREY, dtype, *FACTORS)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time(chip, dtype):
    kernels = {"plain": 1, "no mean": 1, "jitter": 2, "blur": 3}
    for kind, count in kernels.items():
        compiled = compile_launches(chip, lambda kind=kind: launches((16, 769, 769), dtype, kind))
        assert len(compiled) == count
        for kernel in compiled:
            assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes"
            assert not re.search(r"\b(atom|red)\.(global|shared)", kernel.ptx)
        if kind == "plain":  # a thread's 16 bytes of the result, and what becomes of them
            assert "st.global.v4.b32" in compiled[0].ptx
            loads = "ld.global.v2.b32" if dtype.itemsize == 2 else "ld.global.b32"
            assert loads in compiled[0].ptx


@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "blur"])
def test_a_batch_of_more_than_2_31_elements_has_64_bit_offsets(kind):
    """The program's number along the batch is widened before anything is multiplied in."""
    for kernel in compile_launches(90, lambda: launches((64, 4096, 4096), torch.bfloat16, kind, "meta")):
        axis = "x" if kind == "plain" else "y"
        register = re.search(rf"mov.u32\s+(%r\d+), %ctaid.{axis};", kernel.ptx)[1]
        assert re.search(rf"(mul.wide.[su]32|cvt.[su]64.[su]32)\s+%rd\d+, {register}\b", kernel.ptx)

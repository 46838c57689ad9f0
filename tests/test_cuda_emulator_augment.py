"""csrc/cuda/augment_image.cu on the host: see test_cuda_emulator.py."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
from torch import Tensor

from deeplab_fast.ops import native
from deeplab_fast.ops.augment_image import LARGEST_SIDE, augment_image_mask_reference, augment_image_reference
from tests.ops.test_augment_image import SIZES, image_of, mask_of, oracle, windows
from tests.test_cuda_emulator import STREAM, call, configure, emulate, launch_of
from tests.test_cuda_emulator import pytestmark as needs_compiler

pytestmark = needs_compiler
op = importlib.import_module("deeplab_fast.ops.augment_image")  # the function has its name
PAD, IGNORE = [1, 2, 3], 254
GUARD = 64  # bytes on both sides of a result that nobody may write
ROWS, COLUMNS = 24, 32  # of a tile


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = emulate(tmp_path_factory.mktemp("emulated"), "augment_image")
    library.augment_image_mask.restype = ctypes.c_char_p
    return library


class Module:
    """deeplab_fast._C with this library behind it, for tensors of the CPU: what it is given for threads is unused."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def augment_image_cpu(self, source, row_stride, size, scaled, window, flip, pad, out, threads=0) -> None:
        self._call("augment_image", source, row_stride, size, scaled, window, flip, pad, out)

    def augment_image_mask_cpu(self, source, row_stride, size, scaled, window, flip, ignore, out, threads=0) -> None:
        self._call("augment_image_mask", source, row_stride, size, scaled, window, flip, [ignore, 0, 0], out)

    def _call(self, name, source, row_stride, size, scaled, window, flip, pad, out) -> None:
        lengths = [(ctypes.c_int64 * len(x))(*x) for x in (size, scaled, window)]
        numbers = (ctypes.c_void_p(source), ctypes.c_int64(row_stride), *lengths, int(flip), (ctypes.c_uint8 * 3)(*pad))
        call(self.library, name, *numbers, ctypes.c_void_p(out))


def crop(library: ctypes.CDLL, source: Tensor, scaled: tuple[int, int], window: tuple[int, ...], flip: bool) -> Tensor:
    """The result, every byte of which was written, and nothing beside it; threads in both orders agree."""
    shape = (window[1] - window[0], window[3] - window[2], *source.shape[2:])
    count, results = torch.Size(shape).numel(), []
    run = Module(library).augment_image_cpu if source.ndim == 3 else Module(library).augment_image_mask_cpu
    for descending in (0, 1):
        configure(library, descending=descending)
        memory = torch.full((count + 2 * GUARD,), 0x5A + descending, dtype=torch.uint8)
        arguments = (source.stride(0), source.shape[:2], scaled, window, flip, PAD if source.ndim == 3 else IGNORE)
        run(source.data_ptr(), *arguments, memory.data_ptr() + GUARD)
        assert (memory[:GUARD] == 0x5A + descending).all() and (memory[GUARD + count :] == 0x5A + descending).all()
        results.append(memory[GUARD : GUARD + count].view(shape))
    assert torch.equal(*results)
    return results[0]


def assert_nearest(actual: Tensor, exact: Tensor) -> None:
    """The level nearest to the value before rounding, but for fp32."""
    assert (actual.double() - exact).abs().max() < 0.502


MORE_SIZES = [
    ((200, 170), (54, 46)),  # by 3.7
    ((90, 400), (200, 108)),
    ((700, 5), (30, 9)),  # the rows of a tile come in several parts
    ((2, 9000), (3, 2)),  # the taps of a pixel too
    ((49, 65), (50, 66)),
]


@pytest.mark.parametrize("source, scaled", [*SIZES, *MORE_SIZES], ids=str)
def test_matches_definition(library, source, scaled):
    image = image_of(source)
    for window in windows(scaled):
        for flip in (False, True):
            out = crop(library, image, scaled, window, flip)
            assert launch_of(library)["launches"] == 1
            assert_nearest(out, oracle(image, scaled, window, flip, PAD))
            reference = augment_image_reference(image, scaled, window, flip, PAD)
            assert (out.int() - reference.int()).abs().max() <= 1


@pytest.mark.parametrize("source, scaled", [*SIZES, *MORE_SIZES], ids=str)
def test_mask_matches_reference(library, source, scaled):
    mask = mask_of(source)
    for window in windows(scaled):
        for flip in (False, True):
            expected = augment_image_mask_reference(mask, scaled, window, flip, IGNORE)
            assert torch.equal(crop(library, mask, scaled, window, flip), expected)


def test_the_same_size_is_a_copy_and_flat_stays_flat(library):
    image = image_of((47, 61))
    for flip, expected in ((False, image[4:40, 3:60]), (True, image[4:40, 3:60].flip(1))):
        assert torch.equal(crop(library, image, (47, 61), (4, 40, 3, 60), flip), expected)
    for value in (0, 1, 254, 255):
        flat = torch.full((47, 61, 3), value, dtype=torch.uint8)
        for scaled in ((13, 17), (46, 99), (1, 1)):
            assert (crop(library, flat, scaled, (0, scaled[0], 0, scaled[1]), False) == value).all()


@pytest.mark.parametrize("size", [(1 << 22, 1), (1, 1 << 22)], ids=str)
def test_a_filter_of_millions_of_taps(library, size):
    """Sums of fp32 that only grew would stop at 2^24 times what is added to them."""
    image = torch.full((*size, 3), 255, dtype=torch.uint8)
    image[..., 1], image[..., 2] = 127, image_of(size)[..., 0]
    configure(library)
    out = torch.empty(1, 1, 3, dtype=torch.uint8)
    arguments = (image.stride(0), size, (1, 1), (0, 1, 0, 1), False, PAD, out.data_ptr())
    Module(library).augment_image_cpu(image.data_ptr(), *arguments)
    assert_nearest(out, oracle(image.view(1, -1, 3), (1, 1), (0, 1, 0, 1), False, PAD))


def test_the_far_end_of_the_largest_scaled_image(library):
    """Positions that fp32 does not hold: products of two lengths."""
    scaled = (3, LARGEST_SIDE - 5)
    window = (0, 3, scaled[1] - 40, scaled[1] + 2)
    image, mask = image_of((2, (1 << 22) + 3)), mask_of((2, (1 << 22) + 3))
    for x, turn in ((image, lambda t: t), (image.transpose(0, 1).contiguous(), lambda t: t.transpose(0, 1))):
        out = crop(library, x, *((scaled, window) if turn(x) is x else (scaled[::-1], window[2:] + window[:2])), False)
        expected = augment_image_reference(image, scaled, window, False, PAD)
        assert (turn(out).int() - expected.int()).abs().max() <= 1
    labels = augment_image_mask_reference(mask, scaled, window, True, IGNORE)
    assert torch.equal(crop(library, mask, scaled, window, True), labels)


def test_offsets_beyond_32_bits_into_the_source(library):
    """Rows that lie 2^32 bytes and more apart, in memory of which only their pages are touched."""
    apart = (1 << 32) + 7
    memory = torch.empty(apart + 64, dtype=torch.uint8)
    for packed, steps in ((image_of((2, 5)), (3, 1)), (mask_of((2, 5)), (1,))):
        source = memory.as_strided(packed.shape, (apart, *steps)).copy_(packed)
        for scaled in ((3, 9), (1, 2)):
            window = (-1, scaled[0], 0, scaled[1] + 1)
            assert torch.equal(crop(library, source, scaled, window, True), crop(library, packed, scaled, window, True))


def test_offsets_beyond_32_bits_into_the_result(library):
    """The last tile, which lies beyond 2^32 bytes, in memory of which only its pages are touched."""
    height, width = (1 << 32) // (3 << 14) + 2 * ROWS, 1 << 14
    tiles = -(-height // ROWS) * (width // COLUMNS)
    last = (height - 1) // ROWS * ROWS
    corner = (last, height, width - COLUMNS, width)
    for source in (image_of((7, 9)), mask_of((7, 9))):
        size = (height, width) if source.ndim == 3 else (height, 3 * width)
        window = corner if source.ndim == 3 else (last, height, 3 * width - COLUMNS, 3 * width)
        out = torch.empty((*size, *source.shape[2:]), dtype=torch.uint8)
        out[last:, -COLUMNS:] = 0x5A
        configure(library)
        library.begin_at(tiles - 1 if source.ndim == 3 else 3 * tiles - 1)
        run = Module(library).augment_image_cpu if source.ndim == 3 else Module(library).augment_image_mask_cpu
        pad = PAD if source.ndim == 3 else IGNORE
        run(
            source.data_ptr(),
            source.stride(0),
            source.shape[:2],
            size,
            (0, size[0], 0, size[1]),
            0,
            pad,
            out.data_ptr(),
        )
        reference = augment_image_reference if source.ndim == 3 else augment_image_mask_reference
        expected = reference(source, size, window, False, pad)
        assert out[0, 0].numel() * size[1] * last > 1 << 32
        assert (out[last:, -COLUMNS:].int() - expected.int()).abs().max() <= (1 if source.ndim == 3 else 0)


def test_padding_far_away(library):
    """Windows whose corners 32 bits do not hold."""
    image, mask = image_of((5, 6)), mask_of((5, 6))
    for far in (1 << 40, -(1 << 40)):
        for window in ((far, far + 25, 0, 6), (0, 5, far, far + 33)):
            shape = (window[1] - window[0], window[3] - window[2])
            assert torch.equal(crop(library, image, (5, 6), window, True), torch.tensor(PAD).byte().expand(*shape, 3))
            assert (crop(library, mask, (5, 6), window, False) == IGNORE).all()


def test_launches_on_the_stream_and_the_device_that_it_is_given(library):
    for source in (image_of((5, 6)), mask_of((5, 6))):
        crop(library, source, (9, 99), (0, 50, 0, 99), False)
        launch = launch_of(library)
        assert launch["launches"] == 1 and launch["stream"] == STREAM and launch["questions"] == 0
        assert launch["device"] == launch["wanted"] and launch["device_afterwards"] == 7
        assert launch["blocks"] == -(-50 // ROWS) * -(-99 // COLUMNS)


def test_refuses_more_tiles_than_a_grid_has(library):
    with pytest.raises(AssertionError, match=r"more than 2\^31 tiles"):
        crop_of_nothing = (0, 1 << 32, 0, 1 << 12)
        arguments = (6, (2, 2), (2, 2), crop_of_nothing, False, PAD, 0)
        Module(library).augment_image_cpu(0, *arguments)


def test_the_op_launches_it(library, monkeypatch):
    """What deeplab_fast.ops hands over, for any strides."""
    monkeypatch.setattr(native, "kernels", lambda: Module(library))
    configure(library)
    image, mask = image_of((50, 70)), mask_of((50, 70))
    window = [-1, 30, 2, 40]
    for view in (
        lambda x: x[3:, 5:61],
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, ::3],
        lambda x: x[:1].expand(20, *x.shape[1:]),
        lambda x: x.flatten(0, 1)[7 : 7 + 9 * 11].unflatten(0, (9, 11)),  # not aligned to anything
    ):
        for scaled in ([25, 31], [60, 90]):
            assert_nearest(
                op._native(view(image), scaled, window, True, PAD), oracle(view(image), scaled, window, True, PAD)
            )
            expected = augment_image_mask_reference(view(mask), scaled, window, True, IGNORE)
            assert torch.equal(op._native_mask(view(mask), scaled, window, True, IGNORE), expected)

from __future__ import annotations

import ctypes
import mmap
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import augment_image, augment_image_mask, dispatch, native
from deeplab_fast.testing import backends

OP, MASK_OP = "augment_image", "augment_image_mask"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
built = native.load() is not None

# Source, scaled.
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (9, 7)),
    ((1, 37), (1, 21)),  # one row
    ((37, 1), (80, 1)),
    ((5, 3), (4, 2)),  # fewer pixels than taps
    ((47, 61), (94, 122)),
    ((47, 61), (24, 30)),
    ((47, 61), (33, 85)),  # one axis shrinks and the other grows
    ((47, 61), (47, 61)),
    ((300, 200), (3, 2)),  # a hundred pixels to one
    ((200, 330), (270, 445)),  # above 16384 pixels, so that several threads work
]


def image_of(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Noise and black and white stripes, whose edges show any wrong weight."""
    image = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed)).byte()
    image[: size[0] // 2, ::2] = 0
    image[: size[0] // 2, 1::2] = 255
    return image


def mask_of(size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randint(0, 19, size, generator=torch.Generator().manual_seed(seed)).byte()


def windows(scaled: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    height, width = scaled
    return [
        (0, height, 0, width),
        (-3, height + 2, -5, width + 1),  # padding all round
        (height // 3, height // 3 + 7, width // 2, width // 2 + 9),
        (height - 1, height, width - 1, width),  # the last pixel
        (height + 1, height + 4, 0, 3),  # all padding
        (0, height, -4, 0),
    ]


def oracle(image: Tensor, scaled: tuple[int, int], window: tuple[int, ...], flip: bool, pad: tuple[int, ...]) -> Tensor:
    """The definition in fp64, as two dense products; not rounded."""
    matrices = []
    for axis in (0, 1):
        ratio = image.shape[axis] / scaled[axis]
        centre = (torch.arange(scaled[axis]).double() + 0.5) * ratio
        source = torch.arange(image.shape[axis]).double() + 0.5
        weights = (1 - (source - centre[:, None]).abs() / max(1, ratio)).clamp(min=0)
        matrices.append(weights / weights.sum(1, keepdim=True))
    whole = torch.einsum("yr,rcd,xc->yxd", matrices[0], image.double(), matrices[1])
    out = torch.tensor(pad).double().repeat(window[1] - window[0], window[3] - window[2], 1)
    for y in range(max(0, window[0]), min(window[1], scaled[0])):
        columns = slice(max(0, window[2]), min(window[3], scaled[1]))
        if columns.start < columns.stop:
            out[y - window[0], columns.start - window[2] : columns.stop - window[2]] = whole[y, columns]
    return out.flip(1) if flip else out


def assert_rounds(actual: Tensor, exact: Tensor) -> None:
    """Less than one level of 255 away from the value before rounding."""
    assert actual.dtype == torch.uint8 and actual.shape == exact.shape and actual.is_contiguous()
    error = (actual.double().cpu() - exact).abs().max()
    assert error < 1, error


@on_each_backend
@pytest.mark.parametrize("source, scaled", SIZES, ids=str)
def test_matches_definition(backend, device, source, scaled):
    image = image_of(source)
    for window in windows(scaled):
        for flip in (False, True):
            out = augment_image(image.to(device), scaled, window, flip=flip, pad_value=(1, 2, 3), backend=backend)
            assert dispatch.last_backend(OP) == backend
            assert_rounds(out, oracle(image, scaled, window, flip, (1, 2, 3)))


@on_each_backend
@pytest.mark.parametrize("source, scaled", SIZES, ids=str)
def test_mask_matches_definition(backend, device, source, scaled):
    mask = mask_of(source)
    rows = [(2 * i + 1) * source[0] // (2 * scaled[0]) for i in range(scaled[0])]
    columns = [(2 * i + 1) * source[1] // (2 * scaled[1]) for i in range(scaled[1])]
    whole = mask[rows][:, columns]
    for window in windows(scaled):
        expected = torch.full((window[1] - window[0], window[3] - window[2]), 254, dtype=torch.uint8)
        inside = [range(max(0, window[2 * a]), min(window[2 * a + 1], scaled[a])) for a in (0, 1)]
        for y in inside[0]:
            for x in inside[1]:
                expected[y - window[0], x - window[2]] = whole[y, x]
        for flip in (False, True):
            out = augment_image_mask(mask.to(device), scaled, window, flip=flip, ignore=254, backend=backend)
            assert dispatch.last_backend(MASK_OP) == backend
            assert torch.equal(out.cpu(), expected.flip(1) if flip else expected) and out.is_contiguous()


@on_each_backend
@pytest.mark.parametrize("source, scaled", SIZES, ids=str)
def test_within_one_level_of_pillow(backend, device, source, scaled):
    image = image_of(source)
    theirs = Image.fromarray(image.numpy()).resize(scaled[::-1], Image.Resampling.BILINEAR)
    ours = augment_image(image.to(device), scaled, (0, scaled[0], 0, scaled[1]), backend=backend)
    assert (ours.int().cpu() - torch.from_numpy(np.array(theirs)).int()).abs().max() <= 1


@on_each_backend
@pytest.mark.parametrize("scaled", [(24, 30), (61, 80)])
def test_within_one_level_of_pillow_with_a_box(backend, device, scaled):
    """A window is what Pillow makes of a box with fractions of pixels."""
    image = image_of((47, 61))
    top, bottom, left, right = window = (5, 21, 7, 26)
    ratios = 47 / scaled[0], 61 / scaled[1]
    box = (left * ratios[1], top * ratios[0], right * ratios[1], bottom * ratios[0])
    theirs = Image.fromarray(image.numpy()).resize((19, 16), Image.Resampling.BILINEAR, box=box)
    ours = augment_image(image.to(device), scaled, window, backend=backend)
    assert (ours.int().cpu() - torch.from_numpy(np.array(theirs)).int()).abs().max() <= 1


@on_each_backend
def test_the_same_size_is_a_copy_and_flat_stays_flat(backend, device):
    image = image_of((47, 61)).to(device)
    assert torch.equal(augment_image(image, (47, 61), (4, 40, 3, 60), backend=backend), image[4:40, 3:60])
    flipped = augment_image(image, (47, 61), (4, 40, 3, 60), flip=True, backend=backend)
    assert torch.equal(flipped, image[4:40, 3:60].flip(1))
    for value in (0, 1, 254, 255):
        flat = torch.full((47, 61, 3), value, dtype=torch.uint8, device=device)
        for scaled in ((13, 17), (46, 99), (1, 1)):
            assert (augment_image(flat, scaled, (0, scaled[0], 0, scaled[1]), backend=backend) == value).all()


@on_each_backend
def test_any_strides_and_alignment(backend, device):
    image, mask = image_of((50, 70)).to(device), mask_of((50, 70)).to(device)
    window = (-1, 30, 2, 40)
    for view in (
        lambda x: x[3:, 5:61],
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, ::3],
        lambda x: x[:1].expand(20, *x.shape[1:]),
        lambda x: x[1:2, 3:4],
        lambda x: x.flatten(0, 1)[7 : 7 + 9 * 11].unflatten(0, (9, 11)),  # not aligned to anything
    ):
        for scaled in ((25, 31), (60, 90)):
            ours = augment_image(view(image), scaled, window, backend=backend)
            assert torch.equal(ours, augment_image(view(image).contiguous(), scaled, window, backend=backend))
            ours = augment_image_mask(view(mask), scaled, window, backend=backend)
            assert torch.equal(ours, augment_image_mask(view(mask).contiguous(), scaled, window, backend=backend))


@pytest.mark.skipif(not built, reason="deeplab_fast._C is not built")
@pytest.mark.parametrize("source, scaled", SIZES, ids=str)
def test_instruction_sets_and_threads_agree_bit_for_bit(source, scaled):
    module = native.load()
    before = module.instruction_set(), torch.get_num_threads()
    image, mask = image_of(source), mask_of(source)
    window = (-2, scaled[0] - 1, 0, scaled[1] + 3)
    results = []
    try:
        for name in module.instruction_sets():
            module.use_instruction_set(name)
            assert module.instruction_set() == name
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                pair = (
                    augment_image(image, scaled, window, flip=True, backend="native"),
                    augment_image_mask(mask, scaled, window, flip=True, backend="native"),
                )
                assert_rounds(pair[0], oracle(image, scaled, window, True, (124, 116, 104)))
                results.append(pair)
    finally:
        module.use_instruction_set(before[0])
        torch.set_num_threads(before[1])
    for pair in results:
        assert all(map(torch.equal, results[0], pair))


def _in_a_worker(queue) -> None:
    torch.set_num_threads(1)  # as a loader's worker does
    queue.put(augment_image(image_of((200, 330)), (270, 445), (0, 270, 0, 445)).numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_runs_in_a_forked_worker():
    """After the parent's threads have run: a team of threads would hang in the child."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = augment_image(image_of((200, 330)), (270, 445), (0, 270, 0, 445))
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_in_a_worker, args=(queue,))
        process.start()
        try:
            assert torch.equal(torch.from_numpy(queue.get(timeout=30)), expected)
        finally:
            process.kill()
    finally:
        torch.set_num_threads(before)


def _at_the_end_of_memory(size: tuple[int, int]) -> Tensor:
    """An image that ends where its page does, before one that nobody may read."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    image = image_of(size)
    offset = mmap.PAGESIZE - image.numel()
    return torch.frombuffer(pages, dtype=torch.uint8, count=image.numel(), offset=offset).view(image.shape).copy_(image)


def _resize_at_the_end_of_memory() -> None:
    torch.set_num_threads(1)
    module = native.load()
    for name in module.instruction_sets():
        module.use_instruction_set(name)
        for size in ((1, 1), (3, 1), (5, 7), (6, 40)):
            for scaled in ((11, 13), (2, 3)):
                augment_image(_at_the_end_of_memory(size), scaled, (0, scaled[0], 0, scaled[1]), backend="native")


@pytest.mark.skipif(not built, reason="deeplab_fast._C is not built")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_nothing_behind_the_image_is_read():
    process = multiprocessing.get_context("fork").Process(target=_resize_at_the_end_of_memory)
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 0  # not a signal's


@on_each_backend
def test_opcheck(backend, device):
    image, mask = image_of((6, 9)).to(device), mask_of((6, 9)).to(device)
    arguments = ([4, 12], [-1, 3, 2, 8], True)
    ops = torch.ops.deeplab_fast
    torch.library.opcheck(ops.augment_image.default, (image, *arguments, [1, 2, 3], backend))
    torch.library.opcheck(ops.augment_image_mask.default, (mask, *arguments, 255, backend))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_captured_in_a_cuda_graph():
    """Not the reference, which brings the padding's values from the host."""
    image, mask = image_of((200, 330)).cuda(), mask_of((200, 330)).cuda()
    crop = (130, 445), (-3, 120, 9, 400)
    if reason := dispatch.explain(OP, image, *crop, True, [1, 2, 3])["native"]:
        pytest.skip(reason)
    pairs = (augment_image, image), (augment_image_mask, mask)
    run = lambda: [augment(x, *crop, flip=True, backend="native") for augment, x in pairs]  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    image.copy_(image_of((200, 330), seed=2))
    mask.copy_(mask_of((200, 330), seed=3))
    graph.replay()
    assert all(map(torch.equal, results, run()))
    assert_rounds(results[0], oracle(image.cpu(), *crop, True, (124, 116, 104)))


def test_compile_and_export_hold_one_op_and_name_no_backend():
    class Crop(torch.nn.Module):
        def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            window = (-1, 3, 2, 8)
            return augment_image(image, (4, 12), window), augment_image_mask(mask, (4, 12), window)

    inputs = image_of((6, 9)), mask_of((6, 9))
    expected = Crop()(*inputs)
    compiled = torch.compile(Crop(), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*inputs), expected))
    exported = torch.export.export(Crop(), inputs)
    calls = [node for node in exported.graph.nodes if "deeplab_fast" in str(node.target)]
    assert [call.args[-1] for call in calls] == ["auto", "auto"]
    assert all(map(torch.equal, exported.module()(*inputs), expected))


def test_rejects_what_is_no_image_and_no_window():
    image, mask = image_of((6, 9)), mask_of((6, 9))
    window = (0, 3, 0, 3)
    with pytest.raises(ValueError, match=r"image is torch.float32 \(6, 9, 3\); expected uint8 \(H, W, 3\)"):
        augment_image(image.float(), (4, 4), window)
    with pytest.raises(ValueError, match=r"image is torch.uint8 \(6, 9\); expected uint8 \(H, W, 3\)"):
        augment_image(mask, (4, 4), window)
    with pytest.raises(ValueError, match=r"image is torch.uint8 \(0, 9, 3\); expected uint8"):
        augment_image(image[:0], (4, 4), window)
    with pytest.raises(ValueError, match=r"mask is torch.int64 \(6, 9\); expected uint8 \(H, W\)"):
        augment_image_mask(mask.long(), (4, 4), window)
    with pytest.raises(ValueError, match=r"scaled is \(0, 4\) for a source of \(6, 9, 3\); expected sides from 1"):
        augment_image(image, (0, 4), window)
    for bad in ((3, 3, 0, 1), (0, 1, 2, 1)):
        with pytest.raises(ValueError, match="expected top < bottom and left < right"):
            augment_image_mask(mask, (4, 4), bad)
    with pytest.raises(ValueError, match=r"pad_value is \(0, 256, 0\); expected three numbers from 0 to 255"):
        augment_image(image, (4, 4), window, pad_value=(0, 256, 0))
    with pytest.raises(ValueError, match="ignore is -1; expected 0 to 255"):
        augment_image_mask(mask, (4, 4), window, ignore=-1)
    with pytest.raises(UserError, match="augment_image has no backend 'triton'; it has native, reference"):
        augment_image(image, (4, 4), window, backend="triton")

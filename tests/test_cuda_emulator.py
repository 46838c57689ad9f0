"""The CUDA kernels of csrc/cuda, whole, on the host: tests/cuda_emulator.h says what is emulated and what is not.

The kernels' sources are compiled as C++, with launches and shared memory rewritten, and called with raw pointers. What
this does not show: warp shuffles (the kernels have none), races within a warp, misaligned vectors, and speed.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deeplab_fast.ops.native import CUDA_FLOAT_DTYPES, LABEL_DTYPES
from deeplab_fast.ops.upsample_argmax import upsample_argmax_reference
from tests.ops.test_confusion_matrix import counted, label_map
from tests.ops.test_kth_largest import any_bits, losses, neighbours, ranks
from tests.ops.test_upsample_argmax import EXACT, LAYOUTS, SHAPES, assert_labels, random_logits, smooth_logits

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {
    "confusion_matrix": 1,
    "upsample_argmax": 2,
    "upsample_confusion_matrix": 3,
    "kth_largest": 4,
    "depthwise_conv": 5,
    "augment_image": 6,
}
ELSEWHERE = ("augment_image", "depthwise_conv")  # in files of their own, test_cuda_emulator_<...>.py
STREAM = 0x5EED  # a handle that is passed through
# -fno-gnu-unique: otherwise all libraries of the process share the emulator's inline variables. -U_FORTIFY_SOURCE: it
# forbids jumps between stacks.
FLAGS = (
    *("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-fno-gnu-unique"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas"),
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def rewritten(source: str) -> str:
    """CUDA C++ without what only nvcc can read: launches, and shared memory of the launch's size."""
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"auto* const \2 = (\1*)emulator::shared();", source)
    launch = r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\((.*?)\);"
    emulated = r"emulator::launch(reinterpret_cast<const void*>(&\1), \2, [&] { \1(\3); });"
    return re.sub(launch, emulated, source, flags=re.DOTALL)


def emulate(folder: Path, name: str) -> ctypes.CDLL:
    """The library of one kernel, compiled in `folder`."""
    for header in ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_pipeline_primitives.h"):
        (folder / header).write_text("// cuda_emulator.h has it\n")
    for source in (*(ROOT / "csrc/cuda").glob("*.h"), ROOT / f"csrc/cuda/{name}.cu"):
        (folder / source.name.replace(".cu", ".cpp")).write_text(rewritten(source.read_text()))
    library = folder / f"{name}.so"
    defines = (f'-DKERNEL="{name}.cpp"', f"-DENTRY={KERNELS[name]}")
    include = (f"-I{folder}", f"-I{ROOT}/csrc/cuda", f"-I{ROOT}/tests")
    command = ["g++", *FLAGS, *defines, *include, str(ROOT / "tests/cuda_emulated.cpp"), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:4000]
    loaded = ctypes.CDLL(str(library))
    getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """{name: library} of the kernels of label maps and losses."""
    folder = tmp_path_factory.mktemp("emulated")
    return {name: emulate(folder, name) for name in KERNELS if name not in ELSEWHERE}


def configure(library: ctypes.CDLL, *, limit: int = 227 << 10, multiprocessors: int = 2, descending: int = 0) -> None:
    library.configure(limit, multiprocessors, descending)


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    error = getattr(library, name)(*arguments, ctypes.c_void_p(STREAM))
    assert error is None, error.decode()


def geometry(logits: Tensor, size: tuple[int, int]) -> ctypes.Array:
    return (ctypes.c_int64 * 10)(*logits.shape, *logits.stride(), *size)


def argmax(library: ctypes.CDLL, logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Labels, every one of which was written, and nothing beside them; threads in both orders agree."""
    pixels = logits.shape[0] * size[0] * size[1]
    results = []
    for descending in (0, 1):
        memory = torch.full((pixels + 64,), 0x5A + descending, dtype=torch.uint8)
        configure(library, descending=descending)
        floats = CUDA_FLOAT_DTYPES.index(logits.dtype)
        where = ctypes.c_void_p(memory.data_ptr() + 32)
        call(library, "upsample_argmax", pointer(logits), floats, geometry(logits, size), int(align_corners), where)
        assert (memory[:32] == 0x5A + descending).all() and (memory[32 + pixels :] == 0x5A + descending).all()
        results.append(memory[32 : 32 + pixels].reshape(logits.shape[0], *size))
    assert torch.equal(*results)
    return results[0]


def count(library: ctypes.CDLL, prediction: Tensor, target: Tensor, classes: int, ignore: int | None) -> list[Tensor]:
    counts, out = torch.zeros(classes, classes, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    types = [LABEL_DTYPES.index(x.dtype) for x in (prediction, target)]
    maps = (pointer(prediction), types[0], pointer(target), types[1], ctypes.c_int64(target.numel()), classes)
    ignored = (int(ignore is not None), ctypes.c_int64(ignore or 0))
    call(library, "confusion_matrix", *maps, *ignored, pointer(counts), pointer(out))
    return [counts, out]


def count_upsampled(
    library: ctypes.CDLL, logits: Tensor, target: Tensor, ignore: int | None, align_corners: bool = False
) -> list[Tensor]:
    classes = logits.shape[1]
    counts, out = torch.zeros(classes, classes, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    source = (pointer(logits), CUDA_FLOAT_DTYPES.index(logits.dtype), geometry(logits, target.shape[1:]))
    truth = (int(align_corners), pointer(target), LABEL_DTYPES.index(target.dtype))
    ignored = (int(ignore is not None), ctypes.c_int64(ignore or 0))
    call(library, "upsample_confusion_matrix", *source, *truth, *ignored, pointer(counts), pointer(out))
    return [counts, out]


def launch_of(library: ctypes.CDLL) -> dict[str, int]:
    values = (ctypes.c_int64 * 9)()
    library.last_launch(values)
    names = ("launches", "blocks", "threads", "shared", "stream", "device", "device_afterwards", "wanted", "questions")
    return dict(zip(names, values, strict=True))


# --- upsample_argmax ---


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", CUDA_FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_labels(emulated, shape, size, dtype, align_corners):
    for make in (random_logits, smooth_logits):
        for layout in ("channels_last", "nchw"):
            logits = LAYOUTS[layout](make(shape, seed=1, dtype=dtype))
            assert_labels(argmax(emulated["upsample_argmax"], logits, size, align_corners), logits, size, align_corners)


# (K, h, w), (H, W), align_corners: source pixels that a group spans
PATHS = {
    ((19, 33, 40), (132, 160), False): 2,  # the network's factor
    ((5, 9, 12), (72, 96), False): 2,
    ((5, 9, 12), (33, 45), True): 2,
    ((21, 17, 17), (129, 129), False): 3,  # the ratio is not whole
    ((21, 17, 17), (129, 129), True): 2,
    ((7, 30, 70), (60, 140), False): 3,
    ((7, 30, 40), (44, 61), False): 0,
    ((256, 9, 9), (36, 36), False): 2,  # classes in several chunks
    ((150, 17, 17), (129, 129), False): 3,
}


@pytest.mark.parametrize("case", PATHS, ids=str)
def test_every_path(emulated, case):
    shape, size, align_corners = case
    library = emulated["upsample_argmax"]
    for layout in LAYOUTS:
        logits = LAYOUTS[layout](smooth_logits((1, *shape), seed=2))
        plan = (ctypes.c_int64 * 2)()
        library.planned(geometry(logits, size), int(align_corners), plan)
        assert plan[0] == PATHS[case] and (plan[0] == 0 or (plan[1] < shape[0]) == (shape[0] > 100))
        assert_labels(argmax(library, logits, size, align_corners), logits, size, align_corners)
        assert launch_of(library)["launches"] == 1


@pytest.mark.parametrize("align_corners", [False, True])
def test_ties_go_to_the_lowest_class(emulated, align_corners):
    logits = random_logits((2, 19, 17, 33), seed=3).round().clamp(-1, 1)
    for values in (torch.zeros_like(logits), logits, logits.repeat_interleave(3, 2).repeat_interleave(3, 3)):
        for factor in (1, 2, 4):
            size = tuple(factor * n - (factor - 1) * align_corners for n in values.shape[2:])
            labels = argmax(emulated["upsample_argmax"], values, size, align_corners)
            assert torch.equal(labels, upsample_argmax_reference(values.double(), list(size), align_corners))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.3])
def test_nan_and_infinities_as_torch_has_them(emulated, share, align_corners):
    three_taps = [((1, 7, 30, 70), (60, 140))] if not align_corners else []
    for shape, size in [*EXACT[align_corners], *three_taps, ((1, 5, 31, 33), (31, 33))]:
        for make in (random_logits, smooth_logits):
            logits = make(shape, seed=4)
            for seed, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38, -3e38)):
                logits[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share] = value
            labels = argmax(emulated["upsample_argmax"], logits, size, align_corners)
            expected = upsample_argmax_reference(logits, list(size), align_corners)
            assert (labels != expected).sum() <= expected.numel() // 2000


def test_offsets_beyond_32_bits(emulated):
    """Two images that lie 2^31 logits apart, in memory of which only their pages are touched."""
    apart = 2**31 + 24
    memory = torch.empty(apart + 5 * 6 * 8, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 5, 6, 8), (apart, 1, 40, 5))
    packed = random_logits((2, 5, 6, 8), seed=5, dtype=torch.bfloat16)
    logits.copy_(packed)
    for size in ((24, 32), (7, 9)):
        expected = argmax(emulated["upsample_argmax"], packed, size)
        assert torch.equal(argmax(emulated["upsample_argmax"], logits, size), expected)


# --- upsample_confusion_matrix ---


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_counts_of_upsampled_labels(emulated, shape, size, align_corners):
    library = emulated["upsample_confusion_matrix"]
    for make, dtype, run in ((random_logits, torch.float32, 1), (smooth_logits, torch.bfloat16, 300)):
        logits = LAYOUTS["channels_last"](make(shape, seed=6, dtype=dtype))
        labels = argmax(emulated["upsample_argmax"], logits, size, align_corners)
        target = label_map(tuple(labels.shape), torch.int16, shape[1], seed=7, run=run)
        for multiprocessors in (1, 3):
            configure(library, multiprocessors=multiprocessors, descending=multiprocessors - 1)
            counts = count_upsampled(library, logits, target, 255, align_corners)
            assert all(map(torch.equal, counts, counted(labels, target, shape[1], 255)))


@pytest.mark.parametrize("limit", [48 << 10, 99 << 10, 227 << 10])
@pytest.mark.parametrize("classes", [1, 19, 90, 150, 256])
def test_upsampled_counts_at_every_limit_of_shared_memory(emulated, classes, limit):
    """Histograms of each warp, one histogram, and none: counted in global memory."""
    library = emulated["upsample_confusion_matrix"]
    logits = random_logits((1, classes, 5, 7), seed=8)
    labels = argmax(emulated["upsample_argmax"], logits, (20, 28))
    target = label_map((1, 20, 28), torch.int32, classes, seed=9, run=3)
    configure(library, limit=limit)
    counts = count_upsampled(library, logits, target, None)
    assert all(map(torch.equal, counts, counted(labels, target, classes, None)))
    assert 0 < launch_of(library)["shared"] <= limit


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_upsampled_counts_of_every_target(emulated, dtype):
    library = emulated["upsample_confusion_matrix"]
    configure(library)
    logits = smooth_logits((2, 5, 9, 11), seed=10)
    labels = argmax(emulated["upsample_argmax"], logits, (36, 44))
    target = label_map((2, 36, 44), dtype, 5, seed=11, run=9)
    if dtype is torch.int64:
        target[:, 3] = 2**32 + 1  # 1, were it cut to 32 bits
    if dtype in (torch.int32, torch.int64):
        target[:, 5], target[:, 6] = 2**16 + 1, 2**16 - 2  # 1, and "ignored", were they cut to 16
    for ignore in (255, -1, 2, 2**40, None):
        counts = count_upsampled(library, logits, target, ignore)
        assert all(map(torch.equal, counts, counted(labels, target, 5, ignore)))


# --- confusion_matrix ---


@pytest.mark.parametrize("pixels", [1, 15, 16, 511, 512, 4096, 4097, 12_288, 30_000])
@pytest.mark.parametrize("run", [1, 3, 40, 400])
def test_counts(emulated, pixels, run):
    library = emulated["confusion_matrix"]
    fast = [(torch.uint8, torch.uint8), (torch.int64, torch.uint8), (torch.int64, torch.int64)]
    for (p, t), multiprocessors in itertools.product([*fast, (torch.int16, torch.uint8)], (1, 2)):
        prediction = label_map((pixels,), p, 19, seed=12, run=run)
        target = label_map((pixels,), t, 19, seed=13, run=run)
        configure(library, multiprocessors=multiprocessors, descending=multiprocessors - 1)
        counts = count(library, prediction, target, 19, 255)
        assert all(map(torch.equal, counts, counted(prediction, target, 19, 255)))


@pytest.mark.parametrize("types", list(itertools.product(LABEL_DTYPES, repeat=2)), ids=str)
def test_counts_of_every_pair_of_types(emulated, types):
    library = emulated["confusion_matrix"]
    configure(library)
    prediction = label_map((5000,), types[0], 7, seed=14, run=9)
    target = label_map((5000,), types[1], 7, seed=15, run=9)
    if types[1] is torch.int64:
        target[::97] = 2**32 + 1
    for ignore, start in ((255, 0), (-1, 3), (3, 0), (2**40, 0), (None, 16)):
        maps = prediction[start:], target[start:]
        assert all(map(torch.equal, count(library, *maps, 7, ignore), counted(*maps, 7, ignore)))


@pytest.mark.parametrize("classes", [1, 2, 90, 150, 254, 255, 256, 300])
@pytest.mark.parametrize("limit", [99 << 10, 227 << 10])
def test_counts_of_many_classes(emulated, classes, limit):
    library = emulated["confusion_matrix"]
    configure(library, limit=limit)
    for dtype in (torch.uint8, torch.int64):
        prediction = label_map((9000,), dtype, min(classes, 256), seed=16, run=5)
        target = label_map((9000,), dtype, min(classes, 256), seed=17, run=5)
        counts = count(library, prediction, target, classes, 255)
        assert all(map(torch.equal, counts, counted(prediction, target, classes, 255)))


# --- kth_largest ---


def kth(library: ctypes.CDLL, x: Tensor, k: int) -> float:
    value, counts = torch.full((3,), -7.0), torch.zeros(3, 2048, dtype=torch.int64)
    sizes = (ctypes.c_int64(x.numel()), ctypes.c_int64(k))
    call(library, "kth_largest", pointer(x), *sizes, ctypes.c_void_p(value.data_ptr() + 4), pointer(counts))
    assert value[0] == value[2] == -7 and counts[0].sum() == x.numel()
    return value[1].item()


@pytest.mark.parametrize("make", [losses, any_bits, neighbours])
@pytest.mark.parametrize("size", [1, 3, 4, 65, 2048, 9000])
def test_kth_largest(emulated, make, size):
    library = emulated["kth_largest"]
    x = make(size + 1, seed=20)
    for multiprocessors, descending, values in itertools.product((1, 2), (0, 1), (x[:size], x[1:])):
        configure(library, multiprocessors=multiprocessors, descending=descending)
        for k in ranks(size):
            assert kth(library, values, k) == values.sort(descending=True).values[k - 1]


def test_kth_largest_of_nan_and_infinities(emulated):
    library = emulated["kth_largest"]
    configure(library)
    x = losses(3000, seed=21)
    x[::100], x[5::200] = math.inf, -math.inf
    for k in (1, 30, 31, 2985, 2986, 3000):
        assert kth(library, x, k) == x.sort(descending=True).values[k - 1]
    for bits in (0x7FC00000, 0x7F800001, -1):
        x[2999] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert all(math.isnan(kth(library, x, k)) for k in (1, 2, 3000))


# --- all of them ---


def call_each(emulated: dict[str, ctypes.CDLL], limit: int) -> list[dict[str, int]]:
    """What the four launchers did on a device with this limit of shared memory. The matrices take more than 48 KB."""
    logits = random_logits((1, 115, 4, 4), seed=18)
    for library in emulated.values():
        configure(library, limit=limit)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    size = geometry(logits, (16, 16))
    call(emulated["upsample_argmax"], "upsample_argmax", pointer(logits), 0, size, 0, pointer(labels))
    count(emulated["confusion_matrix"], labels, labels, 115, 255)
    count_upsampled(emulated["upsample_confusion_matrix"], logits, labels, 255)
    kth(emulated["kth_largest"], logits, 30)
    return [launch_of(library) for library in emulated.values()]


def test_launchers_use_the_stream_and_the_device_that_they_are_given(emulated):
    for limit in (99 << 10, 227 << 10):
        for launch in call_each(emulated, limit):
            assert launch["launches"] in (1, 4) and launch["stream"] == STREAM
            assert launch["device"] == launch["wanted"] and launch["device_afterwards"] == 7


def test_the_driver_is_asked_once_for_each_device(emulated):
    """What it said of one device is not taken for another's: a limit that is too high fails the launch."""
    limits = [(64 + 2 * i) << 10 for i in range(2)]  # of devices that no other test has
    first = [[launch["questions"] for launch in call_each(emulated, limit)] for limit in limits]
    again = [[launch["questions"] for launch in call_each(emulated, limit)] for limit in reversed(limits)]
    assert again == [[0] * 4] * 2
    # upsample_argmax needs nothing; of a matrix: multiprocessors, limit, the kernel's share of it, blocks that fit
    expected = {"confusion_matrix": 3, "upsample_argmax": 0, "upsample_confusion_matrix": 4, "kth_largest": 1}
    assert first == [[expected[name] for name in emulated]] * 2


def test_every_kernel_is_emulated():
    assert {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} == set(KERNELS)

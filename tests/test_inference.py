"""Whole images and sliding windows give one label map, whatever the size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deeplab_fast import inference
from deeplab_fast.data.augment import prepare
from deeplab_fast.data.datasets import Dataset
from deeplab_fast.data.labels import Classes
from deeplab_fast.errors import UserError
from deeplab_fast.inference import evaluate_dataset, predict_image

CPU = torch.device("cpu")


class Pixelwise(nn.Module):
    """A 1x1 convolution: its answer for a pixel does not depend on the window that the pixel is seen in."""

    align_corners = False

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, classes, 1)
        self.conv.weight.data = torch.randn(classes, 3, 1, 1, generator=generator)
        self.conv.bias.data = torch.randn(classes, generator=generator)
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.predict_logits(x)

    def predict_logits(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape[-2:]))
        return self.conv(x)


class Edgy(nn.Module):
    """Is surer of class 1 on the window's first column or row than of class 0 everywhere else."""

    align_corners = False

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return self.predict_logits(x)

    def predict_logits(self, x: Tensor) -> Tensor:
        logits = x.new_zeros(1, 2, *x.shape[-2:])
        logits[:, 0] = 1.0
        logits[:, 1].select(self.axis, 0).fill_(3.0)
        return logits


def random_image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 64)])
def test_whole_image_is_the_argmax_at_its_own_size(size):
    model, image = Pixelwise(), random_image(*size)
    labels = predict_image(model, image, device=CPU)
    x = prepare(image[None], None, dtype=torch.float32, channels_last=True)
    assert labels.dtype == torch.uint8 and labels.shape == size
    assert model.seen == [size]
    assert torch.equal(labels.long(), model.conv(x)[0].argmax(0))


# Among them: one row of windows, one column, a window higher than the image, sizes that no step divides.
@pytest.mark.parametrize("size", [(41, 67), (16, 90), (90, 16), (17, 33)])
@pytest.mark.parametrize("window", [(16, 16), (13, 30), (200, 12)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.8])
def test_sliding_window_equals_whole_image(size, window, overlap):
    model, image = Pixelwise(), random_image(*size)
    whole = predict_image(model, image, device=CPU)
    model.seen.clear()
    tiled = predict_image(model, image, device=CPU, window=window, overlap=overlap)
    assert torch.equal(tiled, whole)
    assert len(model.seen) > 1
    assert set(model.seen) == {(min(window[0], size[0]), min(window[1], size[1]))}


@pytest.mark.parametrize(("axis", "size", "window"), [(1, (100, 16), (40, 16)), (2, (16, 100), (16, 40))])
def test_blending_trusts_the_middle_of_a_window(axis, size, window):
    labels = predict_image(Edgy(axis), random_image(*size), device=CPU, window=window, overlap=0.5)
    first, rest = labels.split((1, 99), dim=axis - 1)
    assert (first == 1).all()  # covered by one window alone
    assert (rest == 0).all()


def test_neighbouring_windows_overlap_enough():
    for size in (41, 100, 1025, 3000):
        for window in (16, 40):
            for overlap in (0.0, 0.25, 0.5):
                starts = inference._starts(size, window, overlap)
                assert starts[0] == 0 and starts[-1] == size - window
                steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
                assert 0 < max(steps) <= window * (1 - overlap)


def test_large_images_take_windows_by_themselves(monkeypatch):
    monkeypatch.setattr(inference, "LARGEST_WHOLE", 1000)
    monkeypatch.setattr(inference, "DEFAULT_WINDOW", (20, 20))
    model = Pixelwise()
    predict_image(model, random_image(25, 40), device=CPU)
    assert model.seen == [(25, 40)]
    model.seen.clear()
    predict_image(model, random_image(26, 40), device=CPU)
    assert set(model.seen) == {(20, 20)}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": (0, 8)}, r"window is \(0, 8\)"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap"),
    ],
)
def test_bad_windows_are_named(options, text):
    with pytest.raises(UserError, match=text):
        predict_image(Pixelwise(), random_image(4, 4), device=CPU, **options)


class Failing(nn.Module):
    """Raises what `fail` raises."""

    align_corners = False

    def __init__(self, fail: Callable[[], object]) -> None:
        super().__init__()
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        return self.predict_logits(x)

    def predict_logits(self, x: Tensor) -> Tensor:
        self.fail()
        raise AssertionError("nothing was raised")


def raise_kernel_out_of_memory() -> None:
    raise MemoryError("std::bad_alloc")


def raise_gpu_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "fail", [lambda: torch.empty(2**60, dtype=torch.uint8), raise_gpu_out_of_memory, raise_kernel_out_of_memory]
)
@pytest.mark.parametrize(
    ("window", "pieces"), [(None, "in one piece"), ((9, 9), "in one piece"), ((4, 8), r"in windows of 8 x 4")]
)
def test_too_little_memory_is_one_sentence(fail, window, pieces):
    message = rf"cpu has too little memory to predict an image of 9 x 7 pixels {pieces}: expected .* smaller --window"
    with pytest.raises(UserError, match=message) as error:
        predict_image(Failing(fail), random_image(7, 9), device=CPU, window=window)
    assert "\n" not in str(error.value)


def test_other_errors_of_a_model_are_not_hidden():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predict_image(Failing(lambda: torch.ones(2, 3) @ torch.ones(2, 3)), random_image(7, 9), device=CPU)


def test_bf16_autocast_reaches_the_model():
    class Spy(Pixelwise):
        def predict_logits(self, x: Tensor) -> Tensor:
            logits = super().predict_logits(x)
            self.dtypes = (x.dtype, logits.dtype)
            return logits

    model = Spy()
    predict_image(model, random_image(8, 8), device=CPU, dtype=torch.bfloat16, window=(4, 8))
    assert model.dtypes == (torch.bfloat16, torch.bfloat16)


class Toy(Dataset):
    name, split = "toy", "val"
    classes = Classes(tuple("abcde"), tuple((i, i, i) for i in range(5)))

    def __init__(self, truth: bool = True) -> None:
        self.truth = truth

    def __len__(self) -> int:
        return 3

    def stem(self, index: int) -> str:
        return f"image{index}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        image = random_image(6 + index, 9).numpy()
        mask = predict_image(Pixelwise(), torch.from_numpy(image), device=CPU).numpy()
        mask[0] = 255
        return image, mask if self.truth else None


def test_evaluate_dataset_scores_and_keeps_samples():
    calls = []

    def each(index, prediction):
        expected = predict_image(Pixelwise(), random_image(6 + index, 9), device=CPU)
        calls.append((index, torch.equal(prediction, expected)))

    result, kept = evaluate_dataset(Pixelwise(), Toy(), device=CPU, workers=0, keep={0, 2}, each=each)
    assert result["pixel_accuracy"] == 1.0
    assert sum(map(sum, result["confusion"])) == (5 + 6 + 7) * 9
    assert calls == [(0, True), (1, True), (2, True)]
    assert [image.shape for image, _, _ in kept] == [(6, 9, 3), (8, 9, 3)]
    for image, truth, prediction in kept:
        assert image.dtype == truth.dtype == prediction.dtype == np.uint8
        assert (truth[0] == 255).all() and (truth[1:] == prediction[1:]).all()


def test_evaluate_dataset_makes_no_label_map_that_nobody_asks_for(monkeypatch):
    expected, _ = evaluate_dataset(Pixelwise(), Toy(), device=CPU, workers=0, each=lambda *_: None)
    dataset, seen = Toy(), []
    samples = [dataset.load(index) for index in range(len(dataset))]
    monkeypatch.setattr(dataset, "load", lambda index: samples[index])
    monkeypatch.setattr(inference, "upsample_argmax", None)
    result, kept = evaluate_dataset(Pixelwise(), dataset, device=CPU, workers=0, progress=lambda: seen.append(1))
    assert result == expected and len(seen) == len(dataset) and not kept


def test_evaluate_dataset_without_truth_is_an_error():
    with pytest.raises(UserError, match="the split val of the data set toy has no truth"):
        evaluate_dataset(Pixelwise(), Toy(truth=False), device=CPU, workers=0)

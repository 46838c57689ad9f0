"""Several scales and the mirrored image: class probabilities averaged at the image's own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from deeplab_fast.data.augment import prepare
from deeplab_fast.errors import UserError
from deeplab_fast.inference import evaluate_dataset, predict_image

CPU = torch.device("cpu")


class Coarse(nn.Module):
    """Logits at a quarter of the size, which depend on a neighbourhood and tell left from right."""

    def __init__(self, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 5, stride=4, padding=2)
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape[-2:]))
        return 3 * self.conv(x)

    def predict_logits(self, x: Tensor) -> Tensor:
        return F.interpolate(self(x), x.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def picture(height: int, width: int) -> Tensor:
    """Smooth, so that two ways to resize it agree."""
    rough = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(rough, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth[0].permute(1, 2, 0)).to(torch.uint8)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("scales", "flip"), [((0.5, 1.0, 1.75), True), ((1.0,), True), ((0.75, 1.3), False)])
def test_labels_are_those_of_the_mean_probability(align_corners, scales, flip):
    """By PIL, in fp64."""
    model, image = Coarse(align_corners), picture(50, 71)
    mean = 0.0
    for scale in scales:
        size = (round(71 * scale), round(50 * scale))
        resized = Image.fromarray(image.numpy()).resize(size, Image.Resampling.BILINEAR)
        for mirrored in (False, True)[: 1 + flip]:
            pixels = np.array(resized)[:, ::-1].copy() if mirrored else np.array(resized)
            x = prepare(torch.from_numpy(pixels)[None], None, dtype=torch.float32)
            full = F.interpolate(model(x).double(), (50, 71), mode="bilinear", align_corners=align_corners)
            scores = full.softmax(1)[0]
            mean += (scores.flip(-1) if mirrored else scores) / len(scales) / (1 + flip)
    model.seen.clear()
    labels = predict_image(model, image, device=CPU, scales=scales, flip=flip)
    assert labels.shape == (50, 71) and labels.dtype == torch.uint8
    assert model.seen == [(round(50 * s), round(71 * s)) for s in scales for _ in range(1 + flip)]
    best, second = mean.topk(2, dim=0).values
    sure = best - second > 0.01  # elsewhere PIL's rounding may decide
    assert sure.float().mean() > 0.9 and len(labels.unique()) > 2
    assert torch.equal(labels.long()[sure], mean.argmax(0)[sure])


def test_scaled_sides_stay_on_the_grid_of_aligned_corners():
    """tensorflow/models: a side becomes (side - 1) * scale + 1, so that 513 x 0.5 and 513 x 1.5 are 257 and 769."""
    for align_corners, sizes in ((True, [(17, 25), (49, 75)]), (False, [(16, 25), (50, 75)])):
        model = Coarse(align_corners)
        predict_image(model, picture(33, 50), device=CPU, scales=(0.5, 1.5))
        assert model.seen == sizes


class BySize(nn.Module):
    """The same logits everywhere: sure of class 0 at the first size, and mildly for class 1 at any other."""

    align_corners = False

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.tensor([20.0, 0.0] if x.shape[-1] == 8 else [0.0, 1.5])
        return logits[None, :, None, None].expand(1, 2, *x.shape[-2:])


def test_probabilities_are_averaged_and_not_logits():
    image = picture(8, 8)
    assert (predict_image(BySize(), image, device=CPU, scales=(1.0, 0.5)) == 0).all()
    assert (predict_image(BySize(), image, device=CPU, scales=(1.0, 0.5, 2.0)) == 1).all()


class LeftEdge(nn.Module):
    align_corners = False

    def forward(self, x: Tensor) -> Tensor:
        logits = x.new_zeros(1, 2, *x.shape[-2:])
        logits[:, 0] = 1.0
        logits[:, 1, :, 0] = 4.0
        return logits

    predict_logits = forward


def test_the_mirrored_answer_is_mirrored_back():
    labels = predict_image(LeftEdge(), picture(6, 9), device=CPU, flip=True)
    assert (labels[:, [0, -1]] == 1).all() and (labels[:, 1:-1] == 0).all()


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.5)])
def test_windows_give_what_whole_images_give(scales):
    """A 1x1 convolution sees no border; at other scales probabilities are resized, and not logits."""

    class Pixelwise(Coarse):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)

    model, image = Pixelwise(), picture(40, 60)
    whole = predict_image(model, image, device=CPU, scales=scales, flip=True)
    model.seen.clear()
    tiled = predict_image(model, image, device=CPU, scales=scales, flip=True, window=(18, 25), overlap=0.3)
    assert set(model.seen) == {(18, 25)}
    assert (tiled == whole).float().mean() > (0.999 if scales == (1.0,) else 0.98)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (float("nan"),), (float("inf"),)])
def test_bad_scales_are_named(scales):
    with pytest.raises(UserError, match=r"the scales are \(.*: expected numbers above 0"):
        predict_image(Coarse(), picture(8, 8), device=CPU, scales=scales)


def test_scores_are_those_of_the_averaged_labels():
    class One:
        name, split, classes = "one", "val", range(6)

        def __len__(self) -> int:
            return 1

        def load(self, index: int):
            return picture(30, 40).numpy(), truth.numpy()

    image = picture(30, 40)
    truth = predict_image(Coarse(), image, device=CPU, scales=(0.5, 1.0), flip=True)
    plain = predict_image(Coarse(), image, device=CPU)
    result, _ = evaluate_dataset(Coarse(), One(), device=CPU, workers=0, scales=(0.5, 1.0), flip=True)
    assert result["pixel_accuracy"] == 1.0
    result, _ = evaluate_dataset(Coarse(), One(), device=CPU, workers=0)
    assert result["pixel_accuracy"] == pytest.approx((plain == truth).float().mean().item())
    assert result["pixel_accuracy"] < 1.0

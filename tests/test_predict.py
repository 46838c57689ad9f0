"""predict on every kind of photo: what is read, what is written and where, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deeplab_fast import checkpoint
from deeplab_fast.config import Config
from deeplab_fast.data.augment import MEAN, STD
from deeplab_fast.data.labels import CITYSCAPES, Classes
from deeplab_fast.errors import UserError
from deeplab_fast.predict import find_images, main, plan, read_upright
from deeplab_fast.visualize import overlay_with_legend

CLASSES = Classes(("dark", "bright"), ((30, 60, 90), (250, 200, 0)))


class Threshold(nn.Module):
    """Class 1 where a pixel is brighter than 127.5 in the mean of its channels."""

    align_corners = False

    def forward(self, x: Tensor) -> Tensor:
        return self.predict_logits(x)

    def predict_logits(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        grey = (x.float() * std + mean).mean(1, keepdim=True) - 0.5
        return torch.cat([-grey, grey], 1)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda path, device, **_: (Threshold(), Config(), CLASSES))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def run(*arguments: object) -> int:
    return main(["best.pt", "--device", "cpu", "--precision", "fp32", *map(str, arguments)])


def half_bright(height: int = 23, width: int = 31) -> np.ndarray:
    """uint8 (H, W): the left third is bright."""
    grey = np.full((height, width), 20, np.uint8)
    grey[:, : width // 3] = 230
    return grey


def expected_mask(grey: np.ndarray) -> np.ndarray:
    return (grey > 127).astype(np.uint8)


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as mask:
        assert mask.mode == "P"
        return np.array(mask)


def test_mask_and_overlay_of_one_image(photos, tmp_path):
    grey = half_bright(92, 250)
    Image.fromarray(grey).convert("RGB").save(photos / "a.png")
    assert run(photos / "a.png", "--output", tmp_path / "out", "--alpha", 0.1) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "a_overlay.jpg"]
    mask = read_mask(tmp_path / "out" / "a.png")
    assert (mask == expected_mask(grey)).all()
    with Image.open(tmp_path / "out" / "a_overlay.jpg") as drawn:
        wanted = overlay_with_legend(np.array(Image.fromarray(grey).convert("RGB")), mask, CLASSES, alpha=0.1)
        assert drawn.size == wanted.shape[1::-1]
        assert np.abs(np.array(drawn).astype(int) - wanted).mean() < 2


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "L"),
        ("a.png", "RGBA"),
        ("a.jpg", "CMYK"),
        ("a.png", "P"),
        ("a.png", "1"),
        ("a.tif", "I;16"),
        ("a.bmp", "RGB"),
    ],
)
def test_every_pixel_format_gives_the_same_mask(photos, tmp_path, name, mode):
    grey = half_bright()
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert("RGB").convert(mode, dither=Image.Dither.NONE)
    picture.save(photos / name, **({"quality": 100} if name.endswith("jpg") else {}))
    assert run(photos / name, "--output", tmp_path / "out") == 0
    assert (read_mask(tmp_path / "out" / "a.png") == expected_mask(grey)).mean() > (0.95 if mode == "CMYK" else 0.999)


# What an EXIF orientation stores: the upright picture, brought into the file's order by the inverse turn.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_once(photos, tmp_path, orientation, suffix):
    upright = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(photos / f"a.{suffix}", exif=exif)
    assert (read_upright(photos / f"a.{suffix}") == upright).all()
    assert run(photos, "--output", tmp_path / "out", "--no-overlay") == 0
    assert read_mask(tmp_path / "out" / "a.png").shape == (6, 9)


def test_a_folder_is_searched_and_keeps_its_sub_folders(photos, tmp_path):
    (photos / "x" / "y").mkdir(parents=True)
    for name in ("a.jpg", "x/a.JPG", "x/y/b.c.png", "x/.hidden.png"):
        Image.fromarray(half_bright()).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    assert run(photos, "--output", tmp_path / "out", "--no-overlay") == 0
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == ["a.png", "x/a.png", "x/y/b.c.png"]


def test_two_inputs_with_one_name_both_survive(photos, tmp_path):
    (photos / "x").mkdir()
    for number, name in enumerate(("a.jpg", "A.png", "x/a.png")):
        Image.fromarray(half_bright(10 + number, 12)).save(photos / name)
    assert run(photos / "a.jpg", photos / "A.png", photos / "x" / "a.png", "--output", tmp_path / "out") == 0
    heights = {p.name: len(read_mask(p)) for p in (tmp_path / "out").glob("*.png")}
    assert heights == {"a.png": 10, "A-2.png": 11, "a-3.png": 12}


def test_a_file_that_is_named_twice_is_read_once(photos):
    Image.fromarray(half_bright()).save(photos / "a.png")
    assert len(find_images([photos, photos / "a.png"], Path("out"))) == 1


def test_its_own_output_is_no_input(photos):
    Image.fromarray(half_bright()).save(photos / "a.jpg")
    for _ in range(2):
        assert run(photos, "--output", photos / "out") == 0
    assert sorted(p.name for p in photos.rglob("*.png")) == ["a.png"]


def test_output_around_the_input_folder_hides_no_image(photos):
    Image.fromarray(half_bright()).save(photos / "a.jpg")
    assert run(photos, "--output", photos.parent) == 0
    assert (photos.parent / "a.png").is_file()


def test_an_input_is_never_written_over(photos):
    Image.fromarray(half_bright()).save(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"a\.png would be written over an input"):
        run(photos, "--output", photos)
    assert (photos / "a.png").read_bytes() == before
    with pytest.raises(UserError, match=r"b_overlay\.jpg would be written over an input"):
        plan([(photos / "b.jpg", Path("b")), (photos / "b_overlay.jpg", Path("b_overlay"))], photos)


def test_a_file_that_is_not_its_own_is_never_written_over(photos, tmp_path):
    """`predict best.pt images --output masks`, where masks holds the truth."""
    for name in ("a", "b"):
        Image.fromarray(half_bright()).save(photos / f"{name}.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(half_bright()).save(tmp_path / "masks" / "b.png")
    before = (tmp_path / "masks" / "b.png").read_bytes()
    with pytest.raises(UserError, match=r"masks/b\.png was not written by deeplab_fast and is not replaced"):
        run(photos, "--output", tmp_path / "masks")
    assert [p.name for p in (tmp_path / "masks").iterdir()] == ["b.png"]
    assert (tmp_path / "masks" / "b.png").read_bytes() == before

    (tmp_path / "drawn").mkdir()
    Image.fromarray(half_bright()).save(tmp_path / "drawn" / "a_overlay.jpg")
    with pytest.raises(UserError, match=r"a_overlay\.jpg was not written by deeplab_fast"):
        run(photos, "--output", tmp_path / "drawn")
    assert run(photos, "--output", tmp_path / "drawn", "--no-overlay") == 0


def test_its_own_files_are_written_anew(photos, tmp_path):
    for grey in (half_bright(), 255 - half_bright()):
        Image.fromarray(grey).save(photos / "a.png")
        assert run(photos, "--output", tmp_path / "out") == 0
        assert (read_mask(tmp_path / "out" / "a.png") == expected_mask(grey)).all()


def test_broken_images_are_named_and_the_others_done(photos, tmp_path, capsys):
    Image.fromarray(half_bright(200, 300)).save(photos / "cut.jpg")
    (photos / "cut.jpg").write_bytes((photos / "cut.jpg").read_bytes()[:900])
    (photos / "empty.png").write_bytes(b"")
    Image.fromarray(half_bright()).save(photos / "good.png")
    assert run(photos, "--output", tmp_path / "out", "--no-overlay") == 1
    captured = capsys.readouterr()
    assert "cut.jpg cannot be read" in captured.err and "empty.png cannot be read" in captured.err
    assert "error: images that could not be read: 2" in captured.err
    assert "1 of 3 images done: masks in" in captured.out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


def test_windows_give_the_same_mask(photos, tmp_path):
    grey = half_bright(50, 77)
    Image.fromarray(grey).save(photos / "a.png")
    assert run("--window", 16, 20, photos / "a.png", "--output", tmp_path / "out") == 0
    assert (read_mask(tmp_path / "out" / "a.png") == expected_mask(grey)).all()


def test_the_output_stride_reaches_the_model(photos, tmp_path, monkeypatch):
    asked = []
    load = lambda path, device, output_stride: asked.append(output_stride) or (Threshold(), Config(), CLASSES)  # noqa: E731
    monkeypatch.setattr(checkpoint, "load_model", load)
    Image.fromarray(half_bright()).save(photos / "a.png")
    for flags in ([], ["--output-stride", 8]):
        assert run(photos / "a.png", "--output", tmp_path / "out", *flags) == 0
    assert asked == [None, 8]


def test_wrong_arguments_are_one_sentence(photos, tmp_path):
    with pytest.raises(UserError, match="photos holds no image"):
        run(photos, "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"missing\.jpg does not exist; expected an image or a folder"):
        run(photos / "missing.jpg", "--output", tmp_path / "out")
    with pytest.raises(UserError, match="no image is given"):
        run("--output", tmp_path / "out")
    Image.fromarray(half_bright()).save(photos / "a.png")
    with pytest.raises(UserError, match=r"--alpha 1\.5: expected 0 to 1"):
        run(photos, "--output", tmp_path / "out", "--alpha", 1.5)
    with pytest.raises(UserError, match="the folder .*a.png/out cannot be made"):
        run(photos, "--output", photos / "a.png" / "out")


def test_submission_holds_label_ids_and_is_there_whole_or_not_at_all(photos, tmp_path, monkeypatch):
    save_photo = lambda name: Image.fromarray(half_bright()).save(photos / name)  # noqa: E731
    for city in ("berlin", "bonn"):
        save_photo(f"{city}_000000_000019_leftImg8bit.png")
    archive = tmp_path / "out.zip"
    arguments = [photos, "--output", tmp_path / "out", "--submission", archive]
    with pytest.raises(UserError, match="the checkpoint has other classes"):
        run(*arguments)
    monkeypatch.setattr(checkpoint, "load_model", lambda path, device, **_: (Threshold(), Config(), CITYSCAPES))
    (photos / "broken.png").write_bytes(b"PNG")
    with pytest.raises(UserError, match="broken.png cannot be read: .*; a submission needs every image"):
        run(*arguments)
    assert not archive.exists() and not list(tmp_path.glob(".out*"))
    (photos / "broken.png").unlink()
    assert run(*arguments) == 0
    with zipfile.ZipFile(archive) as file:
        assert sorted(file.namelist()) == [f"{c}_000000_000019_pred_labelIds.png" for c in ("berlin", "bonn")]
        ids = np.array(Image.open(io.BytesIO(file.read("bonn_000000_000019_pred_labelIds.png"))))
    # The classes 0 and 1 are road, 7 among the ids, and sidewalk, 8.
    np.testing.assert_array_equal(ids, 7 + expected_mask(half_bright()))
    for wrong, why in (
        (archive, "exists"),
        (tmp_path / "a.tar", "expected the name of a .zip"),
        (tmp_path / "no/a.zip", "no does not exist"),
    ):
        with pytest.raises(UserError, match=why):
            run(photos, "--output", tmp_path / "out", "--submission", wrong)
    (photos / "again").mkdir()
    save_photo("again/bonn_000000_000019_leftImg8bit.png")
    with pytest.raises(UserError, match="two images are called bonn"):
        run(photos, "--output", tmp_path / "out", "--submission", tmp_path / "b.zip")

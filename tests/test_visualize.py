"""Pictures: exact colours, the palette of PNG masks, legends, and files written whole or not at all."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data.labels import VOC, Classes
from deeplab_fast.errors import UserError
from deeplab_fast.files import atomic_path, make_folder
from deeplab_fast.visualize import (
    IGNORE_COLOUR,
    check_replaceable,
    colourise,
    overlay,
    overlay_with_legend,
    sample_grid,
    save_confusion,
    save_curves,
    save_image,
    save_palette_png,
    save_samples,
)

CLASSES = Classes(("black", "red", "blue"), ((0, 0, 0), (200, 0, 0), (0, 0, 200)))


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(-1).any())


def test_colourise():
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    assert colourise(mask, CLASSES).tolist() == [[[0, 0, 0], [200, 0, 0], [0, 0, 200], list(IGNORE_COLOUR)]]


def test_colourise_rejects_what_is_no_class():
    with pytest.raises(UserError, match="holds the value 3, but the classes are 0 to 2"):
        colourise(np.array([[0, 3]], np.uint8), CLASSES)


def test_palette_png_round_trip(tmp_path):
    mask = np.array([[0, 1, 2], [255, 20, 7]], np.uint8)
    save_palette_png(tmp_path / "mask.png", mask, VOC)
    with Image.open(tmp_path / "mask.png") as read:
        assert read.mode == "P"
        assert np.array(read).tolist() == mask.tolist()
        assert (np.array(read.convert("RGB")) == colourise(mask, VOC)).all()


def test_overlay_blends_by_alpha_and_leaves_ignored_pixels():
    image = np.full((9, 9, 3), 100, np.uint8)
    assert (overlay(image, np.full((9, 9), 1, np.uint8), CLASSES, alpha=0.5) == (150, 50, 50)).all()
    assert (overlay(image, np.zeros((9, 9), np.uint8), CLASSES, alpha=0.5) == 75).all()  # black: half of alpha
    assert (overlay(image, np.full((9, 9), 255, np.uint8), CLASSES, alpha=0.5) == 100).all()
    assert (overlay(image, np.full((9, 9), 2, np.uint8), CLASSES, alpha=0) == 100).all()


def test_overlay_draws_the_border_between_classes():
    mask = np.ones((8, 8), np.uint8)
    mask[:, 4:] = 2
    drawn = overlay(np.zeros((8, 8, 3), np.uint8), mask, CLASSES, alpha=1.0)
    assert (drawn[:, 3] == 255).all()
    assert (drawn[:, 2] == (200, 0, 0)).all() and (drawn[:, 4] == (0, 0, 200)).all()


def test_overlay_rejects_another_size():
    with pytest.raises(ValueError, match="differ in size"):
        overlay(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.uint8), CLASSES)


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (301, 500)])
def test_legend_shows_the_classes_that_are_present(size):
    image, mask = np.full((*size, 3), 90, np.uint8), np.full(size, 1, np.uint8)
    page = overlay_with_legend(image, mask, CLASSES, alpha=0.5)
    legend = page[size[0] :]
    assert page.shape[1] == max(size[1], 240)
    assert has_colour(legend, (200, 0, 0)) and not has_colour(legend, (0, 0, 200))
    assert has_colour(legend, (20, 20, 20))  # the text
    left = (page.shape[1] - size[1]) // 2
    assert (page[: size[0], left : left + size[1]] == overlay(image, mask, CLASSES, alpha=0.5)).all()


def test_legend_breaks_into_lines_that_fit():
    names = tuple(f"a rather long class name {i}" for i in range(21))
    classes = Classes(names, VOC.palette)
    mask = np.arange(21, dtype=np.uint8).repeat(20).reshape(20, 21).repeat(30, 1)
    page = overlay_with_legend(np.zeros((20, 630, 3), np.uint8), mask, classes)
    assert page.shape[1] == 630
    for colour in VOC.palette:
        assert has_colour(page[20:], colour)


def test_sample_grid_places_image_truth_and_prediction():
    image = np.full((20, 40, 3), 60, np.uint8)
    truth, prediction = np.full((20, 40), 1, np.uint8), np.full((20, 40), 2, np.uint8)
    grid = sample_grid([(image, truth, prediction), (image, None, prediction)], CLASSES, cell=120)
    # Two rows of 120 x 60 below a title of 24, with gaps of 2.
    assert [tuple(grid[54, x]) for x in (62, 184, 306)] == [(60, 60, 60), (200, 0, 0), (0, 0, 200)]
    assert [tuple(grid[116, x]) for x in (62, 184, 306)] == [(60, 60, 60), (255, 255, 255), (0, 0, 200)]


def test_sample_grid_is_one_picture_of_samples_of_any_size():
    rows = [
        (np.zeros((high, wide, 3), np.uint8), np.zeros((high, wide), np.uint8), np.ones((high, wide), np.uint8))
        for high, wide in ((20, 40), (40, 20), (1, 1))
    ]
    heights = []
    for number in (1, 2, 3):
        grid = sample_grid(rows[:number], CLASSES, cell=120)
        assert grid.dtype == np.uint8 and grid.shape[1:] == (3 * 120 + 4 * 2, 3)
        assert grid.flags.c_contiguous and grid.flags.writeable  # torch.from_numpy warns of a read-only array
        heights.append(len(grid))
    assert np.diff(heights).tolist() == [122, 122]


def test_pictures_carry_the_mark_that_lets_them_be_replaced(tmp_path):
    mask = np.ones((600, 800), np.uint8)
    save_palette_png(tmp_path / "a.png", mask, CLASSES)
    with Image.open(tmp_path / "a.png") as read:
        assert read.text == {"Software": "deeplab_fast"}
    for name in ("b.png", "b.jpg"):
        save_image(tmp_path / name, colourise(mask, CLASSES))
    check_replaceable([tmp_path / name for name in ("a.png", "b.png", "b.jpg", "none.png", "none/x.png")])


@pytest.mark.parametrize("name", ["other.png", "other.jpg", "text.png", "empty.png", "folder.png"])
def test_a_file_of_somebody_else_is_not_replaceable(tmp_path, name):
    Image.new("P", (4, 4)).save(tmp_path / "other.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "other.jpg", comment="of deeplab_fast")
    (tmp_path / "text.png").write_text("Software deeplab_fast")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=rf"{name} was not written by deeplab_fast and is not replaced"):
        check_replaceable([tmp_path / "none.png", tmp_path / name])


def test_a_place_that_cannot_be_looked_at_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a+\.png cannot be read: File name too long"):
        check_replaceable([tmp_path / ("a" * 300 + ".png")])


def test_save_samples_writes_the_grid(tmp_path):
    rows = [(np.zeros((31, 17, 3), np.uint8), np.zeros((31, 17), np.uint8), np.ones((31, 17), np.uint8))]
    save_samples(tmp_path / "samples.png", rows, CLASSES)
    with Image.open(tmp_path / "samples.png") as read:
        assert (np.array(read) == sample_grid(rows, CLASSES)).all()


def test_curves_and_confusion_are_pictures(tmp_path):
    records = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in range(1, 40)] + [{"step": 39, "miou": 0.4}]
    save_curves(tmp_path / "curves.png", records)
    save_curves(tmp_path / "first.png", records[:1])
    save_confusion(tmp_path / "confusion.png", [[3, 1, 0], [0, 2, 0], [0, 0, 0]], CLASSES)
    many = Classes(tuple(f"class {i}" for i in range(60)), tuple((i, i, i) for i in range(60)))
    save_confusion(tmp_path / "many.png", np.eye(60, dtype=np.int64).tolist(), many)
    sizes = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as read:
            sizes[path.stem] = read.size
            assert len(read.convert("RGB").getcolors(2**24)) > 20
    assert sizes["many"][0] > 2 * sizes["confusion"][0]


def test_confusion_is_divided_by_rows(tmp_path):
    counts = np.diag([1, 1000, 5])
    save_confusion(tmp_path / "a.png", counts, CLASSES)
    save_confusion(tmp_path / "b.png", counts * [[7], [1], [3]], CLASSES)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_atomic_path_replaces_only_on_success(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == tmp_path and temporary.suffix == ".json"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["result.json"]


def test_atomic_path_on_a_full_disk(tmp_path):
    with (
        pytest.raises(UserError, match=r"a\.png cannot be written: No space left on device"),
        atomic_path(tmp_path / "a.png") as temporary,
    ):
        temporary.write_bytes(b"part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_atomic_path_without_its_folder(tmp_path):
    with (
        pytest.raises(UserError, match=r"a\.txt cannot be written: No such file or directory"),
        atomic_path(tmp_path / "missing" / "a.txt") as temporary,
    ):
        temporary.write_text("x")


def test_make_folder_names_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"the folder .*file/sub cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "sub")
    assert make_folder(tmp_path / "a" / "b").is_dir()

"""Files on disk to pairs, and every way in which they can be wrong."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.config import DataConfig
from deeplab_fast.data.datasets import LISTED_PROBLEMS, check_dataset, open_dataset, require_truth
from deeplab_fast.data.images import read_image
from deeplab_fast.data.labels import IGNORE
from deeplab_fast.errors import UserError

H, W = 12, 16


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def photo(seed: int = 0, size: tuple[int, int] = (H, W)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def labels(*values: int, size: tuple[int, int] = (H, W), dtype: type = np.uint8) -> np.ndarray:
    """A mask in which the values take turns."""
    return np.resize(np.array(values, dtype), size)


def folder_set(
    root: Path,
    names: str = '["a", "b", "c"]',
    extra: str = "",
    stems: Sequence[str] = "pqrst",
    listed: Sequence[str] = (),
) -> Path:
    """Five photos and their masks in one folder each, two of five held out, or `listed` in train.txt."""
    for number, stem in enumerate(stems):
        save(root / "images" / f"{stem}.jpg", photo(number))
        save(root / "masks" / f"{stem}.png", labels(0, 1, 2, 255))
    if listed:
        (root / "train.txt").write_text("\n".join(listed))
    else:
        extra += "\nval_fraction = 0.4"
    (root / "dataset.toml").write_text(f"names = {names}\n{extra}\n")
    return root


def opened(root: Path, split: str = "train", name: str = "folder", **fields):
    return open_dataset(DataConfig(name=name, root=str(root), **fields), split)


def messages(dataset) -> str:
    with pytest.raises(UserError) as caught:
        check_dataset(dataset, 1)
    return str(caught.value)


# Folder data sets


def test_folder_from_five_photos(tmp_path):
    root = folder_set(tmp_path)
    train, val = opened(root), opened(root, "val")
    stems = [{dataset.stem(i) for i in range(len(dataset))} for dataset in (train, val)]
    assert [len(s) for s in stems] == [3, 2]
    assert stems[0] | stems[1] == set("pqrst")
    for dataset in (train, val):
        check_dataset(dataset, 2)
        image, mask = dataset.load(0)
        assert image.shape == (H, W, 3) and image.dtype == np.uint8
        assert mask.dtype == np.uint8 and set(mask.ravel()) == {0, 1, 2, IGNORE}
    assert train.classes.names == ("a", "b", "c")
    assert len(set(train.classes.palette)) == 3


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_folder_layouts_by_split(tmp_path, layout):
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            save(tmp_path / layout.format(split=split, kind="images") / f"{i}.bmp", photo(i))
            save(tmp_path / layout.format(split=split, kind="masks") / f"{i}.tif", labels(0, 1))
    (tmp_path / "dataset.json").write_text('{"names": ["a", "b"]}')
    assert [len(opened(tmp_path, split)) for split in ("train", "val")] == [2, 1]
    check_dataset(opened(tmp_path), 1)


def test_folder_lists(tmp_path):
    folder_set(tmp_path, stems=("one.v2", "two"), listed=["two.jpg", ""])
    (tmp_path / "val.txt").write_text("images/one.v2.jpg\n")
    assert [opened(tmp_path, split).stem(0) for split in ("train", "val")] == ["two", "one.v2"]
    (tmp_path / "val.txt").write_text("three\n")
    assert "three.jpg does not exist" in messages(opened(tmp_path, "val"))
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val\.txt is empty"):
        opened(tmp_path, "val")


def test_a_list_alone_makes_no_other_split(tmp_path):
    folder_set(tmp_path, listed="pq")
    assert len(opened(tmp_path)) == 2
    with pytest.raises(UserError, match=r"has no split val: looked for .* list val\.txt"):
        opened(tmp_path, "val")


@pytest.mark.parametrize("listed", ["train", "val", "test"])
def test_lists_and_val_fraction_exclude_each_other(tmp_path, listed):
    folder_set(tmp_path)
    (tmp_path / f"{listed}.txt").write_text("p\n")
    for split in ("train", "val"):
        with pytest.raises(UserError, match=rf"dataset\.toml has val_fraction beside the list {listed}\.txt"):
            opened(tmp_path, split)


@pytest.mark.parametrize("layout", ["train/{}", "{}/train"])
def test_val_fraction_of_one_folder_holds_out_nothing_from_another(tmp_path, layout):
    folder_set(tmp_path)
    for kind in ("images", "masks"):
        save(tmp_path / layout.format(kind) / "p.png", labels(0))
    assert len(opened(tmp_path)) == 1
    with pytest.raises(UserError, match="has no split val: .* without lists and such folders, .* val_fraction"):
        opened(tmp_path, "val")


@pytest.mark.parametrize(
    "line",
    [
        "IMG 0001",
        "IMG 0001.jpg",
        "images/IMG 0001.jpg",
        "IMG 0001.jpg IMG 0001.png",
        "images/IMG 0001.jpg masks/IMG 0001.png",
        "IMG 0001\tmasks/IMG 0001.png",
    ],
)
def test_listed_names_may_hold_spaces(tmp_path, line):
    folder_set(tmp_path, stems=("IMG", "IMG 0001", "x"), listed=[line])
    assert opened(tmp_path).stem(0) == "IMG 0001"
    check_dataset(opened(tmp_path), 1)


@pytest.mark.parametrize("line", ["x", "x.jpg x.png", "images/x.jpg masks/IMG.png", "x 1"])
def test_what_follows_a_listed_name_is_left_out(tmp_path, line):
    folder_set(tmp_path, stems=("IMG", "IMG 0001", "x"), listed=[line])
    assert [opened(tmp_path).stem(i) for i in range(len(opened(tmp_path)))] == ["x"]


def test_encoding_of_lists_and_descriptions(tmp_path):
    folder_set(tmp_path, names='["a", "grün", "c"]', stems=("für", "p"), listed=["p"])
    for name in ("train.txt", "dataset.toml"):  # as Windows' editors save it
        (tmp_path / name).write_text((tmp_path / name).read_text("utf-8"), "utf-8-sig")
    assert (opened(tmp_path).stem(0), opened(tmp_path).classes.names[1]) == ("p", "grün")
    (tmp_path / "train.txt").write_bytes("für\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.txt is not in UTF-8: invalid start byte at byte 1$"):
        opened(tmp_path)
    (tmp_path / "dataset.toml").write_bytes('names = ["grün"]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"dataset\.toml cannot be read: 'utf-8' codec"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("method", "name"), [("iterdir", "images"), ("read_text", "train.txt"), ("read_text", "dataset.toml")]
)
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, method, name):
    folder_set(tmp_path, listed="pq")
    original = getattr(Path, method)

    def refuse(path: Path, *args):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied$"):
        opened(tmp_path)


def test_names_too_long_for_the_file_system(tmp_path):
    folder_set(tmp_path, listed=["p", "x" * 300])
    assert "x.jpg cannot be read: " in messages(opened(tmp_path))
    with pytest.raises(UserError, match="cannot be read: "):
        opened(tmp_path, "x" * 300)


def test_folder_test_split_may_lack_masks(tmp_path):
    save(tmp_path / "test/images/a.png", photo())
    (tmp_path / "dataset.toml").write_text('names = ["a"]')
    assert opened(tmp_path, "test").load(0)[1] is None
    (tmp_path / "test").rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"train/masks does not exist"):
        opened(tmp_path)


def test_folder_ids_and_ignore(tmp_path):
    folder_set(tmp_path, '["background", "leaf"]', "ids = [0, 255]\nignore = [7, 300]", listed="pq")
    save(tmp_path / "masks/p.png", labels(0, 255, 7))
    save(tmp_path / "masks/q.png", labels(255, 300, dtype=np.uint16))
    dataset = opened(tmp_path)
    assert dataset.load(0)[1][0, :3].tolist() == [0, 1, IGNORE]
    assert dataset.load(1)[1][0, :2].tolist() == [1, IGNORE]


def test_folder_255_may_be_a_class(tmp_path):
    folder_set(tmp_path, '["background", "leaf"]', "ids = [0, 255]", stems="pq")
    save(tmp_path / "masks/p.png", labels(0, 255))
    save(tmp_path / "masks/q.png", labels(0, 255))
    assert set(opened(tmp_path).load(0)[1].ravel()) == {0, 1}


def test_colour_masks(tmp_path):
    palette = "palette = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]"
    folder_set(tmp_path, extra=f'{palette}\nmasks = "colour"\nignore = [9, 9, 9]', stems="pq", listed="pq")
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    save(tmp_path / "masks/p.png", colours[labels(0, 1, 2, 3)])
    indexed = Image.fromarray(colours[labels(0, 1, 2, 3)]).quantize(4)
    assert indexed.mode == "P"
    indexed.save(tmp_path / "masks/q.png")
    dataset = opened(tmp_path)
    for i in range(2):
        np.testing.assert_array_equal(dataset.load(i)[1], labels(0, 1, 2, IGNORE))
    wrong = colours[labels(0, 1, 2, 3)]
    wrong[3, 4] = (1, 2, 3)
    save(tmp_path / "masks/p.png", wrong)
    assert "p.png holds the colour (1, 2, 3); expected those that" in messages(dataset)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r'has no names; expected a line such as names = \["background", "leaf"\]'),
        ("names = [", "cannot be read"),
        ('names = "leaf"', 'names = "leaf"; expected a list of strings'),
        ('names = ["a"]\ncolors = 1', "has the field colors; expected names, masks"),
        ('names = ["a"]\nmasks = "rgb"', 'masks = "rgb"; expected "index" or "colour"'),
        ('names = ["a"]\nmasks = "colour"', "palette = null; expected 1 colours"),
        ('names = ["a"]\npalette = [[0, 0, 256]]', r"palette = \[\[0, 0, 256\]\]; expected 1 colours"),
        ('names = ["a"]\nids = [1, 2]', r"ids = \[1, 2\]; expected 1 values"),
        ('names = ["a", "b"]\nignore = 1', "gives 1 two meanings"),
        ('names = ["a", "b"]\nids = [3, 3]', "gives 3 two meanings"),
        ('names = ["a"]\nignore = "x"', 'ignore = "x"; expected a value'),
        ('names = ["a"]\nval_fraction = 2', "val_fraction = 2; expected a number between 0 and 1"),
        (f"names = {['a'] * 255}", "names 255 classes; expected 254 at most"),
        ('names = ["a", "b", "a"]', "names the class a twice; expected a name of its own for each"),
    ],
)
def test_description_mistakes(tmp_path, text, match):
    folder_set(tmp_path)
    (tmp_path / "dataset.toml").write_text(text)
    with pytest.raises(UserError, match=match):
        opened(tmp_path)


def test_folder_without_description_or_split(tmp_path):
    folder_set(tmp_path)
    with pytest.raises(UserError, match="has no split other: looked for the folders other/images"):
        opened(tmp_path, "other")
    (tmp_path / "dataset.toml").unlink()
    with pytest.raises(UserError, match=r'dataset\.toml does not exist; .* names = \["background", "leaf"\]'):
        opened(tmp_path)


# Broken files


def test_check_lists_every_problem(tmp_path):
    folder_set(tmp_path, stems="pqrstuv", listed="pqrstuv")
    (tmp_path / "masks/p.png").unlink()
    (tmp_path / "images/q.jpg").unlink()
    save(tmp_path / "masks/r.png", labels(0, size=(H, W + 1)))
    save(tmp_path / "masks/s.png", labels(0, 200))
    truncated = save(tmp_path / "images/t.jpg", photo(size=(64, 64)))
    save(tmp_path / "masks/t.png", labels(0, size=(64, 64)))
    truncated.write_bytes(truncated.read_bytes()[:-600])
    (tmp_path / "images/u.jpg").write_text("not an image")
    (tmp_path / "masks/u.png").write_bytes((tmp_path / "masks/v.png").read_bytes()[:45])
    lines = messages(opened(tmp_path)).split("\n")
    expected = [
        "the split train of the data set folder has 7 problems:",
        "masks/p.png does not exist",
        "images/q.jpg does not exist",
        "r.jpg is 16 x 12 but its mask",
        "s.png holds 200; expected the values of the 3 classes",
        "t.jpg cannot be read: image file is truncated",
        "u.jpg cannot be read: cannot identify image file",
        "u.png cannot be read:",
    ]
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line


def test_check_caps_its_list(tmp_path):
    stems = [f"{i:02d}" for i in range(LISTED_PROBLEMS + 5)]
    folder_set(tmp_path, stems=stems, listed=stems)
    for stem in stems:
        (tmp_path / f"masks/{stem}.png").unlink()
    lines = messages(opened(tmp_path)).split("\n")
    assert len(lines) == LISTED_PROBLEMS + 2
    assert lines[-1] == "  ... and 5 more"


def test_masks_without_a_labelled_pixel(tmp_path):
    folder_set(tmp_path, stems="pq", listed="pq")
    save(tmp_path / "masks/p.png", labels(255))
    check_dataset(opened(tmp_path), 1)
    save(tmp_path / "masks/q.png", labels(255))
    lines = messages(opened(tmp_path)).split("\n")
    assert lines == [
        "the split train of the data set folder has 1 problem:",
        "  every pixel of every mask is ignored; expected some that show a class",
    ]


def test_a_split_without_masks_has_no_truth(tmp_path):
    city_set(tmp_path, "labelIds", (7,))
    test = opened(tmp_path, "test", "cityscapes")
    check_dataset(test, 1)
    with pytest.raises(
        UserError, match="^the split test of the data set cityscapes has no masks to train on or score against$"
    ):
        require_truth(test)
    require_truth(opened(tmp_path, "val", "cityscapes"))
    require_truth(open_dataset(DataConfig(), "train"))


def test_truncated_png_is_found(tmp_path):
    folder_set(tmp_path, stems="pq")
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    for stem in "pq":
        path = save(tmp_path / f"images/{stem}.png", photo(size=(H, W)))
        path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in messages(opened(tmp_path))
    with pytest.raises(UserError, match=r"images/.\.png cannot be read"):
        opened(tmp_path).load(0)


def test_truncated_jpeg_names_the_file_and_pickles(tmp_path):
    path = save(tmp_path / "a.jpg", photo(size=(64, 64)))
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match=r"a\.jpg cannot be read: image file is truncated") as caught:
        read_image(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_16_bit_masks(tmp_path):
    folder_set(tmp_path, stems="pq", listed="pq")
    save(tmp_path / "masks/p.png", labels(0, 2, 255, dtype=np.uint16))
    save(tmp_path / "masks/q.tif", labels(0, 2, 255, dtype=np.int32))
    (tmp_path / "masks/q.png").unlink()
    dataset = opened(tmp_path)
    for i in range(2):
        np.testing.assert_array_equal(dataset.load(i)[1], labels(0, 2, IGNORE))
    save(tmp_path / "masks/p.png", labels(0, 1000, dtype=np.uint16))
    save(tmp_path / "masks/q.tif", labels(0, -1, dtype=np.int32))
    found = messages(dataset)
    assert "p.png holds 1000; expected" in found
    assert "q.tif holds -1 ... 0; expected 0 ... 65535" in found


def test_rgb_masks_in_an_index_set(tmp_path):
    folder_set(tmp_path, stems="pq", listed="pq")
    save(tmp_path / "masks/p.png", labels(0, 1, 2)[:, :, None].repeat(3, 2))
    save(tmp_path / "masks/q.png", photo())
    dataset = opened(tmp_path)
    np.testing.assert_array_equal(dataset.load(0)[1], labels(0, 1, 2))
    assert "q.png is in colour where one channel of class ids is expected" in messages(dataset)


def test_jpeg_mask_is_refused(tmp_path):
    folder_set(tmp_path, stems="pq")
    for stem in "pq":
        (tmp_path / f"masks/{stem}.png").rename(tmp_path / f"masks/{stem}.jpg")
    assert ".jpg is a JPEG, whose compression changes the values" in messages(opened(tmp_path))


def test_sizes_that_differ_by_an_exif_rotation_say_so(tmp_path):
    folder_set(tmp_path, stems="pq")
    exif = Image.Exif()
    exif[0x0112] = 6
    for stem in "pq":
        save(tmp_path / f"images/{stem}.jpg", photo(size=(W, H)), exif=exif)
    assert "is 12 x 16 but its mask" in (found := messages(opened(tmp_path)))
    assert "save it upright" in found


def test_twin_stems_and_stray_masks(tmp_path):
    folder_set(tmp_path, stems="pq")
    save(tmp_path / "masks/stray.png", labels(0))
    both = [problem for split in ("train", "val") for i in range(2) for problem in _problems(tmp_path, split, i)]
    assert len(both) == 1 and "images/stray.jpg does not exist" in both[0]
    save(tmp_path / "images/p.png", photo())
    with pytest.raises(UserError, match="have the same name but for the suffix"):
        opened(tmp_path)


def _problems(root: Path, split: str, index: int) -> tuple[str, ...]:
    dataset = opened(root, split)
    return dataset.inspect(index).problems if index < len(dataset) else ()


def test_empty_folder_and_wrong_roots(tmp_path):
    for split in ("images", "masks"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    (tmp_path / "empty/dataset.toml").write_text('names = ["a"]\nval_fraction = 0.5')
    with pytest.raises(UserError, match="empty/images holds no image; expected files ending in .jpg"):
        opened(tmp_path / "empty")
    with pytest.raises(UserError, match="give its folder with --root"):
        open_dataset(DataConfig(name="voc"), "train")
    with pytest.raises(UserError, match="none of the data set camvid is not a folder"):
        opened(tmp_path / "none", name="camvid")
    with pytest.raises(UserError, match=r"holds no PASCAL VOC 2012: looked for .*VOC2012/ImageSets/Segmentation"):
        opened(tmp_path, name="voc")
    with pytest.raises(UserError, match="holds no Cityscapes: looked for the folder .*leftImg8bit/train"):
        opened(tmp_path, name="cityscapes")
    with pytest.raises(UserError, match="holds no CamVid: looked for the folders train, trainannot"):
        opened(tmp_path, name="camvid")


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "scenes"])
def test_unknown_split(tmp_path, name):
    with pytest.raises(UserError, match=f"there is no split other of {name}; expected train"):
        opened(tmp_path, "other", name)


# Kinds of images


def test_every_kind_of_image_becomes_rgb(tmp_path):
    grey = np.resize(np.arange(256, dtype=np.uint8), (16, 16))
    rgb = grey[:, :, None].repeat(3, 2)
    wide = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    kinds = {
        "grey.png": Image.fromarray(grey),
        "palette.png": Image.fromarray(grey).convert("P"),
        "rgba.png": Image.fromarray(rgb).convert("RGBA"),
        "la.png": Image.fromarray(grey).convert("LA"),
        "cmyk.tif": Image.fromarray(rgb).convert("CMYK"),
        "wide.png": wide,
        "wide.tif": wide,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        loaded = read_image(tmp_path / name)
        np.testing.assert_array_equal(loaded, rgb, err_msg=name)
        assert loaded.flags.writeable
    save(tmp_path / "float.tif", grey.astype(np.float32))
    with pytest.raises(UserError, match=r"float\.tif holds floating-point pixels"):
        read_image(tmp_path / "float.tif")


# VOC


def voc_set(folder: Path, stems: str = "abcd") -> None:
    for number, stem in enumerate(stems):
        save(folder / "JPEGImages" / f"{stem}.jpg", photo(number))
        mask = Image.fromarray(labels(0, 15, 255))
        mask.putpalette([i * 7 % 256 for i in range(768)])
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(folder / "SegmentationClass" / f"{stem}.png")
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, members in (("train", "ab"), ("val", "cd"), ("trainval", "abcd")):
        (lists / f"{split}.txt").write_text("\n".join(members) + "\n")


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_three_roots(tmp_path, above):
    voc_set(tmp_path / above)
    dataset = opened(tmp_path, name="voc")
    check_dataset(dataset, 1)
    assert (dataset.split, len(dataset)) == ("train", 2)
    assert dataset.load(0)[1][0, :3].tolist() == [0, 15, IGNORE]
    assert [len(opened(tmp_path, split, "voc")) for split in ("val", "trainval")] == [2, 4]
    with pytest.raises(UserError, match=r"no split other: .*; the folder has train, trainval, val"):
        opened(tmp_path, "other", "voc")


def test_voc_years_are_kept_apart(tmp_path):
    voc_set(tmp_path / "VOC2007", "abcdef")
    voc_set(tmp_path / "VOC2012")
    image = opened(tmp_path, name="voc", year="2007").pairs[0].image
    assert image == tmp_path / "VOC2007/JPEGImages/a.jpg"
    (tmp_path / "VOC2007").rename(tmp_path / "VOC2009")
    assert opened(tmp_path, name="voc", year="2009").pairs[0].image == tmp_path / "VOC2009/JPEGImages/a.jpg"
    with pytest.raises(UserError, match="holds no PASCAL VOC 2012"):
        opened(tmp_path / "VOC2009", name="voc")


def test_voc_augmented_masks(tmp_path):
    voc_set(tmp_path)
    for stem in "abcef":
        save(tmp_path / f"JPEGImages/{stem}.jpg", photo())
        save(tmp_path / f"SegmentationClassAug/{stem}.png", labels(3))
    dataset = opened(tmp_path, name="voc")
    assert dataset.split == "train_aug"
    assert [dataset.stem(i) for i in range(len(dataset))] == ["a", "b", "e", "f"]  # c is in val
    assert set(dataset.load(0)[1].ravel()) == {3}
    assert set(opened(tmp_path, "train", "voc", train_split="train").load(0)[1].ravel()) == {0, 15, IGNORE}
    assert set(opened(tmp_path, "val", "voc").load(0)[1].ravel()) == {0, 15, IGNORE}

    lines = "".join(f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png\n" for stem in "fa")
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text(lines)
    dataset = opened(tmp_path, name="voc")
    assert [dataset.stem(i) for i in range(len(dataset))] == ["f", "a"]
    check_dataset(dataset, 1)


def test_voc_train_aug_without_its_masks(tmp_path):
    voc_set(tmp_path)
    with pytest.raises(UserError, match="train_aug needs the folder .*SegmentationClassAug"):
        opened(tmp_path, name="voc", train_split="train_aug")


def test_voc_mask_with_id_200(tmp_path):
    voc_set(tmp_path)
    save(tmp_path / "SegmentationClass/a.png", labels(0, 200))
    assert "a.png holds 200; expected 0 ... 20, or 255 for void" in messages(opened(tmp_path, name="voc"))
    with pytest.raises(UserError, match="a.png holds 200"):
        opened(tmp_path, name="voc").load(0)


# Cityscapes and CamVid


def city_set(root: Path, kind: str, values: tuple[int, ...]) -> None:
    for split, city in (("train", "aachen"), ("train", "bonn"), ("val", "ulm"), ("test", "berlin")):
        stem = f"{city}/{city}_000000_000019"
        save(root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", photo())
        if split != "test":
            save(root / "gtFine" / split / f"{stem}_gtFine_{kind}.png", labels(*values))


@pytest.mark.parametrize(("kind", "values"), [("labelIds", (7, 33, 0, 255)), ("labelTrainIds", (0, 18, 255, 255))])
def test_cityscapes_reads_both_kinds_of_ids(tmp_path, kind, values):
    city_set(tmp_path, kind, values)
    sizes = {split: len(opened(tmp_path, split, "cityscapes")) for split in ("train", "val", "trainval", "test")}
    assert sizes == {"train": 2, "val": 1, "trainval": 3, "test": 1}
    dataset = opened(tmp_path, "train", "cityscapes")
    check_dataset(dataset, 1)
    assert dataset.stem(1) == "bonn/bonn_000000_000019"
    assert dataset.load(0)[1][0, :4].tolist() == [0, 18, IGNORE, IGNORE]
    assert opened(tmp_path, "test", "cityscapes").load(0)[1] is None


def test_cityscapes_prefers_label_ids(tmp_path):
    city_set(tmp_path, "labelTrainIds", (5,))
    city_set(tmp_path, "labelIds", (7,))
    assert set(opened(tmp_path, "val", "cityscapes").load(0)[1].ravel()) == {0}


def test_cityscapes_problems(tmp_path):
    city_set(tmp_path, "labelIds", (34,))
    dataset = opened(tmp_path, "train", "cityscapes")
    dataset.pairs[1].mask.unlink()
    assert "holds 34; expected ids 0 ... 33" in messages(dataset)
    found = messages(opened(tmp_path, "train", "cityscapes"))
    assert "bonn_000000_000019_gtFine_labelIds.png does not exist" in found


def test_camvid_layout(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "a.png", photo())
        save(tmp_path / f"{split}annot" / "a.png", labels(0, 10, 11, 255))
    dataset = opened(tmp_path, "trainval", "camvid")
    check_dataset(dataset, 1)
    assert len(dataset) == 2
    assert dataset.load(1)[1][0, :4].tolist() == [0, 10, IGNORE, IGNORE]
    with pytest.raises(UserError, match="test"):
        opened(tmp_path, "test", "camvid")


@pytest.mark.parametrize(
    ("name", "folder", "sizes"), [("camvid", "data/camvid", (367, 101)), ("voc", "data/voc53", (26, 27))]
)
def test_real_data(name, folder, sizes):
    data = os.environ.get("DEEPLAB_FAST_TEST_DATA")
    if data is None:
        pytest.skip("DEEPLAB_FAST_TEST_DATA is not set")
    for split, size in zip(("train", "val"), sizes, strict=True):
        dataset = opened(Path(data) / folder, split, name)
        assert len(dataset) == size
        check_dataset(dataset, 1)

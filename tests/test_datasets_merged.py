"""SBD beside VOC, ADE20K and COCO: trees as they are unpacked, written small."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from deeplab_fast.config import DataConfig
from deeplab_fast.data import coco
from deeplab_fast.data.datasets import check_dataset, open_dataset
from deeplab_fast.data.labels import ADE20K, IGNORE, VOC
from deeplab_fast.errors import UserError
from deeplab_fast.presets import PRESETS
from tests.test_datasets import labels, messages, opened, photo, save, voc_set

H, W = 12, 16


def sbd_set(folder: Path, stems: str, *, suffix: str = ".mat") -> Path:
    for stem in stems:
        save(folder / f"img/{stem}.jpg", photo())
        mask = labels(0, 7, 20)
        if suffix == ".mat":
            from scipy.io import savemat

            (folder / "cls").mkdir(exist_ok=True)
            # The files hold a struct of 1 x 1 with more fields than the one that is read.
            savemat(folder / f"cls/{stem}.mat", {"GTcls": {"Boundaries": np.zeros(3), "Segmentation": mask}})
        else:
            save(folder / f"cls/{stem}.png", mask)
    (folder / "train.txt").write_text("\n".join(stems[::2]))
    (folder / "val.txt").write_text("\n".join(stems[1::2]))
    return folder


def stems_of(dataset) -> list[str]:
    return [dataset.stem(i) for i in range(len(dataset))]


@pytest.mark.parametrize("suffix", [".mat", ".png"])
def test_sbd_adds_its_images_to_vocs_train_but_those_of_val(tmp_path, suffix):
    if suffix == ".mat":
        pytest.importorskip("scipy")
    voc_set(tmp_path / "voc")  # train a b, val c d
    sbd = str(sbd_set(tmp_path / "sbd/benchmark_RELEASE/dataset", "bcefg", suffix=suffix).parent.parent)
    train = opened(tmp_path / "voc", name="voc", sbd=sbd)
    check_dataset(train, 1)
    assert stems_of(train) == ["a", "b", "e", "f", "g"]
    assert set(train.load(1)[1].ravel()) == {0, 15, IGNORE}, "VOC's own mask where it has one"
    assert train.load(2)[1].dtype == np.uint8 and set(train.load(2)[1].ravel()) == {0, 7, 20}
    assert stems_of(opened(tmp_path / "voc", "trainval", "voc", sbd=sbd)) == [*"abcd", *"efg"]
    assert stems_of(opened(tmp_path / "voc", "val", "voc", sbd=sbd)) == ["c", "d"]


def test_what_is_wrong_with_sbd(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    voc_set(tmp_path / "voc")
    with pytest.raises(UserError, match="nowhere holds no SBD"):
        opened(tmp_path / "voc", name="voc", sbd=str(tmp_path / "nowhere"))
    sbd = sbd_set(tmp_path / "sbd", "efgh")
    (sbd / "cls/e.mat").write_bytes(b"MATLAB 5.0")
    savemat(sbd / "cls/f.mat", {"GTcls": {"Segmentation": labels(0, 21)}})
    (sbd / "cls/g.mat").unlink()
    text = messages(opened(tmp_path / "voc", name="voc", sbd=str(sbd)))
    assert "has 3 problems" in text and "e.mat cannot be read" in text and "g.mat does not exist" in text
    assert "f.mat is uint8 (12, 16); expected (H, W) of 0 ... 20" in text


def ade_set(folder: Path) -> Path:
    for part, stems in (("training", "ab"), ("validation", "c")):
        for stem in stems:
            save(folder / f"images/{part}/{stem}.jpg", photo())
            save(folder / f"annotations/{part}/{stem}.png", labels(0, 1, 150))
    return folder


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, above):
    ade_set(tmp_path / above)
    train = opened(tmp_path, name="ade20k")
    check_dataset(train, 1)
    assert len(train.classes) == 150 and (ADE20K.names[0], ADE20K.names[149]) == ("wall", "flag")
    assert len(set(ADE20K.names)) == len(set(ADE20K.palette)) == 150
    assert train.load(0)[1][0, :3].tolist() == [IGNORE, 0, 149]
    assert [stems_of(opened(tmp_path, split, "ade20k")) for split in ("val", "trainval")] == [["c"], ["a", "b", "c"]]
    save(tmp_path / above / "annotations/validation/c.png", labels(151))
    assert "holds 151; expected 0 for none, or 1 ... 150" in messages(opened(tmp_path, "val", "ade20k"))
    with pytest.raises(UserError, match="no split test of ade20k"):
        opened(tmp_path, "test", "ade20k")


def box(x: int, y: int, width: int, height: int) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def coco_set(folder: Path) -> Path:
    """40 x 60 pixels; 1: a bus behind a person, and a crowd of people; 2: a small dog; 3: a kite; 4: a sofa in runs."""
    categories = [(1, "person"), (6, "bus"), (18, "dog"), (38, "kite"), (63, "couch")]
    bitmap = np.zeros((40, 60), np.uint8)
    bitmap[:, :30] = 1
    objects = [
        (1, 1, box(20, 10, 10, 20), 200, 0),
        (1, 6, box(10, 5, 40, 30), 1200, 0),
        (1, 1, {"size": [40, 60], "counts": [0, 40, 2360]}, 40, 1),  # the first column
        (2, 18, box(0, 0, 10, 10), 100, 0),
        (3, 38, box(0, 0, 50, 40), 2000, 0),
        (4, 63, {"size": [40, 60], "counts": [0, 1200, 1200]}, 1200, 0),
    ]
    content = {
        "categories": [{"id": key, "name": name} for key, name in categories],
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": 40, "width": 60} for i in (1, 2, 3, 4)],
        "annotations": [
            {"image_id": image, "category_id": category, "area": area, "iscrowd": crowd}
            | {"segmentation": [outline] if isinstance(outline, list) else outline}
            for image, category, outline, area, crowd in objects
        ],
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(content))
    for i in (1, 2, 3, 4):
        save(folder / f"train2017/{i:012}.jpg", photo(i, (40, 60)))
    return folder


def test_coco_with_the_classes_of_voc(tmp_path):
    pytest.importorskip("pycocotools")
    dataset = opened(coco_set(tmp_path), name="coco")
    assert [dataset.image_size(i) for i in range(len(dataset))] == [
        dataset.load(i)[0].shape[:2] for i in range(len(dataset))
    ]
    check_dataset(dataset, 1)
    assert dataset.classes is VOC
    # Too little of the dog is seen, and kites are none of VOC's classes.
    assert stems_of(dataset) == ["000000000001", "000000000004"]
    image, mask = pickle.loads(pickle.dumps(dataset)).load(0)
    assert image.shape == (40, 60, 3) and mask.shape == (40, 60) and mask.dtype == np.uint8
    bus, person = VOC.names.index("bus"), VOC.names.index("person")
    assert (mask[:, 0] == IGNORE).all() and mask[1, 5] == 0
    assert mask[20, 25] == person and mask[6, 45] == bus and mask[39, 55] == 0
    assert (dataset.load(1)[1][:, :30] == VOC.names.index("sofa")).all()


def test_what_is_wrong_with_coco(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    with pytest.raises(UserError, match="instances_train2017.json does not exist"):
        opened(tmp_path, name="coco")
    coco_set(tmp_path)
    save(tmp_path / "train2017/000000000001.jpg", photo(0, (40, 50)))
    (tmp_path / "train2017/000000000004.jpg").unlink()
    text = messages(opened(tmp_path, name="coco"))
    assert "000000000001.jpg is 50 x 40, but 60 x 40 in its JSON" in text and "000000000004.jpg does not exist" in text
    with pytest.raises(UserError, match="no split test of coco"):
        opened(tmp_path, "test", "coco")
    (tmp_path / "annotations/instances_train2017.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="is not COCO's instances: KeyError: 'categories'"):
        opened(tmp_path, name="coco")
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        opened(tmp_path, name="coco")


def test_each_data_set_has_a_preset():
    for name in ("ade20k", "coco"):
        assert PRESETS[name]().data.name == name
    assert coco.LEAST_AREA == 1000
    with pytest.raises(UserError, match="give its folder with --root"):
        open_dataset(DataConfig(name="ade20k"), "train")

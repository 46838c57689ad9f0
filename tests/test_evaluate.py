"""evaluate on CamVid-like files whose pixels carry their class's colour, with a model that reads it back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deeplab_fast import checkpoint, cli, evaluate
from deeplab_fast.config import Config, DataConfig, ModelConfig
from deeplab_fast.data.augment import MEAN, STD
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.labels import CAMVID, VOC, Classes
from deeplab_fast.data.protocol import CentreCrop, Padded
from deeplab_fast.data.scenes import SCENES
from deeplab_fast.errors import UserError
from deeplab_fast.evaluate import check_classes, choose_data, main

JSON_KEYS = {
    *("pixel_accuracy", "mean_accuracy", "miou", "fw_iou", "class_iou", "confusion"),
    *("checkpoint", "data", "split", "images", "protocol", "scales", "flip", "output_stride", "classes"),
}


class Oracle(nn.Module):
    """Scores a class by how near the pixel is to the class's colour."""

    align_corners = False

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()
        self.register_buffer("palette", torch.tensor(classes.palette, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.predict_logits(x)

    def predict_logits(self, x: Tensor) -> Tensor:
        self.seen.add(tuple(x.shape[-2:]))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        rgb = 255 * (x.float() * std + mean)
        return -(rgb[:, None] - self.palette[None, :, :, None, None]).square().sum(2)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Two images of odd sizes: sky above road, part of which looks like a car; a row between is void."""
    root = tmp_path / "camvid"
    for number, (height, width) in enumerate([(21, 33), (35, 18)]):
        truth = np.zeros((height, width), np.uint8)
        truth[10:] = 3
        looks = truth.copy()
        looks[12:15, :4] = 8
        truth[9] = 11
        for split in ("train", "val"):
            for folder, picture in (
                (split, np.array(CAMVID.palette, np.uint8)[looks]),
                (split + "annot", truth),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / folder / f"street{number}.png")
    return root


@pytest.fixture
def oracle(camvid: Path, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    model = Oracle(CAMVID)
    config = Config(data=DataConfig(name="camvid", root=str(camvid), workers=0))
    monkeypatch.setattr(checkpoint, "load_model", lambda path, device, **_: (model, config, CAMVID))
    return model


def run(*arguments: object, checkpoint: object = "best.pt") -> int:
    return main([str(checkpoint), "--device", "cpu", "--precision", "fp32", *map(str, arguments)])


def test_scores_masks_and_json(oracle, camvid, tmp_path, capsys):
    assert run("--json", tmp_path / "new" / "scores.json", "--output", tmp_path / "masks") == 0
    saved = json.loads((tmp_path / "new" / "scores.json").read_text())
    road, sky, car = 11 * 33 + 25 * 18, 9 * 33 + 9 * 18, 2 * 12
    assert saved.keys() == JSON_KEYS
    assert saved["class_iou"] == [
        1.0,
        None,
        None,
        (road - car) / road,
        None,
        None,
        None,
        None,
        0.0,
        None,
        None,
    ]
    assert saved["miou"] == pytest.approx((1 + (road - car) / road) / 3)
    assert saved["pixel_accuracy"] == pytest.approx((sky + road - car) / (sky + road))
    assert saved["mean_accuracy"] == pytest.approx((1 + (road - car) / road) / 2)
    assert saved["confusion"][3][8] == car and saved["confusion"][0][0] == sky
    assert (saved["data"], saved["split"], saved["images"]) == ("camvid", "val", 2)
    assert saved["classes"] == list(CAMVID.names) and saved["checkpoint"] == "best.pt"

    with Image.open(tmp_path / "masks" / "street1.png") as mask:
        assert mask.mode == "P" and mask.size == (18, 35)
        assert (np.array(mask)[12:15, :4] == 8).all()
    printed = capsys.readouterr().out
    assert "mean IoU" in printed and "2 images, " in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["tree"] == ["absent", "absent", "0"] and rows["car"] == ["0.0000", "absent", "0"]


def test_windows_change_nothing_for_a_pixelwise_model(oracle, tmp_path):
    results = []
    for name, window, sizes in (
        ("whole", [], {(21, 33), (35, 18)}),
        ("tiled", ["--window", "8", "10"], {(8, 10)}),
    ):
        oracle.seen.clear()
        run("--json", tmp_path / name, *window)
        assert oracle.seen == sizes
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]


@pytest.mark.parametrize("folder", ["", "val", "trainannot", "new", "val/../trainannot"])
def test_masks_never_go_into_the_data_set(oracle, camvid, folder):
    """Whichever split is scored: the masks of another one have the same names."""
    before = {p: p.read_bytes() for p in camvid.rglob("*.png")}
    with pytest.raises(UserError, match=r"--output .* lies in the data set .*camvid; choose another folder"):
        run("--output", camvid / folder)
    (camvid.parent / "link").symlink_to(camvid)
    with pytest.raises(UserError, match="lies in the data set"):
        run("--output", camvid.parent / "link" / folder)
    assert {p: p.read_bytes() for p in camvid.rglob("*.png")} == before and not oracle.seen


def test_masks_never_replace_what_the_data_set_links_to(oracle, camvid, tmp_path):
    for folder in ("val", "valannot"):
        (camvid / folder).rename(tmp_path / f"real_{folder}")
        (camvid / folder).symlink_to(tmp_path / f"real_{folder}")
    for folder in ("real_val", "real_valannot"):
        with pytest.raises(UserError, match=r"street0\.png is a file of the data set"):
            run("--output", tmp_path / folder)
    assert not oracle.seen


def test_masks_replace_no_file_but_their_own(oracle, tmp_path):
    (tmp_path / "masks").mkdir()
    Image.new("P", (4, 4)).save(tmp_path / "masks" / "street1.png")
    with pytest.raises(UserError, match=r"street1\.png was not written by deeplab_fast and is not replaced"):
        run("--output", tmp_path / "masks")
    assert [p.name for p in (tmp_path / "masks").iterdir()] == ["street1.png"] and not oracle.seen


def test_the_same_command_twice(oracle, tmp_path):
    for _ in range(2):
        assert run("--json", tmp_path / "scores.json", "--output", tmp_path / "masks") == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best.pt", b"PK\x03\x04\xff\xfe"),
        ("dataset.json", b'{"names": ["a", "b"]}'),
        ("list.json", b'["confusion", "checkpoint"]'),
        ("half.json", b'{"confusion": [[1]], "checkpoint"'),
        ("empty.json", b""),
    ],
)
def test_scores_replace_no_file_but_their_own(oracle, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"--json .*{name} exists and does not hold scores"):
        run("--json", tmp_path / name)
    assert (tmp_path / name).read_bytes() == content and not oracle.seen


def test_scores_need_the_name_of_a_file(oracle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", "/", tmp_path):
        with pytest.raises(UserError, match=r"--json .*is a folder; expected the name of a file"):
            run("--json", name)
    with pytest.raises(UserError, match=r"--json a+\.json: File name too long"):
        run("--json", "a" * 300 + ".json")
    assert not oracle.seen


def test_a_label_that_is_no_class_is_named(oracle, camvid):
    Image.fromarray(np.full((21, 33), 200, np.uint8)).save(camvid / "valannot" / "street0.png")
    with pytest.raises(UserError, match=r"street0\.png holds 200"):
        run()


def test_a_mistake_is_one_sentence_and_status_2(oracle, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_command(lambda: run("--root", "nowhere"))
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "nowhere" in text and text.count("\n") == 1


def test_the_data_set_of_the_checkpoint_is_the_default():
    saved = DataConfig(name="camvid", root="a", val_split="test", workers=3)
    assert choose_data(saved, None, None) == saved
    assert choose_data(saved, "camvid", "b") == DataConfig(name="camvid", root="b", val_split="test", workers=3)
    assert choose_data(saved, "voc", "b") == DataConfig(name="voc", root="b", workers=3)
    assert choose_data(saved, "scenes", None) == DataConfig(name="scenes", workers=3)


def test_the_year_of_voc_can_be_another_one(monkeypatch):
    saved = DataConfig(name="voc", root="a", year="2007", train_split="trainval")
    assert choose_data(saved, None, None, None) == saved
    assert choose_data(saved, None, None, "2012") == DataConfig(
        name="voc", root="a", year="2012", train_split="trainval"
    )
    opened = []
    monkeypatch.setattr(checkpoint, "load_model", lambda path, device, **_: (None, Config(data=saved), VOC))
    monkeypatch.setattr(evaluate, "open_dataset", lambda data, split: opened.append(data.year) or exit("opened"))
    for flags in (["--year", "2012"], []):
        with pytest.raises(SystemExit, match="opened"):
            run(*flags)
    assert opened == ["2012", "2007"]


def test_other_classes_are_refused():
    with pytest.raises(UserError, match=r"a\.pt has 21 classes, but the data set camvid has 11"):
        check_classes(VOC, CAMVID, Path("a.pt"), "camvid")
    renamed = Classes((*CAMVID.names[:8], "lorry", *CAMVID.names[9:]), CAMVID.palette)
    with pytest.raises(UserError, match="class 8 is 'car' in a.pt, but 'lorry' in the data set mine"):
        check_classes(CAMVID, renamed, Path("a.pt"), "mine")


def test_a_scenes_checkpoint_evaluates_without_a_flag(tmp_path):
    model = ModelConfig(width_mult=0.25, aspp_channels=8, low_level_channels=4, decoder_channels=8)
    config = Config(data=DataConfig(scene_size=(48, 64), scene_val_count=2, workers=0), model=model)
    torch.manual_seed(0)
    content = {
        "step": 1,
        "model": checkpoint.build(config, SCENES).state_dict(),
        "config": config.to_dict(),
        "classes": checkpoint.classes_to_dict(SCENES),
        "metrics": {},
    }
    checkpoint.save(tmp_path / "best.pt", content)
    assert run("--json", tmp_path / "scores.json", checkpoint=tmp_path / "best.pt") == 0
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert sum(map(sum, saved["confusion"])) == 2 * 48 * 64
    assert saved["data"] == "scenes" and len(saved["class_iou"]) == len(SCENES)


def test_the_output_stride_may_be_another_than_in_training(tmp_path, capsys):
    model = ModelConfig(backbone="resnet18", aspp_channels=8, low_level_channels=4, decoder_channels=8)
    config = Config(data=DataConfig(scene_size=(48, 64), scene_val_count=1, workers=0), model=model)
    state = checkpoint.build(config, SCENES).state_dict()
    content = {"model": state, "config": config.to_dict(), "classes": checkpoint.classes_to_dict(SCENES)}
    checkpoint.save(tmp_path / "best.pt", content)
    for flags, stride, told in (([], 16, " val; "), (["--output-stride", "8"], 8, " val, output stride 8; ")):
        assert run("--json", tmp_path / "scores.json", *flags, checkpoint=tmp_path / "best.pt") == 0
        assert json.loads((tmp_path / "scores.json").read_text())["output_stride"] == stride
        assert told in capsys.readouterr().out


def test_padding_goes_to_sides_of_16_k_plus_1(camvid, monkeypatch):
    dataset = open_dataset(DataConfig(name="camvid", root=str(camvid)), "val")
    for least, sizes in ((513, [(513, 513)] * 2), (1, [(33, 33), (49, 33)]), (40, [(40, 40), (49, 40)])):
        padded = Padded(dataset, (1, 2, 3), least)
        for index, size in enumerate(sizes):
            (image, mask), (whole, truth) = padded.load(index), dataset.load(index)
            assert image.shape == (*size, 3) and mask.shape == size and image.dtype == mask.dtype == np.uint8
            height, width = truth.shape
            assert (image[:height, :width] == whole).all() and (mask[:height, :width] == truth).all()
            assert (mask[height:] == 255).all() and (mask[:, width:] == 255).all()
            assert (image[height:] == (1, 2, 3)).all() and (image[:, width:] == (1, 2, 3)).all()
            with monkeypatch.context() as patched:  # the size is in the file's head
                patched.setattr(dataset, "load", None)
                assert (padded.cut(index, mask) == truth).all()


@pytest.mark.parametrize(("pixels", "colour"), [("imagenet", (124, 116, 104)), ("symmetric", (128, 128, 128))])
def test_the_padded_protocol_scores_every_pixel_of_the_image(oracle, tmp_path, monkeypatch, pixels, colour):
    """The oracle sees nothing but the pixel itself, so padding must not change a score or a mask."""
    assert run("--json", tmp_path / "paper.json", "--output", tmp_path / "paper") == 0
    made = []

    class Spied(Padded):
        def __init__(self, dataset, grey) -> None:
            made.append(grey)
            super().__init__(dataset, grey)

    monkeypatch.setattr(evaluate, "Padded", Spied)
    oracle.seen.clear()
    _, config, classes = checkpoint.load_model(None, None)
    config = dataclasses.replace(config, model=ModelConfig(pixels=pixels))
    monkeypatch.setattr(checkpoint, "load_model", lambda path, device, **_: (oracle, config, classes))
    assert run("--protocol", "pad513", "--json", tmp_path / "padded.json", "--output", tmp_path / "padded") == 0
    assert oracle.seen == {(513, 513)} and made == [colour]
    paper, padded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("paper", "padded"))
    assert padded["confusion"] == paper["confusion"] and padded["protocol"] == "pad513"
    for name in ("street0.png", "street1.png"):
        assert (tmp_path / "padded" / name).read_bytes() == (tmp_path / "paper" / name).read_bytes()


def test_scales_and_flip_reach_the_model(oracle, tmp_path, capsys):
    assert run("--json", tmp_path / "scores.json", "--scales", "0.5", "1", "--flip") == 0
    assert oracle.seen == {(21, 33), (10, 16), (35, 18), (18, 9)}
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["scales"] == [0.5, 1] and saved["flip"] and saved["protocol"] == "paper"
    assert saved["images"] == 2 and sum(map(sum, saved["confusion"])) == 20 * 33 + 34 * 18
    assert "camvid val, 0.5 x, 1 x, mirrored;" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"the scales are \(1.0, -1.0\): expected numbers above 0"):
        run("--scales", "1", "-1")


def test_the_centre_crop_resamples_image_and_truth_alike(camvid):
    """Colours stand for classes, so the two must agree wherever no edge is near; ignored rows stay ignored."""
    dataset = open_dataset(DataConfig(name="camvid", root=str(camvid)), "val")
    for index, (height, width) in enumerate([(21, 33), (35, 18)]):
        for size in (9, 18, 42):
            image, mask = CentreCrop(dataset, size).load(index)
            assert image.shape == (size, size, 3) and mask.shape == (size, size)
            whole = dataset.load(index)[1]
            tall, wide = (length * size // min(height, width) for length in (height, width))
            # Each kept pixel's centre, in the whole image.
            rows = (np.arange(size) + round((tall - size) / 2) + 0.5) * height / tall
            columns = (np.arange(size) + round((wide - size) / 2) + 0.5) * width / wide
            expected = whole[rows.astype(int)[:, None], columns.astype(int)]
            assert (mask != expected).mean() < 0.03
            road = np.abs(image.astype(int) - CAMVID.palette[3]).max(2) == 0
            assert road.mean() > 0.2 and (mask[road] == 3).mean() > 0.9
    assert CentreCrop(dataset).stem(1) == "street1" and len(CentreCrop(dataset)) == 2


def test_the_crop_protocol_scores_513_by_513_of_each_image(oracle, tmp_path, capsys):
    assert run("--protocol", "crop513", "--json", tmp_path / "scores.json", "--output", tmp_path / "masks") == 0
    assert oracle.seen == {(513, 513)}
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["protocol"] == "crop513" and saved["images"] == 2
    ignored = 513 / 21 + 513 / 18  # one row of each
    assert sum(map(sum, saved["confusion"])) == pytest.approx(513 * (2 * 513 - ignored), rel=0.01)
    with Image.open(tmp_path / "masks" / "street0.png") as mask:
        assert mask.size == (513, 513)
    assert "camvid val, protocol crop513;" in capsys.readouterr().out

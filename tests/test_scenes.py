"""The built-in data set: repeatable, varied, and not to be solved by colour or position alone."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from deeplab_fast.data.scene_paint import Canvas
from deeplab_fast.data.scene_street import BUILDING, CAR, ROAD, SKY
from deeplab_fast.data.scenes import SCENES, Scenes, paint
from deeplab_fast.errors import UserError

K = len(SCENES)


@pytest.fixture(scope="module")
def fitting() -> list[tuple[np.ndarray, np.ndarray]]:
    scenes = Scenes("train", 150)
    return [scenes.load(i) for i in range(len(scenes))]


@pytest.fixture(scope="module")
def held_out() -> list[tuple[np.ndarray, np.ndarray]]:
    scenes = Scenes("val", 60)
    return [scenes.load(i) for i in range(len(scenes))]


def vote(keys: list[np.ndarray], masks: list[np.ndarray], count: int) -> np.ndarray:
    """The most frequent class for each key; the best classifier that sees the key alone."""
    pair = np.concatenate([k.ravel() * K + m.ravel() for k, m in zip(keys, masks, strict=True)])
    return np.bincount(pair, minlength=count * K).reshape(count, K).argmax(1)


def miou(predictions: list[np.ndarray], masks: list[np.ndarray]) -> float:
    pair = np.concatenate([m.ravel() * K + p.ravel() for p, m in zip(predictions, masks, strict=True)])
    counts = np.bincount(pair, minlength=K * K).reshape(K, K)
    hit = np.diag(counts)
    return float((hit / (counts.sum(0) + counts.sum(1) - hit)).mean())


def colour_key(image: np.ndarray) -> np.ndarray:
    r, g, b = (image >> 4).astype(np.int64).transpose(2, 0, 1)
    return (r * 16 + g) * 16 + b


def test_same_scene_every_time_and_in_any_order():
    first, second = Scenes("train", 5), Scenes("train", 5)
    expected = [first.load(i) for i in range(5)]
    for i in (4, 0, 2):
        image, mask = second.load(i)
        assert np.array_equal(image, expected[i][0])
        assert np.array_equal(mask, expected[i][1])


def test_scene_does_not_depend_on_the_count_or_on_pickling():
    image, mask = Scenes("train", 5).load(3)
    other_image, other_mask = pickle.loads(pickle.dumps(Scenes("train", 2000))).load(3)
    assert np.array_equal(image, other_image)
    assert np.array_equal(mask, other_mask)


def test_seed_split_and_index_each_give_another_scene():
    keys = itertools.product(("train", "val"), (0, 1), (0, 1))
    images = {Scenes(split, 2, seed=seed).load(i)[0].tobytes() for split, seed, i in keys}
    assert len(images) == 8


def test_splits_share_no_scene(fitting, held_out):
    train = {mask.tobytes() for _, mask in fitting}
    val = {mask.tobytes() for _, mask in held_out}
    assert len(train) == len(fitting)
    assert not train & val


@pytest.mark.parametrize("size", [(128, 256), (32, 32), (33, 71), (200, 97)])
def test_any_size(size):
    for key in range(6):
        image, mask = paint(key, size)
        assert image.shape == (*size, 3)
        assert mask.shape == size
        assert image.dtype == mask.dtype == np.uint8
        assert mask.max() < K


def test_larger_picture_shows_the_same_scene():
    _, small = paint(11, (128, 256))
    _, large = paint(11, (256, 512))
    assert (large[::2, ::2] == small).mean() > 0.93


def test_every_class_occurs_with_very_different_frequency(fitting):
    share = np.bincount(np.concatenate([mask.ravel() for _, mask in fitting]), minlength=K)
    share = share / share.sum()
    assert share.min() > 0.003
    assert share.max() / share.min() > 30


def test_every_class_is_in_many_scenes(fitting):
    scenes_with = sum(np.bincount(mask.ravel(), minlength=K) > 0 for _, mask in fitting)
    assert scenes_with.min() > 0.4 * len(fitting)


def test_sky_is_above_road(held_out):
    rows = np.arange(128)[:, None]
    for _, mask in held_out:
        if (mask == SKY).any() and (mask == ROAD).any():
            assert (rows * (mask == SKY)).max() < 128 * 0.62
            assert np.where(mask == ROAD, rows, 128).min() > 128 * 0.25


def test_colour_alone_does_not_solve_it(fitting, held_out):
    table = vote([colour_key(image) for image, _ in fitting], [mask for _, mask in fitting], 16**3)
    masks = [mask for _, mask in held_out]
    assert miou([table[colour_key(image)] for image, _ in held_out], masks) < 0.40


def test_position_alone_does_not_solve_it(fitting, held_out):
    place = np.arange(128 * 256).reshape(128, 256)
    table = vote([place] * len(fitting), [mask for _, mask in fitting], place.size)
    masks = [mask for _, mask in held_out]
    assert miou([table[place]] * len(masks), masks) < 0.45


def flat(label_part: int):
    return lambda a, y, ppm: (np.full(y.shape, label_part, np.uint8), np.array([[0.0] * 3, [0.5] * 3]), 1)


def canvas() -> Canvas:
    return Canvas((64, 64), focal=64.0, centre=(32.0, 32.0), eye=1.5)


def test_panel_stands_where_the_pinhole_camera_puts_it():
    view = canvas()
    view.panel((-1.0, 8.0), (1.0, 8.0), 0.5, 2.5, flat(1), CAR)  # 8 pixels a metre
    rows, cols = np.nonzero(view.mask == CAR)
    assert (rows.min(), rows.max() + 1) == (24, 40)
    assert (cols.min(), cols.max() + 1) == (24, 40)
    assert np.all(view.depth[24:40, 24:40] == 8)


@pytest.mark.parametrize("near_first", [True, False])
def test_nearer_panel_hides_the_farther(near_first):
    view = canvas()
    panels = [((-1.0, 6.0), (1.0, 6.0), CAR), ((-8.0, 12.0), (8.0, 12.0), BUILDING)]
    for p0, p1, label in panels if near_first else panels[::-1]:
        view.panel(p0, p1, 0.0, 2.0, flat(1), label)
    assert view.mask[33, 32] == CAR
    assert view.mask[33, 4] == BUILDING


def test_part_zero_leaves_image_and_mask_alone():
    view = canvas()
    view.panel((-1.0, 8.0), (1.0, 8.0), 0.0, 2.0, flat(0), CAR)
    assert not view.mask.any() and not view.image.any() and np.isinf(view.depth).all()


def test_panel_behind_and_through_the_camera():
    view = canvas()
    view.panel((-1.0, -8.0), (1.0, -8.0), 0.0, 2.0, flat(1), CAR)
    assert not view.mask.any()
    view.panel((2.0, -5.0), (2.0, 20.0), 0.0, 3.0, flat(1), BUILDING)
    assert (view.mask[:, 50:] == BUILDING).any() and not view.mask[:, :38].any()


def test_shadow_darkens_bare_sunlit_ground_once():
    view = canvas()
    view.ground[32:] = view.sunlit[32:] = True
    view.ground[40:44, :32] = False
    view.image[:] = 0.8
    view.ambient, view.sun = np.full(3, 0.5, np.float32), np.full(3, 0.5, np.float32)
    view.to_sun = (0.0, 0.6, -0.8)  # the sun is behind the camera
    mask = view.mask.copy()
    view.shadow((-20.0, 5.0), (20.0, 5.0), 3.0)
    dark = view.image[..., 0] < 0.79
    assert dark[48, 48] and not dark[40:44, :32].any() and not dark[:32].any()
    once = view.image.copy()
    view.shadow((-20.0, 5.0), (20.0, 5.0), 3.0)
    assert np.array_equal(view.image, once)
    assert np.array_equal(view.mask, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trainval", "count": 3}, "no split trainval of scenes; expected one of train, val, test"),
        ({"split": "train", "count": 0}, "0 scenes were asked for"),
        ({"split": "train", "count": 3, "size": (16, 256)}, "size 16x256 is too small; expected 32"),
        ({"split": "train", "count": 3, "seed": -1}, "seed of the scenes is -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Scenes(**arguments)


def test_names_and_length():
    scenes = Scenes("val", 7)
    assert len(scenes) == 7
    assert scenes.stem(3) == "val_000003"
    assert (scenes.name, scenes.split, scenes.classes) == ("scenes", "val", SCENES)
    with pytest.raises(IndexError, match="scene 7 of 7"):
        scenes.load(7)

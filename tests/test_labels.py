"""Classes, palettes and look-up tables against what the data sets publish."""

from __future__ import annotations

import pytest

from deeplab_fast.data.labels import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_ID_TO_TRAIN_ID,
    IGNORE,
    UNKNOWN,
    VOC,
    Classes,
    value_table,
    voc_palette,
)


@pytest.mark.parametrize(("classes", "count"), [(VOC, 21), (CITYSCAPES, 19), (CAMVID, 11)])
def test_classes_are_distinct(classes, count):
    assert len(classes) == count == len(set(classes.names)) == len(set(classes.palette))


def test_voc_palette_is_the_devkits():
    colour = dict(zip(VOC.names, VOC.palette, strict=True))
    assert colour["background"] == (0, 0, 0)
    assert colour["aeroplane"] == (128, 0, 0)
    assert colour["cat"] == (64, 0, 0)
    assert colour["person"] == (192, 128, 128)
    assert colour["tvmonitor"] == (0, 64, 128)
    assert voc_palette(256)[255] == (224, 224, 192)


def test_cityscapes_ids():
    table = CITYSCAPES_ID_TO_TRAIN_ID
    assert [int(table[i]) for i in (7, 8, 11, 23, 26, 31, 33)] == [0, 1, 2, 10, 13, 16, 18]
    assert sorted(set(table.tolist())) == [*range(19), IGNORE]
    assert [int(table[i]) for i in (0, 6, 9, 18, 29, 30, 255)] == [IGNORE] * 7
    assert CITYSCAPES.names[10] == "sky"
    assert CITYSCAPES.palette[10] == (70, 130, 180)


def test_value_table_marks_what_has_no_label():
    table = value_table({0: 3, 65535: IGNORE})
    assert (table[0], table[1], table[65535]) == (3, UNKNOWN, IGNORE)


def test_classes_reject_a_palette_of_another_length():
    with pytest.raises(ValueError, match="2 class names but 1 colours"):
        Classes(("a", "b"), ((0, 0, 0),))
    with pytest.raises(ValueError, match="255 classes; expected 1 to 254"):
        Classes(("a",) * 255, ((0, 0, 0),) * 255)

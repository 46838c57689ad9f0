"""Classes, their colours, and the tables that turn a data set's mask values into 0 ... K-1 and IGNORE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

IGNORE = 255
"""The one label value that no loss and no metric counts."""

UNKNOWN = 254
"""In a table made by `value_table`: a mask value that the data set does not define. No mask ever holds it."""

MAX_CLASSES = 254


@dataclass(frozen=True)
class Classes:
    """What the labels 0 ... K-1 mean; `len(classes)` is K."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB, one for each name

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(f"{len(self.names)} class names but {len(self.palette)} colours")
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise ValueError(f"{len(self.names)} classes; expected 1 to {MAX_CLASSES}")

    def __len__(self) -> int:
        return len(self.names)


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The VOC devkit's colours: bits 0, 1, 2 of the id are the top bits of R, G, B, bits 3, 4, 5 the next."""
    colours = []
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append(tuple(channels))
    return tuple(colours)


def value_table(labels: Mapping[int, int]) -> np.ndarray:
    """uint8 (65536,): a mask's value, of 8 or 16 bits, to its label; UNKNOWN where `labels` has none."""
    table = np.full(65536, UNKNOWN, np.uint8)
    for value, label in labels.items():
        table[value] = label
    return table


_VOC_NAMES = """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
VOC = Classes(tuple(_VOC_NAMES.split()), voc_palette(21))

# The 19 evaluated classes in the order of their train ids, with their ids in *_labelIds.png and their colours
# (cityscapesscripts, helpers/labels.py).
_CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)

CITYSCAPES = Classes(tuple(name for name, _, _ in _CITYSCAPES), tuple(colour for _, _, colour in _CITYSCAPES))

CITYSCAPES_ID_TO_TRAIN_ID = np.full(256, IGNORE, np.uint8)
"""uint8 (256,): a value of *_labelIds.png to its train id, IGNORE for ids that are not evaluated."""
for _train_id, (_, _id, _) in enumerate(_CITYSCAPES):
    CITYSCAPES_ID_TO_TRAIN_ID[_id] = _train_id
CITYSCAPES_ID_TO_TRAIN_ID.flags.writeable = False
CITYSCAPES_TRAIN_ID_TO_ID = np.array([_id for _, _id, _ in _CITYSCAPES], np.uint8)
"""uint8 (19,): the way back, for what the benchmark's server reads."""

_CAMVID = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("cyclist", (0, 128, 192)),
)

CAMVID = Classes(tuple(name for name, _ in _CAMVID), tuple(colour for _, colour in _CAMVID))

# The classes 1 ... 150 of the scene parsing challenge, by the first of the names in objectInfo150.txt.
_ADE20K_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
    mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base,
    box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator,
    grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
    bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen
    island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
    chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
    bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle,
    oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
"""
ADE20K = Classes(tuple(" ".join(name.split()) for name in _ADE20K_NAMES.split(",")), voc_palette(151)[1:])

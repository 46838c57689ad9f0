"""The sizes at which benchmarks run: those of real data sets, and tiny ones that only show that it works.

DEEPLAB_FAST_BENCH_TINY=1 asks for the tiny ones; their times mean nothing.
"""

from __future__ import annotations

import os

TINY = os.environ.get("DEEPLAB_FAST_BENCH_TINY") == "1"

# (N, H, W), K
LABEL_MAPS = {
    "cityscapes": ((1, 1024, 2048), 19),  # one validation image
    "voc": ((16, 513, 513), 21),  # one batch at DeepLab's crop size
    "ade20k": ((4, 512, 683), 150),  # many classes: the table of counts leaves the first-level cache
}
if TINY:
    LABEL_MAPS = {"tiny": ((1, 33, 47), 5)}

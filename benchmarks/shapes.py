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
# backbone, (N, H, W)
TRAINING = {
    "mobilenet_v2 4x256x256": ("mobilenet_v2", (4, 256, 256)),
    "resnet50 4x256x256": ("resnet50", (4, 256, 256)),
}
INFERENCE = {
    "mobilenet_v2 512x1024": ("mobilenet_v2", (1, 512, 1024)),
    "resnet50 512x1024": ("resnet50", (1, 512, 1024)),
}
# (N, C, H, W), M, dilation
SEPARABLE = {
    "aspp": ((1, 2048, 32, 64), 256, 12),  # ResNet, 512 x 1024, output stride 16
    "aspp_voc": ((1, 2048, 33, 33), 256, 12),  # the same, 513 x 513
    "aspp_os8": ((1, 2048, 64, 128), 256, 12),  # the same, 512 x 1024, output stride 8
    "aspp_mobile": ((1, 320, 22, 22), 256, 12),  # MobileNetV2, 352 x 352, output stride 16
    "decoder": ((1, 304, 128, 256), 256, 1),  # 256 channels upsampled beside 48 of low level, output stride 4
    "decoder_second": ((1, 256, 128, 256), 256, 1),
}
# The decoder's (N, C, h, w) and its low-level (C', H, W), a quarter of the image
DECODERS = {
    "512x1024": ((1, 256, 32, 64), (48, 128, 256)),
    "513x513": ((1, 256, 33, 33), (48, 129, 129)),  # DeepLab's crop size: the ratio is not whole
}
DECODERS_TRAINED = {"batch 8 of 352x352": ((8, 256, 22, 22), (48, 88, 88))}
# (N, C, H, W), stride, dilation
_ASPP = (1, 2048, 32, 64)  # ResNet, 512 x 1024, output stride 16
DEPTHWISE = {
    "aspp d=1": (_ASPP, 1, 1),
    "aspp d=6": (_ASPP, 1, 6),
    "aspp d=12": (_ASPP, 1, 12),
    "aspp d=18": (_ASPP, 1, 18),
    "decoder": ((1, 304, 128, 256), 1, 1),
    "train mobilenet 96": ((8, 96, 176, 176), 2, 1),  # MobileNetV2, crops of 352 x 352
    "train mobilenet 384": ((8, 384, 22, 22), 1, 1),
    "train mobilenet 960": ((8, 960, 22, 22), 1, 2),
}
DEPTHWISE_RATES = {"aspp": (_ASPP, [6, 12, 18])}
# (N, C, H, W), stride, dilation: MobileNetV2 in training at 352 x 352, and ASPP
DEPTHWISE_BACKWARD = {
    "mobilenet_first": ((8, 32, 176, 176), 1, 1),
    "mobilenet_stride_2": ((8, 96, 176, 176), 2, 1),
    "mobilenet_384": ((8, 384, 22, 22), 1, 1),
    "mobilenet_960_dilated": ((8, 960, 22, 22), 1, 2),
    "aspp_2048": ((1, 2048, 33, 33), 1, 12),
}
# (N, C, H, W), stride, dilation: MobileNetV2 in training, 4 crops of 256 x 256 and 8 of 352 x 352
DEPTHWISE_NORMALISED = {
    "mobilenet 4x96": ((4, 96, 128, 128), 2, 1),
    "mobilenet 4x144": ((4, 144, 64, 64), 1, 1),
    "mobilenet 4x960": ((4, 960, 16, 16), 1, 2),
    "mobilenet 8x96": ((8, 96, 176, 176), 2, 1),
    "mobilenet 8x960": ((8, 960, 22, 22), 1, 2),
}
# (N, C, H, W), activation, residual, dtypes
BATCH_NORMS = {
    "head": ((8, 256, 64, 64), "relu", False, ("float32", "bfloat16")),
    "resnet_residual": ((8, 256, 64, 64), "relu", True, ("float32",)),
    "mobilenet_stem": ((8, 32, 176, 176), "relu6", False, ("bfloat16",)),
    "mobilenet_deep": ((8, 960, 22, 22), "relu6", False, ("bfloat16",)),
}
# Logits (N, K, h, w) and the label maps' (H, W): of images to predict, and of batches to train on
UPSAMPLED_LOGITS = {
    "cityscapes": ((1, 19, 128, 256), (512, 1024)),
    "voc": ((1, 21, 65, 65), (513, 513)),  # output stride 8: the ratio is not whole
    "ade20k": ((1, 150, 128, 128), (512, 512)),
    "camvid": ((1, 11, 90, 120), (360, 480)),
}
UPSAMPLED_LOGITS_TRAINED = {
    "cityscapes": ((2, 19, 128, 256), (512, 1024)),
    "camvid": ((8, 11, 88, 88), (352, 352)),
    "voc": ((4, 21, 65, 65), (513, 513)),
}
# Source (H, W), scaled (H, W), window; those of training crops
CROPS = {
    "cityscapes x0.5": ((1024, 2048), (512, 1024), (-128, 641, 100, 869)),
    "cityscapes x1.0": ((1024, 2048), (1025, 2050), (100, 869, 600, 1369)),
    "cityscapes x2.0": ((1024, 2048), (2048, 4096), (700, 1469, 1500, 2269)),
    "camvid x0.5": ((360, 480), (180, 240), (-90, 262, -60, 292)),
    "camvid x1.3": ((360, 480), (468, 624), (60, 412, 140, 492)),
    "camvid x2.0": ((360, 480), (720, 960), (200, 552, 300, 652)),
    "voc x1.2": ((375, 500), (450, 600), (-40, 473, 50, 563)),
}
# (N, H, W)
IMAGES = {
    "camvid": (8, 352, 352),  # one batch of crops
    "cityscapes": (1, 1024, 2048),  # one validation image
}
# (N, H, W) of losses at label resolution
PIXEL_LOSSES = {"cityscapes": (8, 512, 1024)}
# What takes their place on a GPU (`use_gpu_sizes`): training batches and large images fill one; a single small image
# shows what a launch costs.
_ASPP_GPU = (16, 2048, 32, 32)  # ResNet, 16 crops of 512 x 512, output stride 16: 67 MB in bf16
_ASPP_IMAGE = (1, 2048, 64, 128)  # one image of 1024 x 2048
_ASPP_OS8 = (8, 2048, 64, 128)  # 8 crops of 512 x 1024, output stride 8
GPU_SIZES = {
    "TRAINING": {
        "resnet50 16x769x769": ("resnet50", (16, 769, 769)),
        "resnet101 16x769x769": ("resnet101", (16, 769, 769)),
        "mobilenet_v2 16x513x513": ("mobilenet_v2", (16, 513, 513)),
    },
    "INFERENCE": {
        "resnet50 1x1024x2048": ("resnet50", (1, 1024, 2048)),
        "mobilenet_v2 1x1024x2048": ("mobilenet_v2", (1, 1024, 2048)),
        "mobilenet_v2 1x513x513": ("mobilenet_v2", (1, 513, 513)),
    },
    "SEPARABLE": {
        "aspp": (_ASPP_GPU, 256, 12),
        "aspp_image": (_ASPP_IMAGE, 256, 12),
        "aspp_os8": (_ASPP_OS8, 256, 24),
        "aspp_small": ((1, 2048, 33, 33), 256, 12),
        "decoder": ((8, 304, 128, 256), 256, 1),
    },
    "DECODERS": {
        "1024x2048": ((1, 256, 64, 128), (48, 256, 512)),
        "513x513": ((1, 256, 33, 33), (48, 129, 129)),
    },
    "DECODERS_TRAINED": {
        "batch 16 of 512x512": ((16, 256, 32, 32), (48, 128, 128)),
        "batch 8 of 512x1024": ((8, 256, 32, 64), (48, 128, 256)),
    },
    "DEPTHWISE": {
        **{f"aspp d={d}": (_ASPP_GPU, 1, d) for d in (1, 6, 12, 18)},
        **{f"aspp image d={d}": (_ASPP_IMAGE, 1, d) for d in (6, 12, 18)},
        **{f"aspp os8 d={d}": (_ASPP_OS8, 1, d) for d in (12, 24, 36)},
        "aspp small d=12": ((1, 2048, 33, 33), 1, 12),
        "decoder": ((8, 304, 128, 256), 1, 1),
        "train mobilenet 96": ((16, 96, 257, 257), 2, 1),
        "train mobilenet 960": ((16, 960, 33, 33), 1, 2),
    },
    "DEPTHWISE_RATES": {"aspp": (_ASPP_GPU, [6, 12, 18]), "aspp image": (_ASPP_IMAGE, [6, 12, 18])},
    "DEPTHWISE_BACKWARD": {
        "aspp_2048": (_ASPP_GPU, 1, 12),
        "aspp_os8": (_ASPP_OS8, 1, 24),
        "mobilenet_stride_2": ((16, 96, 257, 257), 2, 1),
        "mobilenet_960_dilated": ((16, 960, 33, 33), 1, 2),
    },
    "DEPTHWISE_NORMALISED": {  # MobileNetV2, 16 crops of 513 x 513, output stride 16
        "mobilenet 16x96": ((16, 96, 257, 257), 2, 1),
        "mobilenet 16x144": ((16, 144, 129, 129), 1, 1),
        "mobilenet 16x384": ((16, 384, 33, 33), 1, 1),
        "mobilenet 16x960": ((16, 960, 33, 33), 1, 2),
    },
    "BATCH_NORMS": {
        "head": ((16, 256, 128, 128), "relu", False, ("float32", "bfloat16")),
        "resnet_residual": ((16, 1024, 49, 49), "relu", True, ("float32",)),
        "aspp": (_ASPP_GPU, "relu", False, ("bfloat16",)),
    },
    "UPSAMPLED_LOGITS": {
        "cityscapes": ((8, 19, 128, 256), (512, 1024)),
        "cityscapes image": ((1, 19, 256, 512), (1024, 2048)),
        "voc": ((16, 21, 129, 129), (513, 513)),
        "ade20k": ((16, 150, 128, 128), (512, 512)),
    },
    "UPSAMPLED_LOGITS_TRAINED": {
        "cityscapes": ((8, 19, 128, 256), (512, 1024)),
        "voc": ((16, 21, 128, 128), (512, 512)),
        "ade20k": ((16, 150, 128, 128), (512, 512)),
    },
    "IMAGES": {"cityscapes": (16, 769, 769), "cityscapes image": (1, 1024, 2048)},
    "PIXEL_LOSSES": {"cityscapes": (8, 512, 1024), "voc": (16, 513, 513)},
    "LABEL_MAPS": {
        "cityscapes": ((8, 1024, 2048), 19),
        "voc": ((16, 513, 513), 21),
        "ade20k": ((16, 512, 683), 150),
    },
}


def use_gpu_sizes() -> None:
    """Before a benchmark is collected: all of them read the tables above at their import."""
    for name, sizes in GPU_SIZES.items() if not TINY else ():
        globals()[name].clear()
        globals()[name].update(sizes)


if TINY:
    SEPARABLE = {"tiny": ((1, 70, 9, 11), 40, 7)}
    DEPTHWISE = {"tiny": ((1, 33, 9, 11), 1, 8)}
    DEPTHWISE_RATES = {"tiny": ((1, 33, 9, 11), [2, 4, 6])}
    DEPTHWISE_NORMALISED = {"tiny": ((2, 19, 9, 8), 2, 1)}
    DEPTHWISE_BACKWARD = {"tiny": ((1, 19, 7, 9), 1, 2)}
    BATCH_NORMS = {
        "tiny_residual": ((2, 24, 9, 7), "relu", True, ("float32",)),  # in bf16 eager rounds before it adds
        "tiny": ((2, 24, 9, 7), "relu6", False, ("bfloat16",)),
    }
    UPSAMPLED_LOGITS = UPSAMPLED_LOGITS_TRAINED = {"tiny": ((1, 5, 9, 13), (33, 47))}
    DECODERS = {"tiny": ((1, 20, 3, 4), (5, 9, 11))}
    DECODERS_TRAINED = {"tiny": ((2, 20, 3, 4), (5, 9, 11))}
    CROPS = {"tiny": ((33, 47), (20, 60), (-1, 18, 5, 40))}
    IMAGES = {"tiny": (2, 19, 23)}
    PIXEL_LOSSES = {"tiny": (2, 19, 23)}
    LABEL_MAPS = {"tiny": ((1, 33, 47), 5)}
    TRAINING = INFERENCE = {"mobilenet_v2 tiny": ("mobilenet_v2", (2, 33, 65))}

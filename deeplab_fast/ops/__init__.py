"""The ops: one file each, one name, one contract, one reference, one table of backends.

Importing this registers all of them with torch and imports no kernel.
"""

from __future__ import annotations

from .augment_image import augment_image, augment_image_mask
from .batch_norm_act import batch_norm_act, batch_norm_act_inference, batch_norm_merge, batch_norm_statistics
from .batch_norm_act_backward import batch_norm_act_backward, batch_norm_act_backward_reduce
from .confusion_matrix import confusion_matrix
from .depthwise_conv import depthwise_conv, depthwise_conv_rates, depthwise_conv_statistics
from .depthwise_conv_backward import depthwise_conv_backward
from .depthwise_conv_normalised import depthwise_conv_normalised
from .dispatch import has_kernel
from .kth_largest import kth_largest
from .normalize_image import normalize_image
from .separable_conv import separable_conv, separable_conv_concat
from .upsample_argmax import upsample_argmax
from .upsample_concat import upsample_concat
from .upsample_confusion_matrix import upsample_confusion_matrix
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "augment_image",
    "augment_image_mask",
    "batch_norm_act",
    "batch_norm_act_backward",
    "batch_norm_act_backward_reduce",
    "batch_norm_act_inference",
    "batch_norm_merge",
    "batch_norm_statistics",
    "confusion_matrix",
    "depthwise_conv",
    "depthwise_conv_backward",
    "depthwise_conv_normalised",
    "depthwise_conv_rates",
    "depthwise_conv_statistics",
    "has_kernel",
    "kth_largest",
    "normalize_image",
    "separable_conv",
    "separable_conv_concat",
    "upsample_argmax",
    "upsample_concat",
    "upsample_confusion_matrix",
    "upsample_cross_entropy",
]

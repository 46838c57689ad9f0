"""DeepLabv3 and DeepLabv3+ for semantic segmentation.

Importing it registers the ops (`torch.export.load` needs them) and imports no kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .accelerate import accelerate, accelerated
from .ops import confusion_matrix

if TYPE_CHECKING:
    from .checkpoint import load_model
    from .model import build_model
    from .model.importers import load_weights

__version__ = "0.1.0"
__all__ = ["accelerate", "accelerated", "build_model", "confusion_matrix", "load_model", "load_weights"]


def __getattr__(name: str) -> Any:
    # On first use: the commands' parts bring in what a program with the ops alone does not need.
    if name == "build_model":
        from .model import build_model

        return build_model
    if name == "load_model":
        from .checkpoint import load_model

        return load_model
    if name == "load_weights":
        from .model.importers import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The ops: one file each, one name, one contract, one reference, one table of backends.

Importing this registers all of them with torch and imports no kernel.
"""

from __future__ import annotations

from .confusion_matrix import confusion_matrix

__all__ = ["confusion_matrix"]

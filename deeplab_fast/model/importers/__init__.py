"""Weights that other projects trained -> this project's models."""

from .layouts import find_layout
from .load import Loaded, load_weights

__all__ = ["Loaded", "find_layout", "load_weights"]

"""Weights that other projects trained -> this project's models."""

from .load import Loaded, identify, load_weights

__all__ = ["Loaded", "identify", "load_weights"]

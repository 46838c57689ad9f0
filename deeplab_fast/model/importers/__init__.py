"""Weights that other projects trained -> this project's models."""

from .load import Loaded, load_weights

__all__ = ["Loaded", "load_weights"]

"""Batches -> logits: backbones, ASPP, decoder, and the weights that they start from."""

from .deeplab import DeepLab, build_model
from .weights import load_backbone_weights, load_matching

__all__ = ["DeepLab", "build_model", "load_backbone_weights", "load_matching"]

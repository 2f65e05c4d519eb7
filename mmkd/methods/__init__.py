"""Distillation methods, one paper a file."""

from .base import Method
from .faster_rcnn import FasterRCNNDistillation
from .feature_hint import FeatureHint

__all__ = ['FasterRCNNDistillation', 'FeatureHint', 'Method']

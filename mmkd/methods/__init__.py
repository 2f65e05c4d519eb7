"""Distillation methods, one paper a file."""

from .base import Method
from .cwd import CWD
from .faster_rcnn import FasterRCNNDistillation
from .feature_hint import FeatureHint
from .kd import KD
from .mgd import MGD
from .pkd import PKD
from .tat import TaT

__all__ = [
    'CWD',
    'KD',
    'MGD',
    'PKD',
    'FasterRCNNDistillation',
    'FeatureHint',
    'Method',
    'TaT',
]

"""Distillation losses with the signature of MMDetection's own."""

from .hint import HintLoss
from .teacher_bounded_regression import TeacherBoundedRegressionLoss
from .weighted_soft_cross_entropy import WeightedSoftCrossEntropyLoss

__all__ = [
    'HintLoss',
    'TeacherBoundedRegressionLoss',
    'WeightedSoftCrossEntropyLoss',
]

"""Distillation losses with the signature of MMDetection's own."""

from .focal_kl import FocalKLLoss
from .hint import HintLoss
from .teacher_bounded_regression import TeacherBoundedRegressionLoss
from .weighted_soft_cross_entropy import WeightedSoftCrossEntropyLoss

__all__ = [
    'FocalKLLoss',
    'HintLoss',
    'TeacherBoundedRegressionLoss',
    'WeightedSoftCrossEntropyLoss',
]

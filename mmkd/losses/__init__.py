"""Distillation losses, each a pure function and a registered module.

A function ``x_loss(pred, target, …)`` compares a student's tensor with a
teacher's and returns the loss of each element, sample or channel. The module
``XLoss`` weights and reduces it, has the signature of MMDetection's losses and
is registered: ``dict(type='mmkd.XLoss')`` works in any config.
"""

from .cosine import CosineLoss, cosine_loss
from .cwd import CWDLoss, cwd_loss
from .dist import DISTLoss, inter_class_loss, intra_class_loss
from .dkd import DKDLoss, dkd_parts
from .focal_kl import FocalKLLoss, focal_kl_loss
from .hint import HintLoss, hint_loss
from .kl import (
    BinaryProblems,
    SigmoidKLLoss,
    SoftmaxKLLoss,
    sigmoid_kl,
    softmax_kl,
)
from .nt_xent import NTXentLoss, nt_xent_loss
from .pkd import PKDLoss, pkd_loss
from .similarity_kl import SimilarityKLLoss, similarity_kl
from .soft_focal import SoftFocalLoss, soft_focal_loss
from .teacher_bounded_regression import (
    TeacherBoundedRegressionLoss,
    teacher_bounded_regression_loss,
)
from .weighted_soft_cross_entropy import (
    WeightedSoftCrossEntropyLoss,
    weighted_soft_cross_entropy_loss,
)

__all__ = [
    'BinaryProblems',
    'CWDLoss',
    'CosineLoss',
    'DISTLoss',
    'DKDLoss',
    'FocalKLLoss',
    'HintLoss',
    'NTXentLoss',
    'PKDLoss',
    'SigmoidKLLoss',
    'SimilarityKLLoss',
    'SoftFocalLoss',
    'SoftmaxKLLoss',
    'TeacherBoundedRegressionLoss',
    'WeightedSoftCrossEntropyLoss',
    'cosine_loss',
    'cwd_loss',
    'dkd_parts',
    'focal_kl_loss',
    'hint_loss',
    'inter_class_loss',
    'intra_class_loss',
    'nt_xent_loss',
    'pkd_loss',
    'sigmoid_kl',
    'similarity_kl',
    'soft_focal_loss',
    'softmax_kl',
    'teacher_bounded_regression_loss',
    'weighted_soft_cross_entropy_loss',
]

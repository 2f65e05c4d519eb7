"""Distillation methods, one paper a file."""

from mmkd.core.method import Method

from .colad import CoLearningAssignment
from .crosskd import CrossKD
from .cwd import CWD
from .dcm import DCM
from .dist import DIST
from .dkd import DKD
from .faster_rcnn import FasterRCNNDistillation
from .fbkd import FBKD
from .feature_hint import FeatureHint
from .ffsd import FFSD
from .fgd import FGD
from .kd import KD
from .lad import LabelAssignmentDistillation
from .ld import LD
from .mgd import MGD
from .mutual import MutualLearning
from .one_teacher import OneTeacherSeveralStudents
from .pkd import PKD
from .solad import SoftLabelDistillation, SoLAD
from .tat import TaT

__all__ = [
    'CWD',
    'DCM',
    'DIST',
    'DKD',
    'FBKD',
    'FFSD',
    'FGD',
    'KD',
    'LD',
    'MGD',
    'PKD',
    'CoLearningAssignment',
    'CrossKD',
    'FasterRCNNDistillation',
    'FeatureHint',
    'LabelAssignmentDistillation',
    'Method',
    'MutualLearning',
    'OneTeacherSeveralStudents',
    'SoLAD',
    'SoftLabelDistillation',
    'TaT',
]

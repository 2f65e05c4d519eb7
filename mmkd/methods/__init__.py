"""Distillation methods, one file per paper."""

from mmkd.core.method import Method

from .colad import CoLAD
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
from .foundation_features import FoundationFeatures
from .kd import KD
from .lad import LAD
from .ld import LD
from .mgd import MGD
from .mutual import DML
from .one_teacher import OneTeacherSeveralStudents
from .pkd import PKD
from .pseudo_labels import PseudoLabels
from .solad import SoftLabelDistillation, SoLAD
from .tat import TaT
from .teacher_boxes import TeacherBoxes

# These are the names before the acronyms, for code that imports them.
CoLearningAssignment = CoLAD
LabelAssignmentDistillation = LAD
MutualLearning = DML

__all__ = [
    'CWD',
    'DCM',
    'DIST',
    'DKD',
    'DML',
    'FBKD',
    'FFSD',
    'FGD',
    'KD',
    'LAD',
    'LD',
    'MGD',
    'PKD',
    'CoLAD',
    'CoLearningAssignment',
    'CrossKD',
    'FasterRCNNDistillation',
    'FeatureHint',
    'FoundationFeatures',
    'LabelAssignmentDistillation',
    'Method',
    'MutualLearning',
    'OneTeacherSeveralStudents',
    'PseudoLabels',
    'SoLAD',
    'SoftLabelDistillation',
    'TaT',
    'TeacherBoxes',
]

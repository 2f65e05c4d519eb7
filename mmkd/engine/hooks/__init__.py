"""Hooks for distillation."""

from .batched_paa import BatchedPAAHook
from .ensemble_validation import EnsembleValidationHook
from .gradient_balance import GradientBalanceHook
from .loss_check import LossCheckHook
from .peer_validation import PeerValidationHook
from .progress import ProgressHook
from .reach_check import ReachCheckHook
from .safe_checkpoint import SafeCheckpointHook
from .teacher_check import TeacherCheckHook
from .telemetry import TelemetryHook
from .weight_schedule import WeightScheduleHook

__all__ = [
    'BatchedPAAHook',
    'EnsembleValidationHook',
    'GradientBalanceHook',
    'LossCheckHook',
    'PeerValidationHook',
    'ProgressHook',
    'ReachCheckHook',
    'SafeCheckpointHook',
    'TeacherCheckHook',
    'TelemetryHook',
    'WeightScheduleHook',
]

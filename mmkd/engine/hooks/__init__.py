"""Hooks for distillation."""

from .batched_paa import BatchedPAAHook
from .ensemble_validation import EnsembleValidationHook
from .loss_check import LossCheckHook
from .peer_validation import PeerValidationHook
from .progress import ProgressHook
from .safe_checkpoint import SafeCheckpointHook
from .teacher_check import TeacherCheckHook
from .telemetry import TelemetryHook
from .weight_schedule import WeightScheduleHook

__all__ = [
    'BatchedPAAHook',
    'EnsembleValidationHook',
    'LossCheckHook',
    'PeerValidationHook',
    'ProgressHook',
    'SafeCheckpointHook',
    'TeacherCheckHook',
    'TelemetryHook',
    'WeightScheduleHook',
]

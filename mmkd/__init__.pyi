"""The types of mmkd's public names, for type checkers."""

from mmkd.core.distiller import Distiller as Distiller
from mmkd.core.distiller import build_distiller as build_distiller
from mmkd.core.method import Method as Method
from mmkd.data.batch import Batch as Batch
from mmkd.detectors.record import StepRecord as StepRecord
from mmkd.errors import CheckpointError as CheckpointError
from mmkd.errors import ConfigError as ConfigError
from mmkd.errors import DataError as DataError
from mmkd.errors import MMKDError as MMKDError
from mmkd.errors import TapError as TapError
from mmkd.methods.feature_base import FeatureMethod as FeatureMethod
from mmkd.registry import HOOKS as HOOKS
from mmkd.registry import INDICATORS as INDICATORS
from mmkd.registry import METHODS as METHODS
from mmkd.registry import MODELS as MODELS
from mmkd.registry import RUNNERS as RUNNERS
from mmkd.registry import TEACHERS as TEACHERS
from mmkd.teachers.build import build_teacher as build_teacher
from mmkd.teachers.class_map import ClassMap as ClassMap
from mmkd.teachers.view import Teacher as Teacher
from mmkd.teachers.view import TeacherContext as TeacherContext
from mmkd.teachers.view import TeacherView as TeacherView

__version__: str
__all__: list[str]

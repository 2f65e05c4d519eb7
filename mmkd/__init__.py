"""mmkd: object-detection distillation for MMDetection 3.

What is named here is stable: it changes only with a new major version. It is
imported when it is first used, so that ``import mmkd`` costs nothing and
commands that need no PyTorch run without it.
"""

import importlib

from .errors import missing_packages
from .version import __version__

_HOMES = {
    'Batch': 'mmkd.data.batch',
    'CheckpointError': 'mmkd.errors',
    'ClassMap': 'mmkd.teachers.class_map',
    'ConfigError': 'mmkd.errors',
    'DataError': 'mmkd.errors',
    'Distiller': 'mmkd.core.distiller',
    'FeatureMethod': 'mmkd.methods.feature_base',
    'HOOKS': 'mmkd.registry',
    'INDICATORS': 'mmkd.registry',
    'METHODS': 'mmkd.registry',
    'MMKDError': 'mmkd.errors',
    'MODELS': 'mmkd.registry',
    'Method': 'mmkd.core.method',
    'RUNNERS': 'mmkd.registry',
    'StepRecord': 'mmkd.detectors.record',
    'TEACHERS': 'mmkd.registry',
    'TapError': 'mmkd.errors',
    'Teacher': 'mmkd.teachers.view',
    'TeacherContext': 'mmkd.teachers.view',
    'TeacherView': 'mmkd.teachers.view',
    'build_distiller': 'mmkd.core.distiller',
    'build_teacher': 'mmkd.teachers.build',
}
"""Each public name and the module that defines it; see ``__init__.pyi``."""

__all__ = ['__version__', *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if missing := missing_packages():
            raise missing from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

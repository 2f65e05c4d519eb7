"""Registries of mmkd: children of MMEngine's, so that ``mmkd.X`` is found.

A config that names ``type='mmkd.X'`` needs no ``custom_imports``: MMEngine
imports ``mmkd.registry`` for the scope and this module names the places where
its classes are defined.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry

RUNNERS = Registry(
    'runner',
    parent=MMENGINE_RUNNERS,
    scope='mmkd',
    locations=['mmkd.engine.runner'],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmkd',
    locations=['mmkd.engine.hooks'],
)
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmkd',
    locations=['mmkd.losses', 'mmkd.detectors.heads', 'mmkd.peers.ensemble'],
)
# Teachers are built by mmkd.teachers.build; see the class Teacher there.
TEACHERS = Registry('teacher', scope='mmkd', locations=['mmkd.teachers.build'])
# Methods are built by the Distiller, never by a detector's config.
METHODS = Registry('method', scope='mmkd', locations=['mmkd.methods'])
# How well a network's costs tell good candidates from bad, for CoLAD.
INDICATORS = Registry(
    'indicator',
    scope='mmkd',
    locations=['mmkd.detectors.assignment.colearning'],
)

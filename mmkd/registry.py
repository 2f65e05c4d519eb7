"""What MMEngine has to know of mmkd: its registries and its configs.

The registries are children of MMEngine's, so that ``mmkd.X`` is found. A
config that names ``type='mmkd.X'`` needs no ``custom_imports``: MMEngine
imports ``mmkd.registry`` for the scope and this module names the places where
its classes are defined.

Once this module is imported, ``_base_ = ['mmkd::lad_r50.py']`` names a config
of mmkd's, wherever mmkd is installed.
"""

import importlib.util
import os.path as osp

from mmkd.errors import ConfigError, missing_packages

if error := missing_packages():
    raise error

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
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
    locations=['mmkd.engine.hooks', 'mmkd.pretrain.hooks'],
)
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmkd',
    locations=[
        *('mmkd.losses', 'mmkd.detectors.heads', 'mmkd.peers.ensemble'),
        'mmkd.pretrain.model',
    ],
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='mmkd',
    locations=['mmkd.pretrain.crops'],
)
OPTIMIZERS = Registry(
    'optimizer',
    parent=MMENGINE_OPTIMIZERS,
    scope='mmkd',
    locations=['mmkd.pretrain.lars'],
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


def config_file(name: str) -> str:
    """Find the file of a config.

    Args:
        name: A path, or ``package::folder/file.py`` for a config that lies in
            an installed package.

    Raises:
        ConfigError: If the package is not installed.
    """
    package, separator, path = name.rpartition('::')
    if not separator:
        return osp.expanduser(name)
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # such as a package in none
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(
            f'the config {name!r} is of {package}, which is not installed. '
            f'Install {package}, or give the path of a config.'
        )
    root = osp.dirname(spec.origin)
    configs = osp.join(root, '.mim', 'configs')
    if not osp.isdir(configs):  # a clone of mmkd
        configs = osp.join(osp.dirname(root), 'configs')
    return osp.join(configs, path)


_stock_cfg_path = Config._get_cfg_path


def _cfg_path(base: str, filename: str) -> tuple[str, str | None]:
    """Resolve an entry of ``_base_``, as MMEngine does for its own projects.

    MMEngine only knows a fixed list of packages. The scope is None, because
    mmkd's configs name MMDetection's classes as any user's config does.
    For one of MMDetection's, MMEngine reads all of its model index first, a
    second or more each time, and then takes the same file.
    """
    if base.startswith('mmkd::'):
        return config_file(base), None
    if base.startswith('mmdet::') and osp.isfile(config_file(base)):
        return config_file(base), 'mmdet'
    return _stock_cfg_path(base, filename)


Config._get_cfg_path = staticmethod(_cfg_path)
MODULE2PACKAGE['mmkd'] = 'mmkd'  # for mmengine.hub.get_config

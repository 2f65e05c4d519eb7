"""Where a teacher comes from: its config, its weights, its class names."""

import copy
import difflib
import functools
import glob
import logging
import os
import os.path as osp
import reprlib
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_from_file, load
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import get_installed_path
from torch import Tensor, nn

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.data.datasets import wrapped
from mmkd.data.errors import some
from mmkd.data.files import path_hint, wrong_path
from mmkd.data.foreign_weights import origin
from mmkd.errors import CheckpointError, ConfigError
from mmkd.registry import config_file

from .facts import box_class_names, class_counts, is_class_agnostic
from .state_keys import hint, stock_state


def load_config(source: str | os.PathLike | Mapping[str, Any]) -> Config:
    """Load a config from a file, a name such as ``mmdet::…``, or a dict.

    Raises:
        ConfigError: If the file or one of its bases does not exist or is not
            Python, or if there is no model.
    """
    config = read_config(source)
    if 'model' not in config:
        given = (
            f'the config {str(source)!r}'
            if isinstance(source, str | os.PathLike)
            else 'a config dict'
        )
        raise ConfigError(
            f'{given} needs the key "model" (and names the classes through '
            f'its data sets), got {sorted(config)}. A bare model dict goes '
            'into dict(model=...).'
        )
    if not isinstance(config.model, dict):
        raise ConfigError(
            f'the key "model" of {source!r} must be a dict such as '
            f'dict(type=...), got {reprlib.repr(config.model)}.'
        )
    if config.get('data_preprocessor'):
        # As MMEngine's runner does.
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    return config


def read_config(source: str | os.PathLike | Mapping[str, Any]) -> Config:
    """Load a config of anything: it may have data and no model.

    Raises:
        ConfigError: If the file or one of its bases does not exist or is not
            Python.
    """
    if not isinstance(source, str | os.PathLike):
        return Config(copy.deepcopy(dict(source)))
    path = config_file(str(source))
    if not osp.isfile(path):
        raise ConfigError(
            f'the config {str(source)!r} {_problem(str(source), path)}'
        )
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is code
        raise ConfigError(
            f'the config {str(source)!r} cannot be read: '
            f'{_what_and_where(error)}'
        ) from error


def _what_and_where(error: Exception) -> str:
    """Say what went wrong in a config, and in which line of which file."""
    if isinstance(error, FileNotFoundError | SyntaxError | ConfigError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    # lines of a config's own; what it calls comes after
    own = [
        f for f in frames if f.name == '<module>' and f.filename[-1:] != '>'
    ]
    where = f' ({own[-1].filename}, line {own[-1].lineno})' if own else ''
    return f'{type(error).__name__}: {error}{where}'


def _problem(source: str, path: str) -> str:
    """What is wrong with the path of a config, and what to give instead."""
    package, separator, name = source.rpartition('::')
    if not separator:
        return (
            f'{wrong_path(path)}: {path} is not a file. {path_hint(path)}'
            f'Give a path from {osp.abspath(".")}, "mmkd::file.py" or '
            '"mmdet::folder/file.py".'
        )
    root = config_file(f'{package}::')
    names = glob.glob('**/*.py', root_dir=root, recursive=True)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f' Did you mean "{package}::{close[0]}"?' if close else ''
    return f'does not exist: {path} is not a file.{hint}'


@functools.lru_cache(maxsize=1)
def _model_index() -> dict[str, dict[str, Any]]:
    root = osp.join(get_installed_path('mmdet'), '.mim')
    models: dict[str, dict[str, Any]] = {}
    for metafile in load(osp.join(root, 'model-index.yml'))['Import']:
        content = load(osp.join(root, metafile))
        entries = content if isinstance(content, list) else content['Models']
        for entry in entries:
            if 'Weights' in entry and 'Config' in entry:
                models[entry['Name']] = dict(
                    config=osp.join(root, entry['Config']),
                    checkpoint=entry['Weights'],
                )
    return models


def find_in_model_index(name: str) -> dict[str, Any]:
    """Return the config and checkpoint of a published model.

    Raises:
        ConfigError: If the index has no such name; the message has the
            nearest ones.

    Example:
        >>> find_in_model_index('paa_r101_fpn_1x_coco')['checkpoint'][-12:]
        '0a1825a4.pth'
    """
    models = _model_index()
    if name not in models:
        close = difflib.get_close_matches(name, models, n=3)
        raise ConfigError(
            f"MMDetection's model index has no {name!r}. Nearest: "
            f'{", ".join(close) or "none"} (of {len(models)} models). Give '
            'one of its names, or "config" and "checkpoint".'
        )
    return dict(models[name])


def build_trained(
    cfg: Mapping[str, Any],
    checkpoint: str | None,
    *,
    trust: bool,
    prefix: str | None = None,
    who: str = 'teacher',
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a detector and load its weights.

    Args:
        cfg: Config of the model.
        checkpoint: Path or URL; None leaves it untrained, with a warning.
        trust: Unpickle whatever the checkpoint holds.
        prefix: What comes before the detector's names in the checkpoint, such
            as ``'student'``; other keys are left out.
        who: What the detector is, for the message.

    Returns:
        The detector and the checkpoint's meta data.

    Raises:
        CheckpointError: If the checkpoint does not fit the config exactly.
    """
    model: Any = build_untrained(cfg)
    if checkpoint is None:
        model.init_weights()
        message = (
            'THE TEACHER IS UNTRAINED (checkpoint=None): its weights are '
            'random and distillation from it teaches nothing. This is for '
            'smoke tests only.'
        )
        warnings.warn(message, stacklevel=3)
        print_log(message, 'current', logging.WARNING)
        return model, {}
    content = load_checkpoint_file(checkpoint, trust=trust)
    load_strictly(model, content['state_dict'], checkpoint, prefix, who)
    meta = content.get('meta')
    return model, meta if isinstance(meta, dict) else {}


def build_untrained(cfg: Mapping[str, Any]) -> nn.Module:
    """Build a detector whose weights are about to be loaded."""
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        # ImageNet weights would be overwritten at once, so never fetch them.
        return MODELS.build(_without_pretrained(cfg))


def _without_pretrained(cfg: Any) -> Any:
    """Return a copy of a model's config that loads nothing from files."""
    if isinstance(cfg, list | tuple):
        return type(cfg)(_without_pretrained(item) for item in cfg)
    if not isinstance(cfg, Mapping):
        return cfg
    result = ConfigDict()
    for key, value in cfg.items():
        if key == 'pretrained':
            value = None
        elif key == 'init_cfg':
            items = value if isinstance(value, list | tuple) else [value]
            # Of MMEngine's initialisers, only Pretrained has a checkpoint.
            kept = [i for i in items if i and 'checkpoint' not in i]
            value = kept or None
        result[key] = _without_pretrained(value)
    return result


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    prefix: str | None = None,
    who: str = 'teacher',
) -> None:
    """Load a stock state dict exactly.

    Args:
        model: The network.
        state: Its weights; the model may have been wrapped for distributed
            training.
        source: Where the weights come from, for the message.
        prefix: What comes before the names of the network in ``state``.
        who: What the network is, for the message.

    Raises:
        CheckpointError: If a key is missing or unexpected, or a shape differs.
    """
    renamed = stock_state(state, model.state_dict(), source, prefix)
    try:
        missing, unexpected = model.load_state_dict(renamed, strict=False)
    except RuntimeError:
        # Shapes differ; the message below tells which keys do as well.
        own = model.state_dict()
        missing = [key for key in own if key not in renamed]
        unexpected = [key for key in renamed if key not in own]
    shapes = [
        f'{key}: config {tuple(value.shape)}, '
        f'checkpoint {tuple(renamed[key].shape)}'
        for key, value in model.state_dict().items()
        if key in renamed and value.shape != renamed[key].shape
    ]
    problems = [
        f'{len(keys)} {what} (first: {"; ".join(keys[:3])})'
        for what, keys in (
            ('keys are missing', missing),
            ('keys are unexpected', unexpected),
            ('shapes differ', shapes),
        )
        if keys
    ]
    if problems:
        remedy = '' if prefix else hint(renamed, model.state_dict())
        whose = origin(renamed)
        if not remedy and whose and 'MMDetection detector' not in whose:
            remedy = (
                f'It holds the weights of {whose}, which are not those of '
                "this detector. Give a checkpoint of MMDetection's."
            )
        raise CheckpointError(
            f'the checkpoint {source} does not fit the {who} '
            f'{type(model).__name__} of its config: {", ".join(problems)}. '
            + (
                remedy
                or 'Give the checkpoint that was trained with this config, or '
                'the config of this checkpoint.'
            )
        )


def class_names(
    meta: Mapping[str, Any], config: Config
) -> tuple[str, ...] | None:
    """Return class names from a checkpoint's meta data, or its config."""
    recorded = meta.get('dataset_meta') or {}
    for source, key in (
        (recorded, 'classes'),
        (recorded, 'CLASSES'),
        (meta, 'CLASSES'),
    ):
        if isinstance(source, Mapping) and source.get(key):
            return _as_names(source[key])
    for loader in ('test_dataloader', 'val_dataloader', 'train_dataloader'):
        dataset = (config.get(loader) or {}).get('dataset')
        names = dataset and _dataset_classes(dataset)
        if names:
            return names
    return None


def check_class_count(
    model: Any,
    names: Sequence[str],
    where: str = '',
    data: str = 'the training data',
) -> None:
    """Check that a detector classifies into as many classes as are named.

    Every head is looked at: dense heads, all stages of a RoI head, mask heads
    and heads of queries, and losses that count classes. A detector without
    classes (RPN), or one that classifies into words, may name any.

    Args:
        model: The detector.
        names: The class names.
        where: The place of its description in the config; empty for the
            student.
        data: What names the classes.

    Raises:
        ConfigError: If a head has another number of classes; the message has
            the keys of all such heads.
    """
    if hasattr(model, 'language_model') or is_class_agnostic(model):
        return
    names = box_class_names(model, names)
    wrong = {
        f'model.{option}': count
        for option, count in class_counts(model).items()
        if count != len(names)
    }
    if not wrong:
        return
    counts = ', '.join(str(n) for n in dict.fromkeys(wrong.values()))
    remedy = (
        f'Set {"it" if len(wrong) == 1 else "each"} to {len(names)}, or '
        'name the classes through metainfo=dict(classes=...) of the data set.'
        if not where
        else 'Name its own classes through test_dataloader.dataset.metainfo='
        'dict(classes=...) in its config, or set num_classes there.'
    )
    raise ConfigError(
        f'{where}{": " if where else ""}{some(wrong)}: expected '
        f'{len(names)}, because {data} names as many classes ({some(names)})'
        f', got {counts}. {remedy}'
    )


def _dataset_classes(dataset: Mapping[str, Any]) -> tuple[str, ...] | None:
    metainfo = dataset.get('metainfo') or {}
    if metainfo.get('classes'):
        return _as_names(metainfo['classes'])
    if inner := wrapped(dataset):
        return _dataset_classes(inner[0])
    cls = dataset.get('type')
    if isinstance(cls, str):
        cls = DATASETS.get(cls)
    names = getattr(cls, 'METAINFO', {}).get('classes')
    return _as_names(names) if names else None


def _as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        # As in MMEngine's data sets: a file of names, or a single name.
        names = list_from_file(names) if osp.isfile(names) else [names]
    return tuple(names)

"""Small helpers that know nothing of detectors."""

import argparse
import difflib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import DictAction
from mmengine.registry import Registry

from mmkd.errors import ConfigError

ATTACHED = 'distillation'
"""The name of the module on the student, the prefix of its keys, and the key
in the checkpoint."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that helps with a misspelt ``name``.

    Args:
        name: What was given.
        known: The names that exist.

    Example:
        >>> from mmkd.utils import nearest
        >>> nearest('lenght', ['length', 'width'])
        'Did you mean "length"? Known: length, width.'
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f'Did you mean "{close[0]}"? ' if close else ''
    return f'{hint}Known: {", ".join(options) or "none"}.'


def check_options(
    where: str, given: Iterable[str], known: Iterable[str]
) -> None:
    """Check that all options are known.

    Args:
        where: The place in the config, for the message.
        given: The names of the options that were given.
        known: The names of the options that exist.

    Raises:
        ConfigError: At the first unknown option; names the nearest known one.

    Example:
        >>> from mmkd.utils import check_options
        >>> check_options('KD', ['beta'], ['temperature'])
        Traceback (most recent call last):
            ...
        mmkd.errors.ConfigError: KD has no option "beta". Known: temperature.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(
                f'{where} has no option "{name}". {nearest(name, known)}'
            )


def build_checked(
    registry: Registry, cfg: Mapping[str, Any], where: str
) -> Any:
    """Build an object from its config, with errors that say what is meant.

    Args:
        registry: The registry that holds ``cfg['type']``.
        cfg: The ``type`` and the keyword options of the class.
        where: The place in the config, for messages.

    Returns:
        An object of the class that ``type`` names.

    Raises:
        ConfigError: If ``type`` is missing or unknown, or an option is
            unknown, missing, or refused by the class. Where a name is
            unknown, the message proposes the nearest known one.

    Example:
        >>> from mmkd.registry import MODELS
        >>> from mmkd.utils import build_checked
        >>> cfg = dict(type='mmkd.HintLoss', norm='l1')
        >>> build_checked(MODELS, cfg, 'FeatureHint.loss').norm
        'l1'
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ConfigError(
            f'{where} must be a dict with a "type", got {cfg!r}. '
            f'Known types: {", ".join(_known_types(registry))}.'
        )
    options = dict(cfg)
    cls = options.pop('type')
    options.pop('_scope_', None)  # from a base config in another package
    cls = find_class(registry, cls, where)
    known = option_names(cls)
    if known is not None:
        check_options(f'{where} ({cls.__name__})', options, known)
    try:
        return cls(**options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        name = getattr(cls, '__name__', cls)
        raise ConfigError(f'{where} ({name}): {error}') from error


def option_names(cls: Callable[..., Any]) -> set[str] | None:
    """Return the names of a class's options; None if it takes any.

    A class whose options end in ``**options`` passes these on to its base.
    """
    names: set[str] = set()
    for base in inspect.getmro(cls)[:-1] if isinstance(cls, type) else (cls,):
        parameters = inspect.signature(base).parameters.values()
        names.update(p.name for p in parameters)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _known_types(registry: Registry) -> list[str]:
    registry.import_from_location()
    return [f'{registry.scope}.{name}' for name in registry.module_dict]


def find_class(
    registry: Registry, name: str | Callable[..., Any], where: str
) -> Callable[..., Any]:
    """Return the registered class that a config's ``type`` names.

    Args:
        registry: The registry that holds the class.
        name: The ``type``; a class is returned as it is.
        where: The place in the config, for messages.

    Raises:
        ConfigError: If there is none; the message proposes the nearest name.
    """
    if not isinstance(name, str):
        return name
    known = _known_types(registry)
    scoped = name if '.' in name else f'{registry.scope}.{name}'
    if scoped in known:
        return registry.module_dict[scoped.rpartition('.')[2]]
    try:
        found = registry.get(name)
    except (RuntimeError, ImportError):
        found = None
    if found is None:
        raise ConfigError(
            f'{where}: type "{name}" is not a registered {registry.name}. '
            f'{nearest(scoped, known)}'
        )
    return found


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Leave every global random state as it was, whatever happens within.

    Two-stage samplers, dropout and the initialisation of the student draw
    from the global generators. What distillation adds must not shift them.

    Args:
        seed: A seed for the generators within the context; by default they
            continue from where they are.

    Example:
        >>> import torch
        >>> from mmkd.utils import isolated_random_state
        >>> state = torch.get_rng_state()
        >>> with isolated_random_state(seed=0):
        ...     torch.rand(1)
        tensor([0.4963])
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = [torch.cuda.current_device()] if on_gpu else []
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class CfgOptions(DictAction):
    """MMEngine's ``key=value …``, which are told if they have no ``=``."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, *args: Any
    ) -> None:
        if wrong := [value for value in values if '=' not in value]:
            parser.error(f'--cfg-options takes KEY=VALUE, got {wrong[0]!r}')
        super().__call__(parser, namespace, values, *args)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, which overrides entries of a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='override entries of the config, such as train_cfg.max_epochs=2',
    )

"""Small helpers without knowledge of detectors."""

import difflib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.registry import Registry

from mmkd.errors import ConfigError

ATTACHED = 'distillation'
"""Name of the module on the student, prefix of its keys, checkpoint key."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence that helps with a misspelt ``name``.

    Example:
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
    """Raise :class:`ConfigError` for the first unknown option in ``given``."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(
                f'{where} has no option "{name}". {nearest(name, known)}'
            )


def build_checked(
    registry: Registry, cfg: Mapping[str, Any], where: str
) -> Any:
    """Build ``cfg`` from ``registry``, with errors that name what is meant.

    Args:
        registry: The registry that holds ``cfg['type']``.
        cfg: The ``type`` and the keyword options of the class.
        where: The place in the config, for messages.

    Raises:
        ConfigError: If ``type`` is missing or unknown, an option is unknown
            (the message says the nearest known name), missing, or refused
            by the class.
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ConfigError(
            f'{where} must be a dict with a "type", got {cfg!r}. '
            f'Known types: {", ".join(_known_types(registry))}.'
        )
    options = dict(cfg)
    cls = options.pop('type')
    options.pop('_scope_', None)  # of configs with a base in another package
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
    """What a class can be built with; None where it takes anything.

    A class that ends in ``**options`` hands these on to its base.
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
    """The registered class of a config's ``type``.

    Raises:
        ConfigError: If there is none; says the nearest name.
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

    Two-stage samplers, dropout and weight initialisation of the student draw
    from the global generators: what distillation adds must not shift them.

    Args:
        seed: Seeds the generators within the context.
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

"""``--cfg-options`` as entries of a file that is kept."""

import copy
import difflib
from collections.abc import Mapping, MutableMapping
from typing import Any

from mmengine.config import Config

from mmkd.engine.config_checks import RUNNER_KEYS
from mmkd.errors import ConfigError
from mmkd.utils import nearest

from .text import Raw, plain

ALIKE = 0.8
"""Above this likeness a key that does not exist is taken for misspelt."""


def merge(
    entries: MutableMapping[str, Any], changes: Mapping[str, Any]
) -> None:
    """Merge entries of a config in place, as a config is merged on its base.

    What stands for another entry becomes a copy of that entry.
    """
    for key, value in changes.items():
        now = entries.get(key)
        if isinstance(now, Raw) and str(now) in entries:
            now = entries[key] = copy.deepcopy(entries[str(now)])
        deletes = isinstance(value, Mapping) and '_delete_' in value
        if (
            isinstance(value, Mapping)
            and isinstance(now, dict)
            and not deletes
        ):
            merge(now, value)
        else:
            entries[key] = copy.deepcopy(value)


def set_options(
    entries: dict[str, Any], cfg: Config, options: Mapping[str, Any]
) -> list[str]:
    """Add options to the entries of a file.

    Args:
        entries: The entries, changed in place.
        cfg: The config that the file is so far.
        options: Values by dotted keys; a number is the place in a list.

    Returns:
        A line for each key that is new in the config.

    Raises:
        ConfigError: If a key hits nothing and is like another, or nothing
            would read it.
    """
    before = cfg.to_dict()
    why = [line for key in options for line in _check(before, key)]
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f'--cfg-options: {error}') from error
    whole = plain(cfg)
    for key in options:
        value: Any = whole
        path = []
        for name in key.split('.'):
            value = value[name]
            path.append(name)
            if isinstance(value, list | tuple):
                break  # a config replaces it as a whole
        for name in reversed(path):
            value = {name: value}
        merge(entries, value)
    return why


def _check(cfg: Mapping[str, Any], key: str) -> list[str]:
    """Check that a key hits something."""
    value: Any = cfg
    names = key.split('.')
    for depth, name in enumerate(names):
        where = '.'.join(names[:depth])
        if isinstance(value, list | tuple):
            if not name.isdigit() or int(name) >= len(value):
                raise ConfigError(
                    f'--cfg-options {key}: {where} is a list of {len(value)}'
                    f'; expected a number below that, got "{name}".'
                )
            value = value[int(name)]
        elif isinstance(value, Mapping) and name in value:
            value = value[name]
        elif value is None or isinstance(value, Mapping):
            return _new(cfg, key, where, name, value or {})
        else:
            raise ConfigError(
                f'--cfg-options {key}: {where} is {value!r}, which has no '
                f'"{name}" in it.'
            )
    return []


def _new(
    cfg: Mapping[str, Any],
    key: str,
    where: str,
    name: str,
    siblings: Mapping[str, Any],
) -> list[str]:
    """Refuse a key that hits nothing, or say that it is new."""
    if not where:
        if name in RUNNER_KEYS:
            return []
        close = difflib.get_close_matches(name, {*cfg, *RUNNER_KEYS}, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ''
        raise ConfigError(
            f'--cfg-options {key}: nothing reads the key "{name}" of a '
            f'config.{hint}'
        )
    known = [k for k in siblings if k != 'type']
    complete = where.startswith('distillation.methods.')
    if complete or difflib.get_close_matches(name, known, 1, cutoff=ALIKE):
        raise ConfigError(
            f'--cfg-options {key}: {where} has no option "{name}". '
            f'{nearest(name, known)}'
        )
    return [f'--cfg-options {key}: new, the student has no such entry']

"""Functions that a config names as ``'module:function'``."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkd.errors import ConfigError

from .disk_cache import fast_hash


def find_function(name: str, where: str) -> Callable[..., Any]:
    """Return the function that ``'module:function'`` names.

    Raises:
        ConfigError: If there is none.
    """
    module, _, path = name.partition(':')
    if os.getcwd() not in sys.path:  # as for `python -m`
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in path.split('.'):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'{where}: {name!r} is no function that Python finds ({error}). '
            'Write "module:function" for a module in the current folder or '
            'on PYTHONPATH.'
        ) from error
    if not callable(found):
        raise ConfigError(
            f'{where}: {name!r} is a {type(found).__name__}, and no function.'
        )
    return found


def source_hash(name: str) -> str:
    """Hash the file in which a function is defined; empty if there is none."""
    module = sys.modules[name.partition(':')[0]]
    try:
        file = inspect.getsourcefile(module)
    except TypeError:  # it is not written in Python
        file = None
    if file is None or not Path(file).is_file():
        return ''
    return fast_hash(Path(file).read_bytes()).hexdigest()

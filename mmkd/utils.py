"""Small helpers that know nothing of detectors."""

import argparse
import difflib
import inspect
import random
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed
from mmengine import dist
from mmengine.config import DictAction
from mmengine.registry import Registry

from mmkd.errors import ConfigError

ATTACHED = 'distillation'
"""The name of the module on the student, the prefix of its keys, and the key
in the checkpoint."""


LAST_SEED = 2**32 - 2**16 - 1
"""NumPy takes no seed of more than 32 bits, and each process and each worker
of a data loader adds its number to the run's."""


@dataclass(frozen=True)
class Official:
    """The authors' code for detection, and how a method reproduces it.

    A method has one for each setting whose results are cited. They make the
    table in ``docs/official_code.md``, and the tests check them: the options
    are valid, the test exists, and the config has these options.
    """

    code: str
    """Address of the repository, or of the file in it."""
    compared: str
    """The test that compares with an independent reference of that code, such
    as ``tests/methods/test_cwd.py::TestOfficialCode``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options with which the method does what that code does. Those that
    are not named are the defaults."""
    config: str = ''
    """The config in ``configs/`` that the cited result belongs to."""
    ap: str = ''
    """The cited result, such as ``GFL R101→R50, 1x: 40.2→43.7``."""
    differs: str = ''
    """What nevertheless differs from that code, in a sentence."""


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
                f'{where} has no option "{name}". {nearest(str(name), known)}'
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


def named_class(registry: Registry, name: Any) -> Any:
    """Return the class that a config's ``type`` names, for comparisons.

    Configs name one class in many ways: ``'CheckpointHook'``,
    ``'mmengine.CheckpointHook'``, ``'mmengine.hooks.CheckpointHook'``, or by
    the class itself.

    Args:
        registry: MMEngine's registry, whose current scope counts.
        name: The ``type``; a class is returned as it is.

    Returns:
        The class; None if there is none.
    """
    if not isinstance(name, str):
        return name
    with registry.switch_scope_and_registry(None) as scoped:
        try:
            return scoped.get(name)
        except (ImportError, RuntimeError):
            return None


def is_seed(value: object) -> bool:
    """Whether every generator of random numbers takes a seed."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and 0 <= value <= LAST_SEED  # type: ignore[operator]


def check_seed(randomness: object) -> None:
    """Check the ``randomness`` of a config.

    Raises:
        ConfigError: If its seed is none; None is one drawn at random.
    """
    if not isinstance(randomness, Mapping):
        raise ConfigError(
            'randomness must be a dict such as dict(seed=0), got '
            f'{reprlib.repr(randomness)}.'
        )
    seed = randomness.get('seed')
    if seed is not None and not is_seed(seed):
        raise ConfigError(
            f'randomness.seed must be a whole number from 0 to {LAST_SEED}, '
            f'or None for one that is drawn, got {reprlib.repr(seed)}.'
        )


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


@contextmanager
def alone() -> Iterator[None]:
    """Let a process of distributed training compute as if it trained alone.

    Within the context, what asks whether training is distributed is told that
    it is not, so that nothing waits for the other processes. Stock code that
    one process leaves earlier than another would otherwise run into a
    collective (an average over the processes) that the other never joins.
    """
    if not dist.is_distributed():
        yield
        return
    world = torch.distributed.group.WORLD
    torch.distributed.group.WORLD = None
    try:
        yield
    finally:
        torch.distributed.group.WORLD = world


def process_share(part: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """Return the share of each process in a divisor of the whole batch.

    Distributed training averages the gradients of the R processes. If each of
    them divides its sum by the Rth part of what one process would divide the
    sum over the whole batch by, the average is the gradient of that process.
    A lower limit is therefore one of the whole batch as well: a limit of each
    process would divide by up to R times as much.

    Every process has to call it. It does not wait for the result on a GPU.

    Args:
        part: This process's part of the divisor, such as its number of
            positives; several at once for several divisors.
        least: The least that one process would divide by.

    Returns:
        The mean over the processes, at least ``least / R``, in float32.

    Example:
        >>> import torch
        >>> from mmkd.utils import process_share
        >>> process_share(torch.tensor(0), least=1.0)  # a single process
        tensor(1.)
    """
    share = part.detach().to(torch.float32, copy=True)
    dist.all_reduce(share, op='mean')
    return share.clamp(min=least / dist.get_world_size())


def whole_number(least: int) -> Callable[[str], int]:
    """Return the ``type`` of an argument: whole numbers from ``least``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number < 2**31:
            raise argparse.ArgumentTypeError(
                f'takes a whole number from {least}, got {text[:40]!r}'
            )
        return number

    return parse


class CfgOptions(DictAction):
    """MMEngine's ``key=value …``, which are told if they have no ``=``."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, *args: Any
    ) -> None:
        if wrong := [value for value in values if '=' not in value]:
            option = self.option_strings[0]
            parser.error(f'{option} takes KEY=VALUE, got {wrong[0]!r}')
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

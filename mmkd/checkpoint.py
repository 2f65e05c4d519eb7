"""Checkpoint files: reading them safely and keeping them stock.

A distilled checkpoint is a stock one: ``state_dict`` (and, with EMA,
``ema_state_dict``) hold the student under its stock names and nothing else.
What belongs to distillation lies under the separate key ``distillation``.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from torch.hub import download_url_to_file, get_dir
from torch.serialization import safe_globals

ATTACHED = 'distillation'
"""Name of the module on the student, prefix of its keys, checkpoint key."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: which, why, and the remedy."""


class _Inert:
    """Stands for an object of a checkpoint that nobody needs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _inert(*_: Any) -> None:
    return None


# What MMEngine's training checkpoints hold besides tensors (log histories).
# None of it is called: each name stands for an object that does nothing.
_INERT_GLOBALS: list[Callable[..., Any] | tuple[Callable, str]] = [
    (_Inert, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_inert, 'builtins.getattr'),
    (_inert, '__builtin__.getattr'),
    (_Inert, 'numpy.ndarray'),
    (_Inert, 'numpy.dtype'),
    (_Inert, 'numpy._core.multiarray._reconstruct'),
    (_Inert, 'numpy.core.multiarray._reconstruct'),
    (_Inert, 'numpy._core.multiarray.scalar'),
    (_Inert, 'numpy.core.multiarray.scalar'),
]


def load_checkpoint_file(
    source: str, *, trust: bool = False
) -> dict[str, Any]:
    """Read a checkpoint from a path or URL onto the CPU.

    Only tensors and plain containers are read (``weights_only``); the log
    history of MMEngine's training checkpoints is skipped. A pickle that needs
    more could run any code while it is read, so it is refused unless
    ``trust`` is set.

    Args:
        source: A file (or its ``file://`` URL), or an ``http(s)://`` URL,
            which is downloaded once into PyTorch's hub folder; a hash in its
            name (``…-0a1825a4.pth``) is verified.
        trust: Unpickle whatever the file holds.

    Returns:
        The checkpoint with at least the key ``state_dict``.

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or
            needs ``trust``.
    """
    path = _local_file(source)
    try:
        with safe_globals([] if trust else _INERT_GLOBALS):
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=not trust
            )
    except pickle.UnpicklingError as error:
        if not _is_pickled(path):
            # Not PyTorch's words: they advise to read what may run code.
            reason = f'it begins with {_start(path, 12)!r}'
            raise CheckpointError(_unreadable(path, reason)) from None
        detail = re.search(r'(?:GLOBAL|class|function) (\S+)', str(error))
        raise CheckpointError(
            f'{path} holds more than weights'
            f'{f" ({detail[1]})" if detail else ""} and is not read, because '
            'a pickle can run code. If you trust where it comes from, set '
            'trust_checkpoint=True beside its path.'
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(_unreadable(path, reason)) from None
    return _as_checkpoint(checkpoint, path)


def _is_pickled(path: str) -> bool:
    """Whether a file is PyTorch's zip archive or a pickle, by its start.

    PyTorch refuses a web page or a pointer file like a pickle that it does
    not trust; the user must not be told to trust it.
    """
    start = _start(path, 2)
    return start == b'PK' or start[:1] == b'\x80'


def _start(path: str, count: int) -> bytes:
    with open(path, 'rb') as file:
        return file.read(count)


def _unreadable(path: str, reason: str) -> str:
    first = reason.splitlines()[0].partition('. ')[0].rstrip('.')
    return (
        f'{path} ({os.path.getsize(path):,} bytes) is no PyTorch checkpoint '
        f'or is truncated: {first}. Download or copy it again and compare '
        'its size or sha256.'
    )


def _as_checkpoint(checkpoint: Any, path: str) -> dict[str, Any]:
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        if checkpoint and all(
            isinstance(v, torch.Tensor) for v in checkpoint.values()
        ):
            checkpoint = {'state_dict': checkpoint}
        elif 'model' in checkpoint:
            checkpoint = {**checkpoint, 'state_dict': checkpoint['model']}
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        held = (
            f'keys {sorted(map(str, checkpoint))[:8]}'
            if isinstance(checkpoint, dict)
            else f'a {type(checkpoint).__name__}'
        )
        raise CheckpointError(
            f'{path} is no detector checkpoint: expected a dict with a '
            f'"state_dict" (or a state dict itself), got {held}.'
        )
    return checkpoint


def _local_file(source: str) -> str:
    url = urlparse(source)
    if url.scheme in ('http', 'https'):
        return _download(source)
    local = url2pathname(url.path) if url.scheme == 'file' else source
    path = os.path.expanduser(local)
    if not os.path.isfile(path):
        raise CheckpointError(
            f'the checkpoint {path!r} does not exist (working folder '
            f'{os.getcwd()}). Give the path or URL of the trained weights, '
            'or None for an untrained network in a smoke test.'
        )
    return path


def _download(url: str) -> str:
    name = os.path.basename(urlparse(url).path)
    # One folder a URL: files of the same name do not hide one another.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(get_dir(), 'checkpoints', digest, name)
    if is_main_process() and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        known = re.search(r'-([0-9a-f]{8,})\.pth$', name)
        try:
            download_url_to_file(url, str(path), known[1] if known else None)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f'{url} could not be downloaded: {error}. Download it by '
                'other means and give its path instead.'
            ) from None
    barrier()
    return str(path)


def damage(path: str) -> str | None:
    """What makes a local checkpoint unusable, without reading it whole.

    Returns:
        None for a file that is whole, or whose kind does not tell.
    """
    if not os.path.isfile(path):
        return 'does not exist'
    with open(path, 'rb') as file:
        start = file.read(2)
    if not start:
        return 'is empty'
    # PyTorch writes a zip archive, whose table of contents comes last.
    if start == b'PK' and not zipfile.is_zipfile(path):
        return f'is truncated ({os.path.getsize(path):,} bytes)'
    return None


def check_checkpoint(path: str) -> None:
    """Raise :class:`CheckpointError` for a local file that cannot be used."""
    problem = None if '://' in path else damage(path)
    if problem:
        raise CheckpointError(
            f'the checkpoint {path} {problem} (working folder {os.getcwd()}). '
            'Correct the path, or copy or download the file again.'
        )


def latest_checkpoint(folder: str) -> str | None:
    """The checkpoint of a training run that is to be resumed.

    It is the one that the file ``last_checkpoint`` names. Where that is
    missing or empty, or its checkpoint is damaged, it is the newest whole one
    in the folder.

    Returns:
        Its path; None in a folder without any.

    Raises:
        CheckpointError: If there are checkpoints, but none is whole.
    """
    pointer = Path(folder, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.is_file() else ''
    found = sorted(
        (p for p in Path(folder).glob('*.pth') if p.name[:5] != 'best_'),
        key=lambda p: p.stat().st_mtime_ns,
        reverse=True,
    )
    paths = [named] * bool(named) + [str(path) for path in found]
    damages: list[str] = []
    for path in paths:
        problem = None if '://' in path else damage(path)
        if problem is None:
            if path != named:
                print_log(
                    f'{pointer} {"is wrong" if named else "is missing"}'
                    f'{"".join(f"; {d}" for d in damages)}: the newest whole '
                    f'checkpoint is taken instead, {path}',
                    'current',
                    logging.WARNING,
                )
            return path
        damages.append(f'{path} {problem}')
    if damages:
        raise CheckpointError(
            f'nothing in {folder} can be resumed: {"; ".join(damages)}. '
            'Bring a whole checkpoint back, or empty the folder to start '
            'anew.'
        )
    return None


def split_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Move distillation's weights out of the networks' state dicts.

    Changes ``checkpoint`` in place: ``state_dict`` and ``ema_state_dict``
    become stock, ``checkpoint['distillation']`` takes the rest.
    """
    kept = checkpoint.setdefault(ATTACHED, {})
    for key, prefix in _prefixes(checkpoint):
        states = checkpoint[key]
        kept[key] = {
            name: states.pop(name)
            for name in list(states)
            if name.startswith(prefix)
        }


def join_checkpoint(
    checkpoint: dict[str, Any],
    own: Mapping[str, torch.Tensor],
    *,
    resume: bool,
) -> None:
    """Put distillation's weights into the networks' state dicts, in place.

    Args:
        checkpoint: A checkpoint that :func:`split_checkpoint` has changed, or
            a stock one.
        own: The weights of the run that loads it, by their names in
            ``state_dict``. They stand in for those that the checkpoint does
            not have in their shape.
        resume: Let nothing stand in.

    Raises:
        CheckpointError: If the checkpoint to be resumed has other weights.
    """
    kept = checkpoint.get(ATTACHED, {})
    for key, prefix in _prefixes(checkpoint):
        mine = {
            prefix + name.removeprefix(f'{ATTACHED}.'): value
            for name, value in own.items()
        }
        saved = kept.get(key, {})
        if resume:
            _check_same_weights(mine, saved)
        fitting = {
            name: saved[name]
            for name in mine
            if name in saved and saved[name].shape == mine[name].shape
        }
        checkpoint[key].update({**mine, **fitting})


def _check_same_weights(
    own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> None:
    shapes = [
        {name: tuple(value.shape) for name, value in weights.items()}
        for weights in (own, saved)
    ]
    names = sorted(
        name
        for name in {**own, **saved}
        if shapes[0].get(name) != shapes[1].get(name)
    )
    if names:
        first = names[0]
        expected, got = (s.get(first, 'nothing') for s in shapes)
        raise CheckpointError(
            'the checkpoint was saved with other distillation methods: '
            f'{len(names)} of their weights differ, the first is {first}: '
            f'expected {expected}, got {got}. Resume with the config it was '
            'saved with, or start from its student with load_from and '
            'without resume.'
        )


def _prefixes(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    prefixes = {
        'state_dict': f'{ATTACHED}.',
        'ema_state_dict': f'module.{ATTACHED}.',
    }
    return [item for item in prefixes.items() if item[0] in checkpoint]


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """Call ``write(temporary path)``, then rename the result to ``path``.

    Whoever is killed in between leaves the file that was there before.
    """
    temporary = f'{path}.tmp'
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise

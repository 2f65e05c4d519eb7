"""Checkpoint files: reading them safely and keeping them stock.

A distilled checkpoint is a stock one: ``state_dict`` (and, with EMA,
``ema_state_dict``) hold the student under its stock names and nothing else.
What belongs to distillation lies under the separate key ``distillation``.
"""

import contextlib
import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
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
_INERT_GLOBALS: list[tuple[Any, str]] = [
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
        source: A file, or an ``http(s)://`` or ``file://`` URL, which is
            downloaded once into PyTorch's hub folder; a hash in its name
            (``…-0a1825a4.pth``) is verified.
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
        if 'weights_only' not in str(error) and 'Unsupported' not in str(
            error
        ):
            raise CheckpointError(_unreadable(path, error)) from None
        detail = re.search(r'(?:GLOBAL|class|function) (\S+)', str(error))
        raise CheckpointError(
            f'{path} holds more than weights'
            f'{f" ({detail[1]})" if detail else ""} and is not read, because '
            'a pickle can run code. If you trust where it comes from, set '
            'trust_checkpoint=True beside its path.'
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(_unreadable(path, error)) from None
    return _as_checkpoint(checkpoint, path)


def _unreadable(path: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f'{path} ({os.path.getsize(path):,} bytes) is no PyTorch checkpoint '
        f'or is truncated: {reason}. Download or copy it again and compare '
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
    scheme = urlparse(source).scheme
    if scheme in ('http', 'https', 'file'):
        return _download(source)
    path = os.path.expanduser(source)
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
            download_url_to_file(
                url, str(path), known[1] if known else None
            )
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f'{url} could not be downloaded: {error}. Download it by '
                'other means and give its path instead.'
            ) from None
    barrier()
    return str(path)


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


def join_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Undo :func:`split_checkpoint`, in place."""
    kept = checkpoint.get(ATTACHED, {})
    for key, _ in _prefixes(checkpoint):
        checkpoint[key].update(kept.get(key, {}))


def _prefixes(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    prefixes = {
        'state_dict': f'{ATTACHED}.',
        'ema_state_dict': f'module.{ATTACHED}.',
    }
    return [item for item in prefixes.items() if item[0] in checkpoint]


def write_atomically(path: str, write: Any) -> None:
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

"""Checkpoint files: read them safely, and write them in one step."""

import contextlib
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from mmengine.dist import barrier, is_main_process
from torch.hub import get_dir
from torch.serialization import safe_globals

from mmkd.errors import CheckpointError, DataError

from .download import RemoteFile, download


class _Inert:
    """Take the place of an object of a checkpoint that nobody needs."""

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
        trust: Whether to unpickle whatever the file holds.

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
            # PyTorch's own words advise users to read what may run code.
            reason = f'it begins with {_start(path, 12)!r}'
            raise CheckpointError(_unreadable(path, reason)) from None
        detail = re.search(r'(?:GLOBAL|class|function) (\S+)', str(error))
        raise CheckpointError(
            f'{path} holds more than weights'
            f'{f" ({detail[1]})" if detail else ""} and is not read, because '
            'a pickle can run code. If you trust where it comes from, set '
            'trust_checkpoint=True next to its path.'
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(_unreadable(path, reason)) from None
    return _as_checkpoint(checkpoint, path)


def _is_pickled(path: str) -> bool:
    """Tell by its start whether a file is PyTorch's zip archive or a pickle.

    PyTorch refuses a web page or a pointer file in the same words as a pickle
    that it does not trust; the user must not be told to trust it.
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
    # Each URL has its own folder: files of the same name do not collide.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(get_dir(), 'checkpoints', digest, name)
    if is_main_process() and not path.is_file():
        known = re.search(r'-([0-9a-f]{8,})\.pth$', name)
        try:
            download(RemoteFile(url, known and f'sha256:{known[1]}'), path)
        except (OSError, DataError) as error:
            raise CheckpointError(
                f'{url} could not be downloaded: {error} You can also get it '
                'by other means and give its path.'
            ) from None
    barrier()
    return str(path)


def damage(path: str) -> str | None:
    """Say what makes a local checkpoint unusable, without reading all of it.

    Returns:
        None if the file is whole, or of a kind that does not show it.
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


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """Call ``write(temporary path)``, then rename the result to ``path``.

    A process that is killed in between leaves the former file as it was.
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

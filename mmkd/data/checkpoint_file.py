"""Checkpoint files: read them safely, and write them in one step."""

import hashlib
import os
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

from mmkd.errors import CheckpointError, DataError

from .checkpoint_reader import read_checkpoint
from .download import RemoteFile, download
from .files import path_hint, replacement


def load_checkpoint_file(
    source: str, *, trust: bool = False, lazily: bool = False
) -> dict[str, Any]:
    """Read a checkpoint from a path or URL onto the CPU.

    A pickle that holds more than :func:`~mmkd.data.checkpoint_reader.\
read_checkpoint` takes could run any code while it is read, so it is refused
    unless ``trust`` is set.

    Args:
        source: A file (or its ``file://`` URL), or an ``http(s)://`` URL,
            which is downloaded once into PyTorch's hub folder; a hash in its
            name (``…-0a1825a4.pth``) is verified.
        trust: Whether to unpickle whatever the file holds.
        lazily: Whether to read a tensor only when it is used.

    Returns:
        The checkpoint with at least the key ``state_dict``.

    Raises:
        CheckpointError: If the file is missing, truncated, no checkpoint, or
            needs ``trust``.
    """
    path = local_checkpoint(source)
    content = read_checkpoint(path, trust=trust, lazily=lazily)
    return _as_checkpoint(content, path)


def _as_checkpoint(checkpoint: Any, path: str) -> dict[str, Any]:
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        if checkpoint and _is_state(checkpoint):
            checkpoint = {'state_dict': checkpoint}
        elif 'model' in checkpoint:
            checkpoint = {**checkpoint, 'state_dict': checkpoint['model']}
    if not isinstance(checkpoint, dict) or not _is_state(
        checkpoint.get('state_dict')
    ):
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


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in state.items()
    )


def local_checkpoint(source: str) -> str:
    """Return the path of a checkpoint, which a URL is downloaded to."""
    url = urlparse(source)
    if url.scheme in ('http', 'https'):
        return download_checkpoint(source)
    local = url2pathname(url.path) if url.scheme == 'file' else source
    return os.path.expanduser(local)


def download_checkpoint(url: str, *, verified: bool = True) -> str:
    """Download a checkpoint, once, and return its path.

    Args:
        url: Its ``http(s)://`` URL.
        verified: Whether a hash in its name must be that of the file.
    """
    name = os.path.basename(urlparse(url).path)
    # Each URL has its own folder: files of the same name do not collide.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(get_dir(), 'checkpoints', digest, name)
    known = re.search(r'-([0-9a-f]{8,})\.pth$', name) if verified else None

    def fetch() -> None:
        if path.is_file():
            return
        try:
            download(RemoteFile(url, known and f'sha256:{known[1]}'), path)
        except (OSError, DataError) as error:
            raise CheckpointError(
                f'{url} could not be downloaded: {error} You can also get it '
                'by other means and give its path.'
            ) from None

    if is_main_process():
        fetch()
    barrier()
    fetch()  # on another machine
    return str(path)


def damage(path: str) -> str | None:
    """Say what makes a local checkpoint unusable, without reading all of it.

    Returns:
        None if the file is whole, or of a kind that does not show it.
    """
    if os.path.isdir(path):
        return 'is a folder'
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
            f'{path_hint(path)}Correct the path, or copy or download the file '
            'again.'
        )


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """Call ``write(temporary path)``, then rename the result to ``path``.

    A process that is killed in between leaves the former file as it was, and
    no other process has the same temporary path.
    """
    with replacement(Path(path)) as temporary:
        write(str(temporary))

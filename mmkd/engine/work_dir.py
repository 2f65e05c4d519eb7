"""Keep a work dir to one training."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.dist import is_main_process

from mmkd.data.files import remove_leftovers
from mmkd.data.lock import SILENCE, Held, holder_of, locked
from mmkd.errors import CheckpointError, MMKDError, WorkDirError

from .processes import raise_together

LOCK = '.training.lock'
_ours: set[str] = set()
"""The work dirs in which this process trains."""


@contextlib.contextmanager
def one_training(work_dir: str) -> Iterator[None]:
    """Train in a folder in which no other training is at work.

    The first process of a run holds the lock. It also removes what trainings
    that were killed while they wrote have left behind.

    Raises:
        WorkDirError: If another training is at work in the folder.
        CheckpointError: If nothing can be written there.
    """
    folder = os.path.realpath(work_dir)
    if folder in _ours:
        yield
        return
    error: MMKDError | None = None
    with contextlib.ExitStack() as stack:
        if is_main_process():
            try:
                stack.enter_context(locked(Path(folder, LOCK)))
                remove_leftovers(Path(folder))
            except Held as held:
                error = _in_use(work_dir, held.holder)
            except OSError as found:
                error = CheckpointError(
                    f'{work_dir} cannot be locked for the training: {found}. '
                    'Give the folder the rights to write, or choose another '
                    'with --work-dir.'
                )
                error.__cause__ = found
        raise_together(error)
        _ours.add(folder)
        stack.callback(_ours.discard, folder)
        yield


def training_in(work_dir: str) -> str | None:
    """Say which other process trains in a folder; None if there is none."""
    return holder_of(Path(work_dir, LOCK))


def check_no_training(work_dir: str) -> None:
    """Refuse a folder before anything is written there.

    Raises:
        WorkDirError: If another training is at work in the folder.
    """
    if holder := training_in(work_dir):
        raise _in_use(work_dir, holder)


def _in_use(work_dir: str, holder: str) -> WorkDirError:
    return WorkDirError(
        f'another training is at work in {work_dir}: {holder}. Wait for its '
        'end or end it, or choose another folder with --work-dir. If it has '
        f'died on another machine, its lock is free after {SILENCE} seconds '
        f'without a sign of life, or once you remove {Path(work_dir, LOCK)}.'
    )
